// The row formula of `polyce.rowstate`: the state of a part of a row, and what whole rows give.
//
// Sums run in float64, one addition for several classes. What follows from them is float32 for
// float32, with the gap of the pivot as two numbers: GPUs with little float64 would take longer
// for a short row's few steps than for reading it.

#define NONE 0x7fffffff  // stands for no class, behind all classes

// What a call is about. Whole numbers take eight bytes; of an option in both forms, the one is for
// what is computed of every logit.
struct Call {
  i64 outer, inner, classes;     // rows by two indices, the inner one the lane
  i64 x_outer, x_lane, x_class;  // strides of the logits, in elements
  i64 t_outer, t_lane, t_class;  // of probabilities
  i64 g_outer, g_lane, g_class;  // of the gradient
  i64 blocks;                    // groups of lanes for each outer index
  i64 lanes, team;               // rows of a block, and threads of a row
  i64 across;                    // whether neighbouring threads have rows of their own
  i64 parts, chunk;              // of a long row: how many, and how many loads long
  i64 weighed;                   // how many sums of row weights there are
  i64 t_in_step, g_in_step;      // whether they lie to 16-byte boundaries as the logits do
  i64 ignores, ignore_index;
  i64 mean;
  i64 loss_kind, sample_kind, normalizer_kind, cotangent_kind;
  i64 cotangent_by_row;
  double exact_scale, exact_cap;
  double teacher_scale;          // of a teacher's logits
  real scale, cap;               // with a softcap, the scale is divided by it
  real kept, share;              // 1 - smoothing, and smoothing / classes
  real z_loss;
#if PART
  i64 start, all_classes;        // the first class of the part, and how many the rows have
#endif
};

// Which classes of the rows these are.
DEVICE i64 first_class(const Call& call) {
#if PART
  return call.start;
#else
  return 0;
#endif
}
DEVICE i64 all_classes(const Call& call) {
#if PART
  return call.all_classes;
#else
  return call.classes;
#endif
}

// The scale and the cap as what is computed with them.
template <class T> DEVICE T scale_of(const Call& call);
template <> DEVICE float scale_of<float>(const Call& call) { return (float)call.scale; }
template <> DEVICE double scale_of<double>(const Call& call) { return call.exact_scale; }
template <class T> DEVICE T cap_of(const Call& call);
template <> DEVICE float cap_of<float>(const Call& call) { return (float)call.cap; }
template <> DEVICE double cap_of<double>(const Call& call) { return call.exact_cap; }

// exp(-2 |u|), where u = scale x.
template <class T> DEVICE T capped_decay(const Call& call, T x) {
  return exp_of((T)-2 * size_of(x * scale_of<T>(call)));
}

// What two logits differ by after the transform, by the form of `polyce.transform`.
template <class T> DEVICE T difference(const Call& call, T x, T reference) {
  const T gap = x - reference;
#if SOFTCAP
  const T p = capped_decay(call, x), q = capped_decay(call, reference);
  const T nearby = (x < 0) == (reference < 0) ? p + q : 1 + p * q;
  const T share = nearby * 2 * cap_of<T>(call) / ((1 + p) * (1 + q));
  const T masked = -(T)infinity();
  return x == masked || reference == masked ? gap : share * tanh_of(gap * scale_of<T>(call));
#else
  return gap * scale_of<T>(call);
#endif
}

// The derivative of a transformed logit by the logit.
DEVICE real slope(const Call& call, real x) {
#if SOFTCAP
  const real e = capped_decay(call, x);
  return 4 * call.scale * call.cap * e / ((1 + e) * (1 + e));
#else
  return call.scale;
#endif
}

DEVICE real transformed(const Call& call, real x) {
#if SOFTCAP
  return x == -infinity() ? x : call.cap * tanh_of(x * call.scale);
#else
  return x * call.scale;
#endif
}

// exp(gap) for a gap from one maximum to a larger one: a row that rises all along meets many.
DEVICE double decay(real gap) {
  return gap > (real)-0.5 ? 1 + (double)expm1_of(gap) : (double)exp_of(gap);
}

// A sum over classes. Float64 terms may be too many to be added to one another without a care:
// there it keeps what each addition loses.
#if REAL == FLOAT64
struct Sum {
  double rounded, lost;

  DEVICE operator double() const { return rounded + lost; }
  DEVICE void operator=(double value) {
    rounded = value;
    lost = 0;
  }
  DEVICE void operator+=(double term) {
    const double next = rounded + term, part = next - rounded;
    const double error = (rounded - (next - part)) + (term - part);
    // Infinity minus itself is nothing lost.
    if (error == error) lost += error;
    rounded = next;
  }
  DEVICE void operator*=(double factor) {
    rounded *= factor;
    lost *= factor;
  }
};
#else
typedef double Sum;
#endif

