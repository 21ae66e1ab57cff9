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
  real scale, cap;               // with a softcap, the scale is divided by it
  real kept, share;              // 1 - smoothing, and smoothing / classes
  real z_loss, padding;
};

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
#define LARGEST (PROBABILITY || STATS)
// Whether a label's Brier score and its rank are summed. The score of probabilities takes another look
// at the logits.
#define RANKED (BESIDE && !PROBABILITY)
#define DISTANT (BESIDE && PROBABILITY)
// Whether the ints of a state would leave a gap.
#define PADDED (PROBABILITY ? !STATS && REAL == FLOAT64 : STATS && !RANKED)

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
  real pivot_r;     // without what the label has beside its share of the smoothing
  int pivot_class;  // the first with the largest logit
#endif
#if PROBABILITY && STATS
  int likeliest_class;
  real likeliest;
#endif
#if PADDED
  int unused;  // so that all bytes of a state in memory are written
#endif
#if RANKED
  int rank;  // how many classes have a larger logit than the label
#endif
#if STATS && !PROBABILITY
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
#if PROBABILITY && STATS
  state.likeliest_class = NONE;
  state.likeliest = -infinity();
#endif
#if PADDED
  state.unused = 0;
#endif
#if STATS && !PROBABILITY
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

#if LARGEST
// Count a class in that is not the pivot after all.
DEVICE void include(const Call& call, State& state, real x, real r, int c) {
  if (c == NONE) return;
  if (x > state.top) carry(call, state, x);
  const real gap = difference(call, x, reference_of(state.top));
  const real p = exp_of(gap);
  state.total += p;
#if SPREAD
  state.rest += r;
  if (r != 0) state.excess += r * -gap;
#endif
#if STATS
  if (p != 0) state.entropy += p * -gap;
#endif
#if RANKED
  state.squares += p * p;
#endif
}

// Of two pivots the first with the larger logit is the pivot; the other is counted in.
DEVICE void choose_pivot(const Call& call, State& state, real x, real r, int c) {
  if (x > state.pivot || (x == state.pivot && c < state.pivot_class)) {
    const real loser = state.pivot, loser_r = state.pivot_r;
    const int loser_class = state.pivot_class;
    state.pivot = x;
    state.pivot_r = r;
    state.pivot_class = c;
    x = loser;
    r = loser_r;
    c = loser_class;
  }
  include(call, state, x, r, c);
}
#endif

#if PROBABILITY && STATS
DEVICE void choose_likeliest(State& state, real p, int c) {
  if (p > state.likeliest || (p == state.likeliest && c < state.likeliest_class)) {
    state.likeliest = p;
    state.likeliest_class = c;
  }
}
#endif

// Join the state of other classes to one. A label's logit is in the state of the first part.
DEVICE void merge(const Call& call, State& state, State other) {
  if (other.top > state.top) carry(call, state, other.top);
  if (state.top > other.top) carry(call, other, state.top);
  state.total += other.total;
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
  choose_pivot(call, state, other.pivot, other.pivot_r, other.pivot_class);
#endif
#if PROBABILITY && STATS
  choose_likeliest(state, other.likeliest, other.likeliest_class);
#endif
}

// How far a class is below the largest besides the pivot's, and what rounding took from that.
struct Gap { real delta, error; };

DEVICE Gap exact_gap(const Call& call, real top, real x) {
  Gap gap;
#if REAL == FLOAT32
  const double exact = difference(call, (double)top, (double)x);
  gap.delta = (real)exact;
  gap.error = (real)(exact - gap.delta);
#elif SOFTCAP
  gap.delta = difference(call, top, x);
  gap.error = 0;
#else
  // The exact rounding errors of a difference and of a product.
  const real plain = top - x;
  const real x_part = top - plain;
  const real top_part = plain + x_part;
  const real lost = (top - top_part) + (x_part - x);
  gap.delta = plain * call.exact_scale;
  gap.error = fma(plain, call.exact_scale, -gap.delta) + lost * call.exact_scale;
#endif
  // Where something is infinite or nan there is nothing to be made good.
  if (!(gap.error == gap.error && size_of(gap.delta) < (real)1e30)) gap.error = 0;
  return gap;
}

// What a whole row gives.
struct Outcome {
  real loss;
  real lse;
  real entropy;
  real top;             // m', or 0 for -inf: of the label in a gradient, where there is one
  real factor;          // of exp(x - m') in the gradient
  real pivot_gradient;
#if BESIDE
  real top_probability;
  real brier;  // of a label
#endif
#if VALUED || DISTANT
  real softmax;      // of exp(x - m') in the softmax
  real probability;  // of the pivot
  real others;       // of the other classes together
#endif
#if VALUED
  real lead;              // lse - m'
  real entropy_at_pivot;  // the pivot's part in the gradient of the entropy
#if !PROBABILITY
  real label_p;  // exp(x - m') of the label, and m' - x; where it is not the pivot
  real label_gap;
  real label_gradient;
#endif
#endif
};

