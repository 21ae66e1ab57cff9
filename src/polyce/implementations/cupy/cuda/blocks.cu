// What a block does with the rows that its threads share: joining what they have read, concluding
// from it, looking at rows again.

// What a thread keeps of its row while it goes over the classes, which need the registers.
struct Place {
  i64 group;
  Seat seat;
  Row row;
  union {
    State state;
    Gradient gradient;  // in the place of the row's first thread
  };
};

DEVICE i64 groups_of(const Call& call) { return call.outer * call.blocks; }

DEVICE void find_row(const Call& call, Place& place) {
  const i64 outer = place.group / call.blocks, block = place.group % call.blocks;
  place.row = row_of(call, outer, block * call.lanes + place.seat.lane);
}

// Join what the threads of each row have read, into the state of its first thread.
template <class Places>
DEVICE void join_team(const Call& call, Places& places) {
  const int team = (int)call.team, thread = (int)threadIdx.x;
  // From a thread to the next one of its row.
  const int step = call.across ? (int)call.lanes : 1;
  if (team > 1) __syncthreads();
  for (int reach = team / 2; reach > 0; reach /= 2) {
    if (places[thread].seat.member < reach)
      merge(call, places[thread].state, places[thread + reach * step].state);
    __syncthreads();
  }
}

// The first of the threads that share a row.
DEVICE int first_of(const Call& call, const Seat& seat) {
  return call.across ? seat.lane : seat.lane * (int)call.team;
}

// Losses and weights of rows, added up.
struct Sums { double loss, weight; };

// Add up what the threads of a block have, into what its first thread has.
template <class Each>
DEVICE void add_up(Each& each) {
  const int thread = (int)threadIdx.x;
  __syncthreads();
  for (int reach = BLOCK / 2; reach > 0; reach /= 2) {
    if (thread < reach) {
      each[thread].loss += each[thread + reach].loss;
      each[thread].weight += each[thread + reach].weight;
    }
    __syncthreads();
  }
}

// Add up sums in memory, which other blocks may just have written.
template <class Each>
DEVICE void add_up(Each& each, const volatile Sums* sums, i64 count) {
  double loss = 0, weight = 0;
#pragma unroll 1
  for (i64 i = threadIdx.x; i < count; i += BLOCK) {
    loss += sums[i].loss;
    weight += sums[i].weight;
  }
  each[threadIdx.x] = Sums{loss, weight};
  add_up(each);
}

// What a mean divides by: `array` or `number` where the call brings it.
struct Divisor { const void* array; double number; };

enum { BY_WEIGHTS = 1, BY_NUMBER = 2, BY_ARRAY = 3 };

DEVICE double denominator(const Call& call, const Divisor& divisor, double weights) {
  if (call.mean == BY_WEIGHTS) return weights;
  if (call.mean == BY_ARRAY) return load_number(divisor.array, 0, call.normalizer_kind);
  return call.mean ? divisor.number : 1;
}

// Write the loss of all rows, by one thread.
DEVICE void store_loss(const Call& call, const Divisor& divisor, const Sums& total, void* result) {
  if (threadIdx.x) return;
  double loss = total.loss;
  if (call.mean) loss /= denominator(call, divisor, total.weight);
  store_number(result, 0, call.loss_kind, loss);
}

// Where the rows' losses and stats go; null for what nobody wants.
struct Results {
  void* loss;
  real* lse;
  real* entropy;
  i64* prediction;
  unsigned char* correct;
  unsigned char* valid;
  real* top_probability;
  real* brier;
  i64* rank;
};

