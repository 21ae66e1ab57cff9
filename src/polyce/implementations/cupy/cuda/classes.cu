// A thread's way over the classes of a row, and reading them into a state.

// How many loads a thread has under way: enough to wait for memory together. Where there is AHEAD, as
// many again are under way while these are used.
#if SOFTCAP || PROBABILITY || REAL == FLOAT64
#define AHEAD 0
enum { LOADS = 1 };
#elif WIDTH > 1 && LOGITS == FLOAT32
#define AHEAD 0
enum { LOADS = 2 };
#else
#define AHEAD 1
enum { LOADS = WIDTH > 1 ? 1 : 4 };
#endif

// What is loaded and stored at once. In 32 bits each: of a structure of 16 bits each some
// compilers load 8 bytes twice.
template <int N> struct alignas(4 * N) Words { unsigned each[N]; };

template <int KIND, int W, int N>
DEVICE void widen_all(const Words<N>& words, real (&numbers)[W]) {
  enum { SIZE = 4 * N / W };
#pragma unroll
  for (int w = 0; w < W; w++) {
    u64 bits;
    if constexpr (SIZE == 2) bits = words.each[w / 2] >> 16 * (w % 2) & 0xffff;
    if constexpr (SIZE == 4) bits = words.each[w];
    if constexpr (SIZE == 8) bits = (u64)words.each[2 * w + 1] << 32 | words.each[2 * w];
    numbers[w] = (real)Stored<KIND>::from_bits(bits);
  }
}

// What was loaded, as it lies in memory: of 16-bit numbers it takes half of the registers.
template <int W> struct Loaded {
  Words<W * sizeof(logit) / 4> words;
  DEVICE void widen(real (&numbers)[W]) const { widen_all<LOGITS>(words, numbers); }
};
template <> struct Loaded<1> {
  logit number;
  DEVICE void widen(real (&numbers)[1]) const { numbers[0] = (real)Stored<LOGITS>::widen(number); }
};

// Load W numbers that lie together, on a boundary of as many bytes as they take.
template <int KIND, int W>
DEVICE void load(const typename Stored<KIND>::type* place, real (&numbers)[W]) {
  if constexpr (W == 1) {
    numbers[0] = (real)Stored<KIND>::widen(*place);
  } else {
    const Words<W * sizeof(*place) / 4> words = *(const Words<W * sizeof(*place) / 4>*)place;
    widen_all<KIND>(words, numbers);
  }
}

// Store W numbers where such a load may be.
template <int KIND, int W>
DEVICE void store(typename Stored<KIND>::type* place, const real (&numbers)[W]) {
  if constexpr (W == 1) {
    *place = Stored<KIND>::narrow(numbers[0]);
  } else {
    enum { SIZE = sizeof(*place), N = W * SIZE / 4 };
    Words<N> words;
    if constexpr (SIZE == 2) {
#pragma unroll
      for (int n = 0; n < N; n++)
        words.each[n] = Stored<KIND>::narrow_pair(numbers[2 * n], numbers[2 * n + 1]);
    } else {
#pragma unroll
      for (int w = 0; w < W; w++) {
        const u64 bits = Stored<KIND>::to_bits(Stored<KIND>::narrow(numbers[w]));
        words.each[SIZE / 4 * w] = (unsigned)bits;
        if constexpr (SIZE == 8) words.each[2 * w + 1] = (unsigned)(bits >> 32);
      }
    }
    *(Words<N>*)place = words;
  }
}

// Where a thread sits in its block: which of the block's rows, and which of that row's threads.
struct Seat { int lane, member; };

DEVICE Seat seat(const Call& call) {
  const int lanes = (int)call.lanes, team = (int)call.team, thread = (int)threadIdx.x;
  Seat own;
  own.lane = call.across ? thread % lanes : thread / team;
  own.member = call.across ? thread / lanes : thread % team;
  return own;
}

// Where a row lies.
struct Row {
  i64 number;            // in C order; -1 where there is none
  i64 x_at, t_at, g_at;  // where its logits, its probabilities and its gradient begin
};