// `weight` is that of the label's class; 1 for probabilities.
DEVICE Outcome finish(const Call& call, const State& state, real weight, int label) {
#if SPREAD
  double others_r = state.rest;
  const real excess = (real)state.excess;
#elif LARGEST
  double others_r = 0;
  const real excess = 0;
#endif
#if PROBABILITY
  const real at_pivot = state.pivot_r;
#else
  const real at_label = weight * (call.kept + call.share);
#if LARGEST
  // The label is one of the other classes, unless it is the likeliest.
  const bool leads = label == state.pivot_class;
  const real at_pivot = leads ? at_label : state.pivot_r;
  const real added = leads || call.kept == 0 ? (real)0 : weight * call.kept;
  others_r += added;
#else
  const real at_pivot = at_label;
#endif
#endif
  const Gap gap = exact_gap(call, state.top, state.pivot);
  const bool below = gap.delta <= 0;
  const real opposite = -gap.delta;
  real low = exp_of(below ? gap.delta : opposite);
  low += low * (below ? gap.error : -gap.error);
  // nan for a pivot at +inf: such a row has no softmax.
  const real nothing = state.pivot - state.pivot;
  const real e = (real)(below ? state.total * low + nothing : (state.total - 1) + low);
  const real h = log1p_of(e);
  const real behind = below ? (real)0 : gap.delta;
  Outcome found;
  found.loss = at_pivot * ((at_pivot == 0 ? (real)0 : behind) + h);
  found.factor = (below ? low : (real)1) / (1 + e);
  const real probability = (below ? (real)1 : low) / (1 + e);
  const real others = (real)(state.total * found.factor);
  real sum_of_r = at_pivot;
#if SPREAD || LARGEST
  const real rest = (real)others_r;
  const real ahead = below && rest != 0 ? opposite : (real)0;
  // The excess is nan where an infinite coefficient has met a gap of 0: the rest is enough then.
  found.loss += (excess == excess ? excess : (real)0) + rest * (ahead + h);
  sum_of_r += rest;
  found.pivot_gradient = rest - sum_of_r * others;
#else
  found.pivot_gradient = -at_pivot * others;
#endif
  // Another form of the same number, which is torch's where the terms are infinite.
  const real share = sum_of_r * probability;
#if LARGEST
  // The one with the smaller terms loses fewer digits.
  const bool larger = size_of(share) + size_of(at_pivot) > size_of(rest) + size_of(sum_of_r * others);
#else
  const bool larger = size_of(sum_of_r) < infinity();
#endif
  if (!larger) found.pivot_gradient = share - at_pivot;
  found.lse = transformed(call, below ? state.pivot : state.top) + h;
  const real penalty = call.z_loss == 0 ? (real)0 : weight * call.z_loss;
  if (penalty != 0) {
    found.loss += penalty * found.lse * found.lse;
    const real pull = 2 * penalty * found.lse;
    sum_of_r += pull;
    found.pivot_gradient += pull * probability;
  }
  found.entropy = 0;
#if STATS
  const real gap_ahead = below && state.total != 0 ? opposite : (real)0;
  const real gap_behind = probability == 0 ? (real)0 : behind;
  // The lead may be beyond the largest number where nothing is left for the others.
  const real lacking = others == 0 ? (real)0 : others * (gap_ahead + h);
  found.entropy = (real)(found.factor * state.entropy) + lacking + probability * (gap_behind + h);
#endif
#if VALUED || DISTANT
  found.softmax = found.factor;
  found.probability = probability;
  found.others = others;
#endif
#if VALUED
  found.lead = gap_ahead + h;
  found.entropy_at_pivot =
      probability * ((gap_behind + h) * others - ((real)(found.factor * state.entropy) + lacking));
#endif
#if BESIDE
  found.top_probability = 1 / (1 + e);
#endif
#if RANKED
  const double squares = state.squares * found.factor * found.factor;
  found.brier = (real)((double)others * others + squares);
#endif
  found.top = reference_of(state.top);
#if STATS && !PROBABILITY
  if (!leads) {
    const Gap label_gap = exact_gap(call, found.top, state.label);
    if (added != 0 && size_of(added) != infinity()) found.loss += added * label_gap.delta + added * label_gap.error;
    real low_label = exp_of(-label_gap.delta);
    low_label -= low_label * label_gap.error;
#if RANKED
    const double p = low_label * found.factor;
    found.brier = (real)((1 - p) * (1 - p) + (double)probability * probability + (squares - p * p));
#endif
    const real label_gradient = sum_of_r * (low_label * found.factor) - at_label;
#if VALUED
    found.label_p = low_label;
    found.label_gap = label_gap.delta;
    found.label_gradient = label_gradient;
#else
    // The gradient has the label for the pivot, as it has without stats.
    found.pivot_gradient = label_gradient;
    found.top = reference_of(state.pivot);
    found.factor = probability;
#endif
  }
#endif
  found.factor *= sum_of_r;
  return found;
}
