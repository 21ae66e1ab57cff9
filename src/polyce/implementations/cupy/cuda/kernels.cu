// The kernels. A block takes groups of rows, one after another; the threads of a row share its
// classes and join what they have read. Sums are added in an order that depends on nothing but the
// sizes of grid and block, so that they are the same bits again.

// So many threads or more are to share a multiprocessor, which leaves each 64 registers, or 128. What
// is rarely asked for takes more, and so does a teacher beside the logits.
#if REAL == FLOAT64 && (TEACHER || (SOFTCAP && (BESIDE || VALUED)))
#define THREADS 256
#elif REAL == FLOAT64 || TEACHER
#define THREADS 512
#elif BESIDE || SPARSE
#define THREADS 768
#else
#define THREADS 1024
#endif
#define KERNEL_OF_BLOCKS \
  extern "C" __global__ void __launch_bounds__(BLOCK, BLOCK < THREADS ? THREADS / BLOCK : 1)

#if KERNEL == FORWARD
// Read rows once. A grid with a second dimension splits them, and leaves states to be joined.
KERNEL_OF_BLOCKS
forward(const Call call, const logit* x, const target* given, const real* weight,
        const void* sample, State* states, Sums* sums, void* loss, real* lse, real* entropy,
        i64* prediction, unsigned char* correct, unsigned char* valid, real* top_probability,
        real* brier, i64* rank, const real* probability, i64 entries, real* entry_logits) {
  SHARED(Place, places, BLOCK);
  SHARED(Sums, each, BLOCK);
  const Targets targets = {given, weight, sample};
  const Results results = {loss, lse, entropy, prediction, correct, valid, top_probability,
                           brier, rank};
  Place& place = places[threadIdx.x];
  place.seat = seat(call);
  const int part = (int)blockIdx.y;
  Sums& mine = each[threadIdx.x];
  mine = Sums{0, 0};
  for (place.group = blockIdx.x; place.group < groups_of(call); place.group += gridDim.x) {
    find_row(call, place);
    read_part(call, x, targets, part, place);
    join_team(call, places);
#if SPARSE
    join_entries(call, targets, Entries{probability, entries, entry_logits}, x, places);
#endif
#if DISTANT
    if (place.seat.member == 0 && place.row.number >= 0) {
      const Meaning meaning = meaning_of(call, targets, place.row.number);
      const Outcome found = conclude(call, meaning, place.row.number, place.state, results, mine);
      place.gradient.distance = distance_of(meaning, place.state, found);
    }
    if (results.brier) look_again(call, places, x, targets, results);
    continue;
#endif
    if (place.seat.member || place.row.number < 0) continue;
    const i64 number = place.row.number;
    if (call.parts > 1) {
      states[number * call.parts + part] = place.state;
    } else {
      conclude(call, meaning_of(call, targets, number, place.state), number, place.state, results,
               mine);
    }
  }
  if (!sums) return;
  add_up(each);
  if (threadIdx.x == 0) sums[blockIdx.x] = mine;
}
#endif

#if KERNEL == JOIN
// Join the parts of rows that `forward` has split, and reduce their losses; one block.
KERNEL_OF_BLOCKS
join(const Call call, const target* given, const real* weight, const void* sample,
     const State* states, const void* normalizer, double number, void* result, void* loss,
     real* lse, real* entropy, i64* prediction, unsigned char* correct, unsigned char* valid,
     real* top_probability, real* brier, i64* rank) {
  SHARED(Sums, each, BLOCK);
  SHARED(State, joined, BLOCK);
  const Targets targets = {given, weight, sample};
  const Results results = {loss, lse, entropy, prediction, correct, valid, top_probability,
                           brier, rank};
  conclude_all(call, targets, states, results, BLOCK, joined, each);
  if (result) store_loss(call, Divisor{normalizer, number}, each[0], result);
}
#endif

#if KERNEL == REDUCE
// Reduce the losses that the blocks of `forward` have added up; one block.
KERNEL_OF_BLOCKS
reduce(const Call call, const Sums* sums, i64 count, const void* normalizer, double number,
       void* result) {
  SHARED(Sums, each, BLOCK);
  add_up(each, sums, count);
  store_loss(call, Divisor{normalizer, number}, each[0], result);
}
#endif

#if KERNEL == WEIGH
// Add up the rows' weights, which a gradient of the mean is divided by, and start a count.
KERNEL_OF_BLOCKS
weigh(const Call call, const target* given, const real* weight, const void* sample, Sums* sums,
      unsigned* finished) {
  SHARED(Sums, each, BLOCK);
  const Targets targets = {given, weight, sample};
  const i64 step = (i64)gridDim.x * BLOCK;
  double mine = 0;
  for (i64 i = (i64)blockIdx.x * BLOCK + threadIdx.x; i < call.outer * call.inner; i += step)
    mine += weight_of(meaning_of(call, targets, i));
  each[threadIdx.x] = Sums{0, mine};
  add_up(each);
  if (threadIdx.x) return;
  sums[blockIdx.x] = each[0];
  if (blockIdx.x == 0) *finished = 0;
}
#endif