DEVICE Row row_of(const Call& call, i64 outer, i64 lane) {
  Row row;
  row.number = lane < call.inner ? outer * call.inner + lane : -1;
  row.x_at = outer * call.x_outer + lane * call.x_lane;
  row.t_at = outer * call.t_outer + lane * call.t_lane;
  row.g_at = outer * call.g_outer + lane * call.g_lane;
  return row;
}

// The arrays that tell what rows are about; null for what is not there.
struct Targets {
  const target* given;
  const real* weight;  // from the first of the classes on
  const void* sample;
#if PART
  const double* teacher;  // what is known of a teacher's rows
#endif
};

// What they say of a row.
struct Meaning {
  int label;     // always in range, of whole rows; from the first of the classes on
  real weight;   // of the label's class
  double sample;
  bool counted;
  bool invalid;  // whether the label is out of range
};

DEVICE Meaning meaning_of(const Call& call, const Targets& targets, i64 row) {
  Meaning found = {0, 1, 1, true, false};
  if (targets.sample) {
    found.sample = load_number(targets.sample, row, call.sample_kind);
    found.counted = found.sample != 0;
  }
#if LABELS
  const i64 label = (i64)targets.given[row];
  if (call.ignores && label == call.ignore_index) found.counted = false;
  found.invalid = found.counted && (label < 0 || label >= all_classes(call));
  if (found.counted && !found.invalid) found.label = (int)(label - first_class(call));
  if (targets.weight && !found.invalid) found.weight = targets.weight[found.label];
#endif
  return found;
}

// The same once the whole row is known, and with it whether an entry of it is out of range.
DEVICE Meaning meaning_of(const Call& call, const Targets& targets, i64 row, const State& state) {
  Meaning found = meaning_of(call, targets, row);
#if SPARSE
  found.invalid = found.counted && state.bad;
#endif
  return found;
}

// Whether a row's label is one of these classes.
DEVICE bool has_label(const Call& call, const Meaning& row) {
  return !PART || (row.label >= 0 && row.label < call.classes);
}

DEVICE double weight_of(const Meaning& row) { return row.counted ? row.sample * row.weight : 0; }

// The coefficient of a class as if it were not the label; probability is what the target says.
DEVICE real coefficient(const Call& call, const real* weight, real probability, int c) {
#if SPARSE && !SMOOTHED
  const real r = 0;
  weight = 0;
#elif PROBABILITY
  const real r = probability * call.kept + call.share;
#else
  const real r = call.share;
#if PART
  // Nothing times an infinite weight is nothing.
  if (r == 0) return 0;
#endif
#endif
  return weight ? r * weight[c] : r;
}

// Some classes of a row: W of them from `first` on, again W from `first + step` on, and so on, as
// far as they come before `limit`.
template <int U, int W> struct Taken {
  int first, step, limit;
  real x[U][W];
  real p[PROBABILITY ? U : 1][W];

  DEVICE int number(int u, int w) const { return first + u * step + w; }
  // The first is never taken behind the limit.
  DEVICE bool has(int u) const { return u == 0 || number(u, 0) < limit; }
  // Whether a class is among those of a load: few are, and only they are looked at one by one.
  DEVICE bool holds(int u, int c) const { return (unsigned)(c - number(u, 0)) < W; }
  DEVICE real probability(int u, int w) const { return PROBABILITY ? p[u][w] : (real)0; }
};

template <int U, int W>
DEVICE void take(const Call& call, const logit* x, const target* p, Taken<U, W>& taken) {
#pragma unroll
  for (int u = 0; u < U; u++) {
    if (!taken.has(u)) continue;
    const i64 c = taken.number(u, 0);
    load<LOGITS>(x + c * (WIDTH > 1 ? 1 : call.x_class), taken.x[u]);
#if PROBABILITY
    if constexpr (W > 1 && W * sizeof(target) <= 16) {
      if (call.t_in_step) {
        load<TARGET>(p + c, taken.p[u]);
        continue;
      }
    }
#pragma unroll
    for (int w = 0; w < W; w++)
      taken.p[u][w] = (real)Stored<TARGET>::widen(p[(c + w) * (WIDTH > 1 ? 1 : call.t_class)]);
#endif
  }
}