// Whether the pivot is the class of the largest logit, and not the label.
#define LARGEST (!LABELS || STATS)
// Whether a label's Brier score and its rank are summed. The score of probabilities takes another look
// at the logits.
#define RANKED (BESIDE && LABELS)
#define DISTANT (BESIDE && PROBABILITY && !TEACHER)
// Whether the target's likeliest class is looked for.
#define PREFERS (!LABELS && STATS)
// Whether all classes have a share of the smoothing beside a teacher's, which is known last.
#define EVEN (TEACHER && SMOOTHED)
// Whether the ints of a state would leave a gap.
#if TEACHER
#define PADDED (REAL == FLOAT32 ? STATS == EVEN : !STATS)
#else
#define PADDED (PROBABILITY ? !STATS && REAL == FLOAT64 : STATS && !RANKED)
#endif

// The coefficient of a pivot, of a teacher in units of its largest logit's.
#if TEACHER
typedef double part_r;
#else
typedef real part_r;
#endif

// The state of some of a row's classes, less the pivot.
struct State {
  real top;    // m', the largest logit
  real pivot;  // its logit: where it is the label, if that lies in the part
  Sum total;   // d', the sum of exp(x - m')
#if SPREAD
  Sum rest;    // R', the sum of the coefficients
  Sum excess;  // q', the sum of r (m' - x)
#endif
#if STATS
  Sum entropy;  // the sum of exp(x - m') (m' - x)
#endif
#if RANKED
  Sum squares;  // the sum of exp(x - m')^2
#endif
#if LARGEST
  part_r pivot_r;   // without what the label has beside its share of the smoothing
  int pivot_class;  // the first with the largest logit
#endif
#if PREFERS
  int likeliest_class;
#if !TEACHER
  real likeliest;
#endif
#endif
#if SPARSE
  int bad;  // whether a class is out of range
#endif
#if FIRST
  int first;  // the first class with m'
#endif
#if TEACHER
  real teacher_top;    // the teacher's largest logit; R' and q' are in units of its exponential
#if EVEN
  real pivot_even;     // the pivot's class weight
#endif
  Sum teacher_total;   // the sum of the teacher's exponentials
#if EVEN
  Sum even, even_excess;  // R' and q' of the classes' weights alone
#endif
#endif
#if PADDED
  int unused;  // so that all bytes of a state in memory are written
#endif
#if RANKED
  int rank;  // how many classes have a larger logit than the label
#endif
#if STATS && LABELS
  real label;  // its logit, in the state of a row's first thread; for a rank of all
#endif
};

DEVICE State nothing_read() {
  State state;
  state.top = -infinity();
  state.total = 0;
#if SPREAD
  state.rest = 0;
  state.excess = 0;
#endif
#if STATS
  state.entropy = 0;
#endif
#if RANKED
  state.squares = 0;
  state.rank = 0;
#endif
  state.pivot = -infinity();
#if LARGEST
  state.pivot_r = 0;
  state.pivot_class = NONE;
#endif
#if SPARSE && STATS
  state.likeliest_class = -1;
  state.likeliest = 0;
#elif PREFERS
  state.likeliest_class = NONE;
#if !TEACHER
  state.likeliest = -infinity();
#endif
#endif
#if SPARSE
  state.bad = 0;
#endif
#if FIRST
  state.first = NONE;
#endif
#if TEACHER
  state.teacher_top = -infinity();
  state.teacher_total = 0;
#endif
#if EVEN
  state.pivot_even = 0;
  state.even = 0;
  state.even_excess = 0;
#endif
#if PADDED
  state.unused = 0;
#endif
#if STATS && LABELS
  state.label = 0;
#endif
  return state;
}

// Exponents are taken from 0 while nothing but masked classes was read.
DEVICE real reference_of(real top) { return top == -infinity() ? (real)0 : top; }

// Move a state's sums to a larger maximum.
DEVICE void carry(const Call& call, State& state, real top) {
  const double lower = decay(difference(call, state.top, top));
#if SPREAD || STATS
  // Infinite from masked classes alone, whose excess is 0 or infinite already.
  const double risen = difference(call, top, state.top);
#endif
#if SPREAD
  if (state.rest != 0) state.excess += state.rest * risen;
#endif
#if EVEN
  if (state.even != 0) state.even_excess += state.even * risen;
#endif
#if STATS
  state.entropy += state.total * risen;
  state.entropy *= lower;
  if (state.total * lower == 0) state.entropy = 0;
#endif
#if RANKED
  if (state.squares != 0) state.squares *= lower * lower;
#endif
  if (state.total != 0) state.total *= lower;
  state.top = top;
}