// Write what a whole row's state says, and add its loss and weight to the sums.
DEVICE Outcome conclude(const Call& call, const Meaning& row, i64 number, const State& state,
                        const Results& results, Sums& sums) {
  const Outcome found = finish(call, state, row.weight, row.label);
  double loss = row.counted ? found.loss * row.sample : 0;
  if (row.invalid) loss = not_a_number();
  sums.loss += loss;
  sums.weight += weight_of(row);
  if (results.loss) store_number(results.loss, number, call.loss_kind, loss);
#if STATS
#if TEACHER
  // A teacher without a softmax prefers no class.
  const double unit = 1 / state.teacher_total;
  const int wanted = unit > 0 && unit < infinity() ? state.likeliest_class : -1;
#elif !LABELS
  const int wanted = state.likeliest_class;
#else
  const int wanted = row.label;
#endif
  const bool defined = row.counted && found.lse == found.lse;
  const int predicted = state.pivot_class;
  if (results.lse) results.lse[number] = row.counted ? found.lse : not_a_number();
  if (results.entropy) results.entropy[number] = row.counted ? found.entropy : not_a_number();
  if (results.prediction) results.prediction[number] = defined ? predicted : -1;
  if (results.correct) results.correct[number] = defined && !row.invalid && predicted == wanted;
  if (results.valid) results.valid[number] = row.counted;
#endif
#if BESIDE && STATS
  if (results.top_probability)
    results.top_probability[number] = defined ? found.top_probability : not_a_number();
#endif
#if RANKED && STATS
  const bool labelled = defined && !row.invalid;
  if (results.brier) results.brier[number] = labelled ? found.brier : not_a_number();
  if (results.rank) results.rank[number] = labelled ? state.rank : -1;
#endif
  return found;
}

// The gradient of all with respect to the loss, or to a row's.
DEVICE double cotangent_of(const Call& call, const void* array, double number, i64 row) {
  if (!array) return number;
  return load_number(array, call.cotangent_by_row ? row : 0, call.cotangent_kind);
}

// The gradients of all with respect to lse and entropy of the rows; null for 0.
struct OfStats { const double* lse; const double* entropy; };

// What a row's gradient is made of, where that of all with respect to its loss is g.
DEVICE Gradient gradient_of_row(const Call& call, const Meaning& row, const State& state,
                                const Outcome& found, double g, const OfStats& of_stats, i64 number) {
  Gradient gradient;
#if VALUED
  real own_scale = 1;
#if !SOFTCAP
  own_scale = (real)call.exact_scale;
#endif
  const real of_lse = of_stats.lse ? (real)of_stats.lse[number] : (real)0;
  const real of_entropy = of_stats.entropy ? (real)of_stats.entropy[number] : (real)0;
  // The lead may be beyond the largest number where nothing is left for the others.
  const real more = found.softmax == 0 ? (real)0
      : found.softmax * (of_lse + of_entropy * (found.lead - found.entropy));
  const real by_gap = found.softmax * of_entropy;
  gradient.more = more * own_scale;
  gradient.by_gap = by_gap * own_scale;
#endif
  gradient.reference = found.top;
  gradient.factor = found.factor;
  gradient.at_pivot = found.pivot_gradient;
#if SOFTCAP && STATS && LABELS && !VALUED
  gradient.at_pivot *= slope(call, state.label);
#elif SOFTCAP
  gradient.at_pivot *= slope(call, state.pivot);
#else
  g *= call.exact_scale;
#endif
  gradient.scale = (real)g;
  gradient.at_pivot *= gradient.scale;
#if VALUED
  own_scale = slope(call, state.pivot);
  gradient.at_pivot += (of_lse * found.probability + of_entropy * found.entropy_at_pivot) * own_scale;
#endif
#if APART
  gradient.label = row.label == state.pivot_class ? NONE : row.label;
  gradient.at_label = found.label_gradient * (SOFTCAP ? (real)g * slope(call, state.label) : (real)g);
  if (found.label_p != 0)
    gradient.at_label += found.label_p * (more + found.label_gap * by_gap) * slope(call, state.label);
#endif
#if !LABELS || APART
  gradient.pivot = state.pivot_class;
#else
  gradient.pivot = row.label;
#endif
#if TEACHER
  gradient.teacher_top = state.teacher_top;
  gradient.teacher_factor = (real)(call.kept / state.teacher_total);
#endif
  gradient.rule = row.invalid ? 2 : row.counted ? 0 : 1;
  return gradient;
}

// Read a row, or a part of it, into the state that is kept of it.
DEVICE void read_part(const Call& call, const logit* x, const Targets& targets, int part,
                      Place& place) {
  place.state = nothing_read();
  if (place.row.number < 0) return;
  const Meaning meaning = meaning_of(call, targets, place.row.number);
  if (!meaning.counted) return;
  x += place.row.x_at;
#if LABELS
  // Before anything may write over it.
  if (RANKED || (place.seat.member == 0 && part == 0)) {
    const bool here = has_label(call, meaning);
    const real label = here ? (real)Stored<LOGITS>::widen(x[meaning.label * call.x_class]) : (real)0;
#if STATS
    place.state.label = label;
#else
    place.state.pivot = label;
#endif
  }
#endif
  const target* p = targets.given + place.row.t_at;
#if PART && TEACHER
  if (targets.teacher) place.state.teacher_top = (real)targets.teacher[place.row.number];
#endif
  each_class(call, place.seat.member, x, p, part, [&](const auto& taken) {
    absorb(call, meaning.label, targets.weight, taken, place.state);
  });
}

