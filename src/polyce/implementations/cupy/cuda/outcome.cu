// From the state of a whole row to its loss, its stats and what its gradient is made of.

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
#if LABELS
  real label_p;  // exp(x - m') of the label, and m' - x; where it is not the pivot
  real label_gap;
  real label_gradient;
#endif
#endif
};

// `weight` is that of the label's class; 1 for probabilities.
DEVICE Outcome finish(const Call& call, const State& state, real weight, int label) {
#if TEACHER && !PART
  // nan for a teacher without a softmax.
  const double unit = call.kept / state.teacher_total;
  double others_r = state.rest * unit;
  double all_excess = state.excess * unit;
  double pivot_r = state.pivot_r * unit;
#if EVEN
  others_r += state.even * call.share;
  all_excess += state.even_excess * call.share;
  pivot_r += (double)state.pivot_even * call.share;
#endif
  const real excess = (real)all_excess;
#elif SPREAD
  double others_r = state.rest;
  const real excess = (real)state.excess;
#elif LARGEST
  double others_r = 0;
  const real excess = 0;
#endif
#if TEACHER && !PART
  const real at_pivot = (real)pivot_r;
#elif !LABELS
  const real at_pivot = state.pivot_r;
#else
  const real at_label = weight * (call.kept + call.share);
#if LARGEST
  // The label is one of the other classes, unless it is the likeliest.
  const bool leads = label == state.pivot_class;
#if PART
  // Of the parts that have joined, the label's has counted it in.
  const real at_pivot = state.pivot_r, added = 0;
#else
  const real at_pivot = leads ? at_label : state.pivot_r;
  const real added = leads || call.kept == 0 ? (real)0 : weight * call.kept;
#endif
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
#if VALUED && STATS
  found.lead = gap_ahead + h;
  found.entropy_at_pivot =
      probability * ((gap_behind + h) * others - ((real)(found.factor * state.entropy) + lacking));
#elif VALUED
  // The gradient of the entropy is not asked for.
  found.lead = 0;
  found.entropy_at_pivot = 0;
#endif
#if BESIDE
  found.top_probability = 1 / (1 + e);
#endif
#if RANKED
  const double squares = state.squares * found.factor * found.factor;
  found.brier = (real)((double)others * others + squares);
#endif
  found.top = reference_of(state.top);
#if STATS && LABELS
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