#if TEACHER
// exp(scale (t - top)). What rounding takes from the exponent is multiplied back: half a unit in the
// last place of an exponent of 80 is 64 units of the result.
DEVICE real teacher_exp(const Call& call, real t, real top) {
  const real scale = (real)call.teacher_scale, scale_low = (real)(call.teacher_scale - (double)scale);
  const real reference = reference_of(top), gap = t - reference;
  const real kept = t - gap, exponent = gap * scale;
  const real taken = (t - (gap + kept)) + (kept - reference);
  const real error = taken * scale + (fma(gap, scale, -exponent) + gap * scale_low);
  const real found = exp_of(exponent);
  return found + found * (error - error == 0 ? error : 0);
}

// Move what is in units of the teacher's largest logit to a larger one.
DEVICE void carry_teacher(const Call& call, State& state, real top) {
  const double lower = exp(((double)state.teacher_top - (double)top) * call.teacher_scale);
  state.teacher_total *= lower;
  state.pivot_r *= lower;
  state.rest *= lower;
  state.excess *= lower;
  // What no longer has a coefficient takes no part, not even as 0 times infinity.
  if (lower == 0) state.excess = 0;
  state.teacher_top = top;
}
#endif

#if LARGEST
// Count a class in that is not the pivot after all.
DEVICE void include(const Call& call, State& state, real x, part_r r, int c, real even) {
  if (c == NONE) return;
  if (x > state.top) carry(call, state, x);
  const real gap = difference(call, x, reference_of(state.top));
  const real p = exp_of(gap);
  state.total += p;
#if SPREAD
  state.rest += r;
  if (r != 0) state.excess += r * -gap;
#endif
#if EVEN
  state.even += even;
  if (even != 0) state.even_excess += even * -gap;
#endif
#if STATS
  if (p != 0) state.entropy += p * -gap;
#endif
#if RANKED
  state.squares += p * p;
#endif
}

// Of two pivots the first with the larger logit is the pivot; the other is counted in.
DEVICE void choose_pivot(const Call& call, State& state, real x, part_r r, int c, real even) {
  if (x > state.pivot || (x == state.pivot && c < state.pivot_class)) {
    const real loser = state.pivot;
    const part_r loser_r = state.pivot_r;
    const int loser_class = state.pivot_class;
    state.pivot = x;
    state.pivot_r = r;
    state.pivot_class = c;
#if EVEN
    const real loser_even = state.pivot_even;
    state.pivot_even = even;
    even = loser_even;
#endif
    x = loser;
    r = loser_r;
    c = loser_class;
  }
  include(call, state, x, r, c, even);
}
#endif

#if PREFERS && !TEACHER
DEVICE void choose_likeliest(State& state, real p, int c) {
  if (p > state.likeliest || (p == state.likeliest && c < state.likeliest_class)) {
    state.likeliest = p;
    state.likeliest_class = c;
  }
}
#endif

#if FIRST
// Take a class for the first with m', if none comes before it; before the state is carried to `top`.
DEVICE void choose_first(State& state, real top, int c) {
  if (top > state.top || (top == state.top && c < state.first)) state.first = c;
}
#endif

// Join the state of other classes to one. A label's logit is in the state of the first part.
DEVICE void merge(const Call& call, State& state, State other) {
#if FIRST
  choose_first(state, other.top, other.first);
#endif
  if (other.top > state.top) carry(call, state, other.top);
  if (state.top > other.top) carry(call, other, state.top);
  state.total += other.total;
#if TEACHER
#if STATS
  const bool earlier = other.likeliest_class < state.likeliest_class;
  if (other.teacher_top > state.teacher_top || (other.teacher_top == state.teacher_top && earlier))
    state.likeliest_class = other.likeliest_class;
#endif
  if (other.teacher_top > state.teacher_top) carry_teacher(call, state, other.teacher_top);
  if (state.teacher_top > other.teacher_top) carry_teacher(call, other, state.teacher_top);
  state.teacher_total += other.teacher_total;
#endif
#if EVEN
  state.even += other.even;
  state.even_excess += other.even_excess;
  const real other_even = other.pivot_even;
#elif LARGEST
  const real other_even = 0;
#endif
#if SPREAD
  state.rest += other.rest;
  state.excess += other.excess;
#endif
#if STATS
  state.entropy += other.entropy;
#endif
#if RANKED
  state.squares += other.squares;
  state.rank += other.rank;
#endif
#if LARGEST
  choose_pivot(call, state, other.pivot, other.pivot_r, other.pivot_class, other_even);
#endif
#if PREFERS && !TEACHER
  choose_likeliest(state, other.likeliest, other.likeliest_class);
#endif
}
