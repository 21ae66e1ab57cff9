// The entries of a sparse target: coefficients at some classes of each row, beside those of all.
//
// Threads go through the classes as if there were none. What the entries add to the sums, and to the
// gradient, they put there afterwards, again together.

#if SPARSE
struct Entries {
  const real* probability;  // `count` of each row, as there are classes
  i64 count;
  real* logits;  // null, or where those of the entries are kept for the gradient that covers them
};

// What is said of an entry: its class, -1 if it takes no part, and its coefficient.
struct Entry {
  int number;
  bool bad;
  real r;
};

DEVICE Entry entry_at(const Call& call, const Targets& targets, const Entries& entries, i64 place) {
  const i64 given = (i64)targets.given[place];
  const bool ignored = call.ignores && given == call.ignore_index;
  Entry found = {-1, !ignored && (given < 0 || given >= all_classes(call)), 0};
  if (ignored || found.bad) return found;
#if PART
  if (given < call.start || given >= call.start + call.classes) return found;
#endif
  found.number = (int)(given - first_class(call));
  found.r = entries.probability[place] * call.kept;
  // Nothing times an infinite weight is nothing.
  if (targets.weight && call.kept != 0) found.r *= targets.weight[found.number];
  return found;
}

// What entries of one class add up to, from `first` on.
template <class Of>
DEVICE real sum_of_class(const Call& call, const Targets& targets, const Entries& entries, i64 first,
                         int number, Of of) {
  real sum = 0;
  for (i64 k = 0; k < entries.count; k++) {
    const Entry other = entry_at(call, targets, entries, first + k);
    if (other.number == number) sum += of(other, first + k);
  }
  return sum;
}

// Add the entries of each row to the state that its threads have joined.
template <class Places>
DEVICE void join_entries(const Call& call, const Targets& targets, const Entries& entries,
                         const logit* x, Places& places) {
  const int team = (int)call.team, thread = (int)threadIdx.x;
  Place& place = places[thread];
  const State& whole = places[first_of(call, place.seat)].state;
  State own = nothing_read();
  const bool counted = place.row.number >= 0 && meaning_of(call, targets, place.row.number).counted;
  const i64 first = place.row.number * entries.count;
  for (i64 k = place.seat.member; counted && k < entries.count; k += team) {
    const Entry entry = entry_at(call, targets, entries, first + k);
    if (entry.bad) own.bad = 1;
    if (entry.number < 0) continue;
    const real logit_here = (real)Stored<LOGITS>::widen(x[place.row.x_at + entry.number * call.x_class]);
    if (entries.logits) entries.logits[first + k] = logit_here;
#if STATS
    const real together = sum_of_class(call, targets, entries, first, entry.number,
                                       [&](const Entry&, i64 at) { return entries.probability[at]; });
    choose_likeliest(own, together, entry.number);
#endif
    if (entry.number == whole.pivot_class) {
      own.pivot_r += entry.r;
      continue;
    }
    const Gap gap = exact_gap(call, reference_of(whole.top), logit_here);
    own.rest += (double)entry.r;
    if (entry.r != 0) own.excess += (double)entry.r * gap.delta + (double)entry.r * gap.error;
  }
  if (team > 1) __syncthreads();
  State& kept = place.state;
  if (place.seat.member) {
    kept = own;
  } else {
    kept.rest += own.rest;
    kept.excess += own.excess;
    kept.pivot_r += own.pivot_r;
    kept.bad |= own.bad;
#if STATS
    choose_likeliest(kept, own.likeliest, own.likeliest_class);
#endif
  }
  // From a thread to the next one of its row.
  const int step = call.across ? (int)call.lanes : 1;
  if (team > 1) __syncthreads();
  for (int reach = team / 2; reach > 0; reach /= 2) {
    if (place.seat.member < reach) {
      const State& other = places[thread + reach * step].state;
      kept.rest += other.rest;
      kept.excess += other.excess;
      kept.pivot_r += other.pivot_r;
      kept.bad |= other.bad;
#if STATS
      choose_likeliest(kept, other.likeliest, other.likeliest_class);
#endif
    }
    __syncthreads();
  }
}

// Write the gradient at the entries' classes, over what is written there without them.
DEVICE void write_entries(const Call& call, const Targets& targets, const Entries& entries,
                          const Place& place, const Gradient& gradient, const logit* x, logit* grad) {
  if (gradient.rule) return;
  const i64 first = place.row.number * entries.count;
  for (i64 k = place.seat.member; k < entries.count; k += call.team) {
    const Entry entry = entry_at(call, targets, entries, first + k);
    if (entry.number < 0 || entry.number == gradient.pivot) continue;
    const real r = sum_of_class(call, targets, entries, first, entry.number,
                                [](const Entry& other, i64) { return other.r; });
#if PART
    // The gradient lies apart.
    const real logit_here = (real)Stored<LOGITS>::widen(x[place.row.x_at + entry.number * call.x_class]);
#else
    const real logit_here = entries.logits[first + k];
#endif
    const real found = gradient_of(call, targets.weight, gradient, logit_here, r, entry.number);
    grad[place.row.g_at + entry.number * call.g_class] = Stored<LOGITS>::narrow(found);
  }
}
#endif