#if DISTANT
DEVICE Distance distance_of(const Meaning& row, const State& state, const Outcome& found) {
  const bool defined = row.counted && found.lse == found.lse;
  const real softmax = defined ? found.softmax : not_a_number();
  return Distance{found.top, softmax, found.probability, found.others, state.pivot_class, 0};
}

// Look at the classes of rows again, whose first threads know the softmax, for the Brier scores.
template <class Places>
DEVICE void look_again(const Call& call, Places& places, const logit* x, const Targets& targets,
                       const Results& results) {
  Place& place = places[threadIdx.x];
  __syncthreads();
  double sum = 0;
  if (place.row.number >= 0) {
    const Distance& row = places[first_of(call, place.seat)].gradient.distance;
    sum = row.softmax - row.softmax;
    const target* p = targets.given + place.row.t_at;
    if (sum == 0)
      each_class(call, place.seat.member, x + place.row.x_at, p, 0,
                 [&](const auto& taken) { add_distance(call, row, taken, sum); });
  }
  place.gradient.distance.sum = sum;
  const int team = (int)call.team, thread = (int)threadIdx.x;
  const int step = call.across ? (int)call.lanes : 1;
  __syncthreads();
  for (int reach = team / 2; reach > 0; reach /= 2) {
    if (place.seat.member < reach)
      place.gradient.distance.sum += places[thread + reach * step].gradient.distance.sum;
    __syncthreads();
  }
  if (place.seat.member == 0 && place.row.number >= 0)
    results.brier[place.row.number] = (real)place.gradient.distance.sum;
}
#endif

DEVICE void write_part(const Call& call, int member, const Row& row, const logit* x,
                       const Targets& targets, int part, const Gradient& gradient, logit* grad) {
  const target* p = targets.given + row.t_at;
  each_class(call, member, x + row.x_at, p, part, [&](const auto& taken) {
    write_gradient(call, gradient, targets.weight, taken, grad + row.g_at);
  });
}

// Most threads that join the parts of one row.
enum { MOST_JOINING = BLOCK < 64 ? BLOCK : 64 };

// How many threads join the parts of one row, a power of two.
DEVICE int joining(const Call& call) {
  int count = 1;
  while (count < call.parts && count < MOST_JOINING) count *= 2;
  return count;
}

// Join the parts of a row that several blocks have read, in pairs, into the place of the first of the
// `count` threads that join them. All threads of the block come here; those without a row bring -1.
template <class Joined>
DEVICE void join_parts(const Call& call, const State* states, i64 row, int seat, int count,
                       Joined& joined) {
  const int thread = (int)threadIdx.x, parts = (int)call.parts;
  if (row >= 0 && seat < parts) {
    joined[thread] = states[row * parts + seat];
    for (int part = seat + count; part < parts; part += count)
      merge(call, joined[thread], states[row * parts + part]);
  }
  __syncthreads();
  for (int reach = count / 2; reach > 0; reach /= 2) {
    if (row >= 0 && seat < reach && seat + reach < parts)
      merge(call, joined[thread], joined[thread + reach]);
    __syncthreads();
  }
}

// Conclude all rows, of which there are few, by one block with places for so many parts.
template <class Joined, class Each>
DEVICE void conclude_all(const Call& call, const Targets& targets, const State* states,
                         const Results& results, int places, Joined& joined, Each& each) {
  const int thread = (int)threadIdx.x, count = joining(call);
  const i64 rows = call.outer * call.inner;
  Sums& mine = each[thread];
  mine = Sums{0, 0};
  for (i64 first = 0; first < rows; first += places / count) {
    const i64 row = first + thread / count;
    const bool joins = thread < places && row < rows;
    join_parts(call, states, joins ? row : -1, thread % count, count, joined);
    if (joins && thread % count == 0)
      conclude(call, meaning_of(call, targets, row), row, joined[thread], results, mine);
  }
  add_up(each);
}