// Count classes into a state, all but the pivot.
template <int U, int W>
DEVICE void absorb(const Call& call, int label, const real* weight, const Taken<U, W>& taken,
                   State& state) {
  int pivot = label;
#if LARGEST
  real pivot_logit = -infinity();
  part_r pivot_r = 0;
  pivot = NONE;
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int w = 0; w < W; w++) {
      if (!taken.has(u)) continue;
      const int c = taken.number(u, w);
#if PROBABILITY && PREFERS && !TEACHER
      choose_likeliest(state, taken.p[u][w], c);
#endif
      const real x = taken.x[u][w];
#if RANKED
      if (x > state.label) state.rank++;
#endif
      if (x > pivot_logit || (pivot == NONE && x == pivot_logit)) {
        pivot_logit = x;
#if TEACHER
        // Its logit, until the unit is known.
        pivot_r = taken.p[u][w];
#elif SPREAD
        pivot_r = coefficient(call, weight, taken.probability(u, w), c);
#endif
        pivot = c;
      }
    }
#endif
  // The pivot, and what is behind the last class, are masked.
  real others[U][W];
  real top = -infinity();
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int w = 0; w < W; w++) others[u][w] = taken.has(u) ? taken.x[u][w] : -infinity();
    if (taken.holds(u, pivot)) {
#pragma unroll
      for (int w = 0; w < W; w++)
        if (taken.number(u, w) == pivot) others[u][w] = -infinity();
    }
#pragma unroll
    for (int w = 0; w < W; w++) top = larger_of(top, others[u][w]);
  }
#if FIRST
  int first = NONE;
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int w = 0; w < W; w++)
      if (first == NONE && taken.has(u) && others[u][w] == top) first = taken.number(u, w);
  choose_first(state, top, first);
#endif
  if (top > state.top) carry(call, state, top);
#if LARGEST
  real pivot_even = 0;
#endif
#if TEACHER
  real teacher_top = state.teacher_top;
#if STATS
  real likeliest = teacher_top;
#endif
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int w = 0; w < W; w++) {
      const real t = taken.has(u) ? taken.p[u][w] : -infinity();
      if (t > teacher_top) teacher_top = t;
#if STATS
      if (t > likeliest || (t == likeliest && taken.number(u, w) < state.likeliest_class)) {
        likeliest = t;
        state.likeliest_class = taken.number(u, w);
      }
#endif
    }
  if (teacher_top > state.teacher_top) carry_teacher(call, state, teacher_top);
  if (pivot != NONE) {
    pivot_even = weight ? weight[pivot] : (real)1;
    pivot_r = (double)teacher_exp(call, (real)pivot_r, state.teacher_top) * pivot_even;
  }