#if KERNEL == FORWARD_BACKWARD
// Read rows once from memory, once more from a cache, and write their gradient. The block that
// finishes last reduces the losses.
KERNEL_OF_BLOCKS
forward_backward(const Call call, const logit* x, const target* given, const real* weight,
                 const void* sample, const void* cotangent, double cotangent_number,
                 const void* normalizer, double number, const Sums* weights, unsigned* finished,
                 Sums* sums, void* result, logit* grad, void* loss, real* lse, real* entropy,
                 i64* prediction, unsigned char* correct, unsigned char* valid,
                 real* top_probability, real* brier, i64* rank, const real* probability,
                 i64 entries, real* entry_logits, const double* of_lse,
                 const double* of_entropy) {
  SHARED(Place, places, BLOCK);
  SHARED(Sums, each, BLOCK);
  SHARED(double, divides, 1);
  SHARED(unsigned, finished_before, 1);
  const Targets targets = {given, weight, sample};
  const Results results = {loss, lse, entropy, prediction, correct, valid, top_probability,
                           brier, rank};
  const Divisor divisor = {normalizer, number};
  const OfStats of_stats = {of_lse, of_entropy};
  Place& place = places[threadIdx.x];
  place.seat = seat(call);
  if (call.mean == BY_WEIGHTS) add_up(each, weights, call.weighed);
  if (threadIdx.x == 0) divides[0] = denominator(call, divisor, each[0].weight);
  __syncthreads();
  Sums& mine = each[threadIdx.x];
  mine = Sums{0, 0};
  for (place.group = blockIdx.x; place.group < groups_of(call); place.group += gridDim.x) {
    find_row(call, place);
    read_part(call, x, targets, 0, place);
    join_team(call, places);
#if SPARSE
    join_entries(call, targets, Entries{probability, entries, entry_logits}, x, places);
#endif
    if (place.seat.member == 0 && place.row.number >= 0) {
      const i64 row = place.row.number;
      const Meaning meaning = meaning_of(call, targets, row, place.state);
      const Outcome found = conclude(call, meaning, row, place.state, results, mine);
      const double g = cotangent_of(call, cotangent, cotangent_number, row) * meaning.sample;
#if DISTANT
      const Distance distance = distance_of(meaning, place.state, found);
#endif
      place.gradient = gradient_of_row(call, meaning, place.state, found,
                                       call.mean ? g / divides[0] : g, of_stats, row);
#if DISTANT
      place.gradient.distance = distance;
#endif
    }
#if DISTANT
    if (results.brier) look_again(call, places, x, targets, results);
#endif
    // What it keeps apart as well: all of a row is read before any of it is written.
    __syncthreads();
    if (place.row.number >= 0) {
      const Gradient& gradient = places[first_of(call, place.seat)].gradient;
      write_part(call, place.seat.member, place.row, x, targets, 0, gradient, grad);
    }
#if SPARSE
    // Behind what all the row's threads write there.
    __syncthreads();
    if (place.row.number >= 0) {
      const Gradient& gradient = places[first_of(call, place.seat)].gradient;
      write_entries(call, targets, Entries{probability, entries, entry_logits}, place, gradient, x, grad);
    }
#endif
    // The next row's state takes the place of what others may still read.
    __syncthreads();
  }
  if (!sums) return;
  add_up(each);
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = mine;
    __threadfence();
    finished_before[0] = atomicAdd(finished, 1u);
    __threadfence();
  }
  __syncthreads();
  if (finished_before[0] != gridDim.x - 1) return;
  add_up(each, sums, gridDim.x);
  store_loss(call, divisor, each[0], result);
}
#endif

#if KERNEL == BACKWARD
// Write the gradient of rows that `forward` has split, a part by each block; no block reads a logit
// that another may have written over. Behind the last row stands the block that writes the loss.
KERNEL_OF_BLOCKS
backward(const Call call, const logit* x, const target* given, const real* weight,
         const void* sample, const void* cotangent, double cotangent_number,
         const void* normalizer, double number, const State* states, void* result, logit* grad,
         void* loss, real* lse, real* entropy, i64* prediction, unsigned char* correct,
         unsigned char* valid, real* top_probability, real* brier, i64* rank,
         const double* of_lse, const double* of_entropy) {
  SHARED(Sums, each, BLOCK);
  SHARED(State, joined, MOST_JOINING);
  SHARED(Gradient, gradient, 1);
  const Targets targets = {given, weight, sample};
  const Divisor divisor = {normalizer, number};
  const i64 rows = call.outer * call.inner;
  if (blockIdx.x == rows) {
    if (blockIdx.y) return;
    const Results results = {loss, lse, entropy, prediction, correct, valid, top_probability,
                           brier, rank};
    conclude_all(call, targets, states, results, MOST_JOINING, joined, each);
    if (result) store_loss(call, divisor, each[0], result);
    return;
  }
  Sums& mine = each[threadIdx.x];
  mine = Sums{0, 0};
  if (call.mean == BY_WEIGHTS)
    for (i64 i = threadIdx.x; i < rows; i += BLOCK)
      mine.weight += weight_of(meaning_of(call, targets, i));
  add_up(each);
  const Row row = row_of(call, blockIdx.x / call.inner, blockIdx.x % call.inner);
  const int thread = (int)threadIdx.x;
  join_parts(call, states, thread < MOST_JOINING ? row.number : -1, thread, joining(call), joined);
  if (thread == 0) {
    const double divides = denominator(call, divisor, mine.weight);
    const Meaning meaning = meaning_of(call, targets, row.number);
    const State& state = joined[0];
    const Results nowhere = {};
    const Outcome found = conclude(call, meaning, row.number, state, nowhere, mine);
    const double g = cotangent_of(call, cotangent, cotangent_number, row.number) * meaning.sample;
    gradient[0] = gradient_of_row(call, meaning, state, found, call.mean ? g / divides : g,
                                  OfStats{of_lse, of_entropy}, row.number);
  }
  __syncthreads();
  write_part(call, thread, row, x, targets, (int)blockIdx.y, gradient[0], grad);
}
#endif
