// Another look at some classes of a row, once all of it is known: distances to the target, and the
// gradient.

#if DISTANT
// What a row's Brier score is made of: softmax and target once more.
struct Distance {
  real reference, softmax;    // nan where there is no score
  real probability, others;  // of the pivot, and of the other classes together
  int pivot;
  double sum;  // of what a thread has looked at
};

template <int U, int W>
DEVICE void add_distance(const Call& call, const Distance& row, const Taken<U, W>& taken, double& sum) {
#pragma unroll
  for (int u = 0; u < U; u++)
#pragma unroll
    for (int w = 0; w < W; w++) {
      if (!taken.has(u)) continue;
      const real t = taken.p[u][w];
      real gap = exp_of(difference(call, taken.x[u][w], row.reference)) * row.softmax - t;
      // What is left of 1 has more digits than a probability near it.
      if (taken.number(u, w) == row.pivot)
        gap = row.others < (real)0.5 ? (1 - t) - row.others : row.probability - t;
      sum += (double)gap * gap;
    }
}
#endif

// Whether a label need not be the pivot of a gradient.
#define APART (VALUED && LABELS && STATS)

// What a row's gradient is made of.
struct Gradient {
  real reference;  // m', or 0 for -inf
  real factor;     // of exp(x - m')
  real at_pivot;
  real scale;      // what all but `at_pivot` is multiplied by
  int pivot;       // its class
  int rule;        // 0: as these say; 1: zeros; 2: nans
#if VALUED
  real more;    // of exp(x - m') for lse and entropy
  real by_gap;  // of exp(x - m') (m' - x) for the entropy
#if APART
  int label;  // NONE where it is the pivot
  real at_label;
#endif
#endif
#if TEACHER
  real teacher_top, teacher_factor;  // of exp(t - top) in the coefficients
#endif
#if DISTANT
  Distance distance;  // looked at before the gradient is written
#endif
};

// The coefficient of a class in the gradient, where the target gives a probability, a teacher's logit
// or what entries add up to.
DEVICE real whole_coefficient(const Call& call, const real* weight, const Gradient& row, real given,
                              int c) {
#if TEACHER
  real r = teacher_exp(call, given, row.teacher_top) * row.teacher_factor;
#if EVEN
  r += call.share;
#endif
  return weight ? r * weight[c] : r;
#elif SPARSE
  return coefficient(call, weight, 0, c) + given;
#else
  return coefficient(call, weight, given, c);
#endif
}

// The gradient of a class other than the pivot.
DEVICE real gradient_of(const Call& call, const real* weight, const Gradient& row, real x,
                        real given, int c) {
  const real gap = difference(call, x, row.reference);
  const real p = exp_of(gap);
#if SPREAD
  // Scaled last: an infinite scale, from a total weight of 0, must not meet itself.
  real grad = (row.factor * p - whole_coefficient(call, weight, row, given, c)) * row.scale;
#else
  real grad = p * (row.factor * row.scale);
#endif
#if VALUED
  if (p != 0) grad += p * (row.more - gap * row.by_gap);
#endif
#if SOFTCAP
  grad *= slope(call, x);
#endif
  return grad;
}

// Put a number in the place of a class, if it is among those of a load.
template <int U, int W>
DEVICE void put(const Taken<U, W>& taken, int u, int c, real number, real (&numbers)[W]) {
  if (!taken.holds(u, c)) return;
#pragma unroll
  for (int w = 0; w < W; w++)
    if (taken.number(u, w) == c) numbers[w] = number;
}

// Write the gradient of classes, where their logits may lie: they were read before.
template <int U, int W>
DEVICE void write_gradient(const Call& call, const Gradient& row, const real* weight,
                           const Taken<U, W>& taken, logit* grad) {
  real result[U][W];
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int w = 0; w < W; w++)
      result[u][w] = gradient_of(call, weight, row, taken.x[u][w], taken.probability(u, w),
                                 taken.number(u, w));
    put(taken, u, row.pivot, row.at_pivot, result[u]);
#if APART
    put(taken, u, row.label, row.at_label, result[u]);
#endif
  }
  if (row.rule) {
#pragma unroll
    for (int u = 0; u < U; u++)
#pragma unroll
      for (int w = 0; w < W; w++) result[u][w] = row.rule == 1 ? (real)0 : not_a_number();
  }
  const i64 apart = WIDTH > 1 ? 1 : call.g_class, step = taken.step * apart;
  logit* place = grad + taken.first * apart;
#pragma unroll
  for (int u = 0; u < U; u++, place += step) {
    if (!taken.has(u)) continue;
    if (W == 1 || call.g_in_step) {
      store<LOGITS>(place, result[u]);
    } else {
#pragma unroll
      for (int w = 0; w < W; w++) place[w] = Stored<LOGITS>::narrow(result[u][w]);
    }
  }
}