#endif
  const real reference = reference_of(state.top);
  // Four at a time, in pairs, so that equal terms add up exactly.
  enum { FEW = W < 4 ? W : 4 };
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int from = 0; from < W; from += FEW) {
      real total[FEW];
#if SPREAD
      real rest[FEW], excess[FEW];
#endif
#if TEACHER
      real teacher[FEW];
#endif
#if EVEN
      real even[FEW], even_excess[FEW];
#endif
#if STATS
      real entropy[FEW];
#endif
#if RANKED
      real squares[FEW];
#endif
#pragma unroll
      for (int i = 0; i < FEW; i++) {
        const int w = from + i;
        const real gap = difference(call, others[u][w], reference);
        total[i] = exp_of(gap);
#if SPREAD
        const int c = taken.number(u, w);
        const bool out = !taken.has(u) || c == pivot;
#endif
#if TEACHER
        const real class_weight = out || !weight ? (real)1 : weight[c];
        teacher[i] = taken.has(u) ? teacher_exp(call, taken.p[u][w], state.teacher_top) : (real)0;
        rest[i] = out ? (real)0 : teacher[i] * class_weight;
        excess[i] = rest[i] == 0 ? (real)0 : rest[i] * -gap;
#if EVEN
        even[i] = out ? (real)0 : class_weight;
        even_excess[i] = even[i] == 0 ? (real)0 : even[i] * -gap;
#endif
#elif SPREAD
        // A class of coefficient 0 takes no part, not even as 0 times infinity.
        rest[i] = out ? (real)0 : coefficient(call, weight, taken.probability(u, w), c);
        excess[i] = rest[i] == 0 ? (real)0 : rest[i] * -gap;
#endif
#if STATS
        entropy[i] = total[i] == 0 ? (real)0 : total[i] * -gap;
#endif
#if RANKED
        squares[i] = total[i] * total[i];
#endif
      }
#pragma unroll
      for (int half = FEW / 2; half > 0; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++) {
          total[i] += total[i + half];
#if SPREAD
          rest[i] += rest[i + half];
          excess[i] += excess[i + half];
#endif
#if TEACHER
          teacher[i] += teacher[i + half];
#endif
#if EVEN
          even[i] += even[i + half];
          even_excess[i] += even_excess[i + half];
#endif
#if STATS
          entropy[i] += entropy[i + half];
#endif
#if RANKED
          squares[i] += squares[i + half];
#endif
        }
      state.total += total[0];
#if SPREAD
      state.rest += rest[0];
      state.excess += excess[0];
#endif
#if TEACHER
      state.teacher_total += teacher[0];
#endif
#if EVEN
      state.even += even[0];
      state.even_excess += even_excess[0];
#endif
#if STATS
      state.entropy += entropy[0];
#endif
#if RANKED
      state.squares += squares[0];
#endif
    }
#if LARGEST
  choose_pivot(call, state, pivot_logit, pivot_r, pivot, pivot_even);
#endif
}

// Take the classes of a row, or of a part of it, that fall to this thread, for `use` of them.
template <class Use>
DEVICE void each_class(const Call& call, int member, const logit* x, const target* p, int part,
                       Use use) {
  const int classes = (int)call.classes, team = (int)call.team;
  int start = 0, length = classes;
#if WIDTH > 1
  // Up to where a boundary of loads begins, and behind the last one, classes come one by one.
  enum { BYTES = WIDTH * sizeof(logit) };
  start = (int)((BYTES - (u64)x % BYTES) % BYTES / sizeof(logit));
  if (start > classes) start = classes;
  length = (classes - start) / WIDTH;
  if (part == 0) {
    const int body = length * WIDTH;
    for (int j = member; j < classes - body; j += team) {
      Taken<1, 1> single;
      single.first = j < start ? j : j + body;
      single.step = 1;
      single.limit = classes;
      take(call, x, p, single);
      use(single);
    }
  }
#endif
  int begin = 0, end = length;
  if (call.parts > 1) {
    begin = part * (int)call.chunk;
    if (end - begin > (int)call.chunk) end = begin + (int)call.chunk;
  }
  Taken<LOADS, WIDTH> taken;
  taken.step = team * WIDTH;
  taken.limit = start + end * WIDTH;
#if AHEAD
  Loaded<WIDTH> ahead[LOADS];
  // From a load to the next one, and from a thread's to its next one.
  const i64 apart = WIDTH > 1 ? WIDTH : call.x_class, step = team * apart;
  const logit* next = x + start + (begin + member) * apart;
  const auto load_ahead = [&](int i) {
#pragma unroll
    for (int u = 0; u < LOADS; u++)
      if (i + u * team < end) ahead[u] = *(const Loaded<WIDTH>*)(next + u * step);
    next += LOADS * step;
  };
  load_ahead(begin + member);
#endif
  for (int i = begin + member; i < end; i += team * LOADS) {
    taken.first = start + i * WIDTH;
#if AHEAD
#pragma unroll
    for (int u = 0; u < LOADS; u++) ahead[u].widen(taken.x[u]);
    load_ahead(i + team * LOADS);
#else
    take(call, x, p, taken);
#endif
    use(taken);
    // What is kept in shared memory stays there: the registers are for the classes.
    asm volatile("" ::: "memory");
  }
}
