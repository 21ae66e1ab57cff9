// Rows whose classes lie in several arrays, each read and written by itself: what
// `polyce.formula.parts` does. What is known of the rows lies in an array of which
// `polyce.implementations.part_rows` says the order: of each number those of all rows.

#if PART
enum {
  REST_MAX, REST_SUM, PIVOT_LOGIT, PIVOT_COEFFICIENT, REST_COEFFICIENT, REST_EXCESS, REST_ENTROPY,
  REST_FIRST, REST_SQUARES, PIVOT, LABEL_LOGIT
};
// Of a teacher's rows.
enum { TOP, TOTAL };

// Write what a part of a row adds to it.
DEVICE void write_state(const Call& call, const Targets& targets, const Meaning& row, i64 number,
                        const State& state, double* rows) {
  const i64 count = call.outer * call.inner;
  rows += number;
#if TEACHER
  if (!targets.teacher) {
    rows[TOP * count] = state.teacher_top;
    rows[TOTAL * count] = state.teacher_total;
    return;
  }
#endif
  double rest = 0, excess = 0;
#if SPREAD
  rest = state.rest;
  excess = state.excess;
#endif
#if LARGEST
  double pivot_r = state.pivot_r;
  const int pivot = state.pivot_class == NONE ? 0 : state.pivot_class;
#endif
#if TEACHER
  const double unit = call.kept / targets.teacher[TOTAL * count + number];
  rest *= unit;
  excess *= unit;
  pivot_r *= unit;
#endif
#if EVEN
  rest += state.even * call.share;
  excess += state.even_excess * call.share;
  pivot_r += (double)state.pivot_even * call.share;
#endif
#if LABELS
  const bool here = row.counted && has_label(call, row);
#if LARGEST
  const double added = here && call.kept != 0 ? (double)row.weight * call.kept : 0;
  if (row.label == pivot) {
    pivot_r += added;
  } else if (added != 0) {
    const Gap gap = exact_gap(call, reference_of(state.top), state.label);
    rest += added;
    excess += added * gap.delta + added * gap.error;
  }
  rows[LABEL_LOGIT * count] = here ? state.label : (real)0;
#else
  const double pivot_r = here ? row.weight * (call.kept + call.share) : (real)0;
#endif
#endif
  rows[REST_MAX * count] = state.top;
  rows[REST_SUM * count] = state.total;
  rows[PIVOT_COEFFICIENT * count] = pivot_r;
  rows[REST_COEFFICIENT * count] = rest;
  rows[REST_EXCESS * count] = excess;
#if STATS
  rows[REST_ENTROPY * count] = state.entropy;
#endif
#if LARGEST
  rows[PIVOT_LOGIT * count] = state.pivot;
  // No other class comes before the pivot with as large a logit; which comes next nobody asks.
  rows[REST_FIRST * count] = (double)(call.start + call.classes);
  rows[PIVOT * count] = (double)(call.start + pivot);
#else
  rows[PIVOT_LOGIT * count] = here ? state.pivot : (real)0;
#if FIRST
  rows[REST_FIRST * count] = (double)(call.start + state.first);
#endif
#endif
#if RANKED
  rows[REST_SQUARES * count] = state.squares;
#endif
}

// The state of a whole row, whose coefficients are all in it; a label's logit is that of this part.
DEVICE State whole_state(const Call& call, const Targets& targets, i64 number, const double* rows,
                         const logit* label) {
  const i64 count = call.outer * call.inner;
  State state = nothing_read();
  rows += number;
  state.top = (real)rows[REST_MAX * count];
  state.total = rows[REST_SUM * count];
  state.pivot = (real)rows[PIVOT_LOGIT * count];
#if SPREAD
  state.rest = rows[REST_COEFFICIENT * count];
  state.excess = rows[REST_EXCESS * count];
#endif
#if LARGEST
  state.pivot_r = (part_r)rows[PIVOT_COEFFICIENT * count];
  state.pivot_class = (int)((i64)rows[PIVOT * count] - call.start);
#endif
#if STATS
  state.entropy = rows[REST_ENTROPY * count];
#endif
#if STATS && LABELS
  if (label) state.label = (real)Stored<LOGITS>::widen(*label);
#endif
#if TEACHER
  state.teacher_top = (real)targets.teacher[TOP * count + number];
  state.teacher_total = targets.teacher[TOTAL * count + number];
#endif
  return state;
}
#endif

#if KERNEL == STATE_OF_PART
// Read a part of the classes of each row; of a teacher alone where nothing is known of its rows.
KERNEL_OF_BLOCKS
state_of_part(const Call call, const logit* x, const target* given, const real* weight,
              const void* sample, const double* teacher, double* rows, const real* probability,
              i64 entries) {
  SHARED(Place, places, BLOCK);
  const Targets targets = {given, weight ? weight + call.start : weight, sample, teacher};
  Place& place = places[threadIdx.x];
  place.seat = seat(call);
  for (place.group = blockIdx.x; place.group < groups_of(call); place.group += gridDim.x) {
    find_row(call, place);
    read_part(call, x, targets, 0, place);
    join_team(call, places);
#if SPARSE
    join_entries(call, targets, Entries{probability, entries, 0}, x, places);
#endif
    if (place.seat.member || place.row.number < 0) continue;
    const i64 number = place.row.number;
    write_state(call, targets, meaning_of(call, targets, number), number, place.state, rows);
  }
}
#endif

#if KERNEL == GRADIENT_OF_PART
// Write the gradient of a part of the classes, from what all parts of each row have joined to.
KERNEL_OF_BLOCKS
gradient_of_part(const Call call, const logit* x, const target* given, const real* weight,
                 const void* sample, const double* teacher, const double* rows,
                 const void* cotangent, double cotangent_number, logit* grad,
                 const real* probability, i64 entries, const double* of_lse,
                 const double* of_entropy) {
  SHARED(Place, places, BLOCK);
  const Targets targets = {given, weight ? weight + call.start : weight, sample, teacher};
  Place& place = places[threadIdx.x];
  place.seat = seat(call);
  for (place.group = blockIdx.x; place.group < groups_of(call); place.group += gridDim.x) {
    find_row(call, place);
    const i64 number = place.row.number;
    if (place.seat.member == 0 && number >= 0) {
      Meaning meaning = meaning_of(call, targets, number);
#if SPARSE
      const Entries all = {probability, entries, 0};
      for (i64 k = 0; k < entries; k++)
        if (entry_at(call, targets, all, number * entries + k).bad) meaning.invalid = meaning.counted;
#endif
      const bool here = has_label(call, meaning);
      const logit* label = here ? x + place.row.x_at + meaning.label * call.x_class : 0;
      const State state = whole_state(call, targets, number, rows, label);
      const Outcome found = finish(call, state, meaning.weight, meaning.label);
      const double g = cotangent_of(call, cotangent, cotangent_number, number) * meaning.sample;
      place.gradient = gradient_of_row(call, meaning, state, found, g, OfStats{of_lse, of_entropy},
                                       number);
    }
    __syncthreads();
    const Gradient& gradient = places[first_of(call, place.seat)].gradient;
    if (number >= 0) write_part(call, place.seat.member, place.row, x, targets, 0, gradient, grad);
#if SPARSE
    // Behind what all the row's threads write there.
    __syncthreads();
    if (number >= 0)
      write_entries(call, targets, Entries{probability, entries, 0}, place, gradient, x, grad);
#endif
    // The next row's gradient takes the place of what others may still read.
    __syncthreads();
  }
}
#endif
