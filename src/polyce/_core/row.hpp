// The row formula in a row's few numbers: what rowstate.py specifies, in double for all dtypes.
//
//     δ = m' - x_k,  E = d' exp(δ) or d' - 1 + exp(-δ),  h = log1p(E)
//     loss = q' + R' max(-δ, 0) + r_k max(δ, 0) + (R' + r_k) h + λ lse²
#pragma once

#include "arithmetic.hpp"

namespace polyce::POLYCE_ISA {

POLYCE_INLINE double magnitude(double value) { return value < 0.0 ? -value : value; }

// logit_scale and logit_softcap. Differences of two transformed logits are taken by a form in
// which nothing cancels: see transform.py.
template <bool capped>
struct Transform {
    double scale, cap;
};

// exp(-2|u|), from which the slope of a softcap follows, for u = scale·logit/cap.
template <class T>
POLYCE_INLINE T decay_of(T logit, T twice_over_cap) {
    const T twice = logit * twice_over_cap;
    return exp_negative(twice < T(0) ? twice : -twice);
}

template <class T>
POLYCE_INLINE T slope_of(T e, T scale) {
    return T(4) * scale * e / ((T(1) + e) * (T(1) + e));
}

// x(a) - x(b) under a softcap; `decay_b` is decay_of(b).
template <class T>
POLYCE_INLINE T capped_gap(T a, T b, T decay_b, T scale, T cap) {
    const T p = decay_of(a, T(2) * scale / cap);
    const T share = (a < T(0)) == (b < T(0)) ? p + decay_b : T(1) + p * decay_b;
    const T factor = share * (T(2) * cap) / ((T(1) + p) * (T(1) + decay_b));
    const T gap = a - b;
    const bool masked = a == -infinity<T> || b == -infinity<T>;
    return masked ? gap : factor * tanh(gap * (scale / cap));
}

template <bool capped>
POLYCE_INLINE double difference(const Transform<capped>& x, double a, double b) {
    if (!capped) return (a - b) * x.scale;
    return capped_gap(a, b, decay_of(b, 2.0 * x.scale / x.cap), x.scale, x.cap);
}

template <bool capped>
POLYCE_INLINE double transformed(const Transform<capped>& x, double logit) {
    if (!capped) return logit * x.scale;
    return logit == -infinity<double> ? logit : x.cap * tanh(logit * (x.scale / x.cap));
}

template <bool capped>
POLYCE_INLINE double slope(const Transform<capped>& x, double logit) {
    return capped ? slope_of(decay_of(logit, 2.0 * x.scale / x.cap), x.scale) : x.scale;
}

// What rounding took from scale·(a - b), for float64 logits.
template <bool capped>
POLYCE_INLINE double difference_error(const Transform<capped>& x, double a, double b) {
    if (capped) return 0.0;
    const double gap = a - b;
    const double lost = lost_by_product(gap, x.scale, gap * x.scale);
    const double error = lost + lost_by_difference(a, b, gap) * x.scale;
    return error - error == 0.0 ? error : 0.0;
}

// exp(x(a) - x(b)) for a <= b or nan.
template <bool capped>
POLYCE_INLINE double exp_between(const Transform<capped>& x, double a, double b, bool wide) {
    const double e = exp_negative_full(difference(x, a, b));
    return wide ? e + e * difference_error(x, a, b) : e;
}

// exp(t) for t <= 0 or nan, and log1p(x) for finite x >= 0 or nan, to about 2^-33: what is rounded
// to float32 afterwards does not show the difference to the full forms, which take twice as long.
// The terms of their series go by pairs, so that few wait for one another.
POLYCE_INLINE double exp_negative_brief(double t) {
    const auto [f, z, n] = reduce_exponent(bounded(t));
    const double f2 = f * f;
    const double p4 = fma(f, 0x1.9f08965704834p-13, 0x1.6d8d06db40dd1p-10);
    const double p2 = fma(f, 0x1.111270b2ef63fp-7, 0x1.55548dc490106p-5);
    const double p0 = fma(f, 0x1.555554433c104p-3, 0x1.0000003a237abp-1);
    const double p = fma(f2, fma(f2, p4, p2), p0);
    return (1.0 + fma(f2, p, f)) * power_of_two(z);
}

POLYCE_INLINE double log1p_positive_brief(double x) {
    constexpr std::uint64_t below_sqrt = 0x3ff0000000000000u - 0x3fe6a09e667f3bcdu;
    constexpr std::uint64_t mantissa = 0x000fffffffffffffu;
    const std::uint64_t raised = bits<std::uint64_t>(1.0 + x) + below_sqrt;
    const double k = bits<double>((raised >> 52) | 0x4330000000000000u) - (0x1p52 + 1023.0);
    const double reduced = bits<double>((raised & mantissa) + 0x3fe6a09e667f3bcdu) - 1.0;
    // Where k is not 0, what rounding took from 1 + x is too little to matter.
    const double f = k == 0.0 ? x : reduced;
    const double f2 = f * f, f4 = f2 * f2;
    const double p8 = fma(f2, -0x1.eb0a324eeea6fp-5, fma(f, 0x1.b760c4d7fa22fp-4, -0x1.bd4176f3f501cp-4));
    const double p6 = fma(f, 0x1.c36c89e3394afp-4, -0x1.fc6c0141df778p-4);
    const double p4 = fma(f, 0x1.2492333d4af6bp-3, -0x1.556886ff7c3cap-3);
    const double p2 = fma(f, 0x1.999a1b10b2478p-3, -0x1.ffffacf0d69adp-3);
    const double p0 = fma(f, 0x1.5555546d4c8d8p-2, -0x1.0000001868e80p-1);
    const double p = fma(f4, fma(f4, p8, fma(f2, p6, p4)), fma(f2, p2, p0));
    return fma(k, 0x1.62e42fefa39efp-1, fma(f2, p, f)) + (x - x);
}

// What a class adds to the sums, of its coefficient and its gap x_c - m', which may be infinite. Of a
// gap that is nan the exponential is too, and with it the row.
inline constexpr auto excess_of = [](auto r, auto gap) POLYCE_INLINE_LAMBDA {
    using V = decltype(gap);
    return r == V{} ? V{} : r * -gap;
};
// Of its exponential too. Beyond the bound there is none, and an infinite gap would leave a nan.
inline constexpr auto weighted_gap = [](auto e, auto gap) POLYCE_INLINE_LAMBDA { return -bounded(gap) * e; };

// A part of a row: sums over the classes besides the pivot, as in rowstate.py.
struct RowState {
    double rest_max, rest_sum, pivot_logit;
    double pivot_coefficient, rest_coefficient, rest_excess, rest_entropy;
    double rest_squares = 0;
};

// What a row's loss and gradient follow from.
struct RowScalars {
    bool below;
    double behind, opposite, decay, excess, h;
};

template <bool capped>
POLYCE_INLINE RowScalars scalars(const Transform<capped>& x, const RowState& s, bool wide) {
    double delta = difference(x, s.rest_max, s.pivot_logit);
    const bool below = delta <= 0.0;
    const double away = below ? delta : -delta;
    double decay = wide ? exp_negative_full(away) : exp_negative_brief(away);
    if (wide) {
        const double error = difference_error(x, s.rest_max, s.pivot_logit);
        decay = decay + decay * (below ? error : -error);
    }
    // A pivot at +inf has no softmax.
    const double nothing = s.pivot_logit - s.pivot_logit;
    const double excess = below ? s.rest_sum * decay + nothing : (s.rest_sum - 1.0) + decay;
    return {below, below ? 0.0 : delta, -delta, decay, excess,
            wide ? log1p_positive(excess) : log1p_positive_brief(excess)};
}

template <bool capped>
POLYCE_INLINE double log_sum_exp(const Transform<capped>& x, const RowState& s, const RowScalars& r) {
    return transformed(x, r.below ? s.pivot_logit : s.rest_max) + r.h;
}

// Products with a coefficient that is 0 are selected: the other factor may be infinite. The excess
// is nan where an infinite coefficient has met a gap of 0: the rest is enough then.
POLYCE_INLINE double row_loss(const RowState& s, const RowScalars& r, double penalty, double lse) {
    const double behind = s.pivot_coefficient == 0.0 ? 0.0 : r.behind;
    const double ahead = r.below && s.rest_coefficient != 0.0 ? r.opposite : 0.0;
    const double excess = s.rest_excess == s.rest_excess ? s.rest_excess : 0.0;
    const double loss = s.pivot_coefficient * (behind + r.h) + (excess + s.rest_coefficient * (ahead + r.h));
    return penalty == 0.0 ? loss : loss + penalty * lse * lse;
}

// What the gradient of a row needs: entry c is (exp(x_c - m')·softmax - r_c)·scale, the pivot's
// entry is at_pivot·scale.
struct RowGradient {
    double softmax, at_pivot;
};

// `at_top`: the pivot is the class of the largest logit. With p its probability its entry is
// R' - R·(1 - p), and R·p - r_k as well, which is torch's where these are infinite. Of the two, the
// one with the smaller terms keeps its digits: for a label always the first.
POLYCE_INLINE RowGradient row_gradient(
    const RowState& s, const RowScalars& r, double penalty, double lse, bool at_top, bool wide
) {
    const double whole = 1.0 + r.excess;
    // One division less, where the last digit of a double does not show.
    const double inverse = wide ? 0.0 : 1.0 / whole;
    const auto share = [&](double e) POLYCE_INLINE_LAMBDA { return wide ? e / whole : e * inverse; };
    const double factor = share(r.below ? r.decay : 1.0);
    const double at_pivot_probability = share(r.below ? 1.0 : r.decay);
    const double total = s.pivot_coefficient + s.rest_coefficient;
    const double near = total * at_pivot_probability, away = total * (s.rest_sum * factor);
    const double near_size = magnitude(near) + magnitude(s.pivot_coefficient);
    const double away_size = magnitude(away) + magnitude(s.rest_coefficient);
    // Without a branch, which would keep compilers from doing many rows at once.
    const bool is_larger = (at_top & (near_size > away_size)) | (!at_top & (magnitude(total) < infinity<double>));
    double at_pivot = is_larger ? s.rest_coefficient - away : near - s.pivot_coefficient;
    const double pull = penalty == 0.0 ? 0.0 : 2.0 * penalty * lse;
    at_pivot = penalty == 0.0 ? at_pivot : at_pivot + pull * at_pivot_probability;
    return {(total + pull) * factor, at_pivot};
}

// The softmax of a row: that of class c is exp(x_c - m')·factor, that of the pivot at_pivot, and what
// it lacks to 1 the share of the others.
struct RowSoftmax {
    double factor, at_pivot, share;
};

POLYCE_INLINE RowSoftmax row_softmax(const RowState& s, const RowScalars& r) {
    const double whole = 1.0 + r.excess;
    const double factor = (r.below ? r.decay : 1.0) / whole;
    return {factor, (r.below ? 1.0 : r.decay) / whole, s.rest_sum * factor};
}

// The entropy's two parts, Σ softmax_c (lse - x_c) over the other classes and that of the pivot, and
// what they are made of.
struct RowEntropy {
    double factor, at_pivot, share, base, pivot_gap, others;

    double sum() const { return others + at_pivot * pivot_gap; }
};

POLYCE_INLINE RowEntropy row_entropy(const RowState& s, const RowScalars& r) {
    const auto [factor, at_pivot, share] = row_softmax(s, r);
    // The lead may be beyond the largest number where nothing is left for the others.
    const double base = (r.below && share != 0.0 ? r.opposite : 0.0) + r.h;
    const double pivot_gap = (at_pivot == 0.0 ? 0.0 : r.behind) + r.h;
    const double others = factor * s.rest_entropy + (share == 0.0 ? 0.0 : share * base);
    return {factor, at_pivot, share, base, pivot_gap, others};
}

// What the cotangents of lse and entropy add: to entry c
// (exp(x_c - m')·softmax + exp(x_c - m')·(m' - x_c)·by_gap)·scale, to the pivot's at_pivot·scale.
struct StatsGradient {
    double softmax = 0, by_gap = 0, at_pivot = 0;
};

POLYCE_INLINE StatsGradient stats_gradient(
    const RowState& s, const RowScalars& r, double grad_lse, double grad_entropy
) {
    const RowEntropy e = row_entropy(s, r);
    // The gap to lse of class c is base + (m' - x_c).
    const double softmax = e.factor * (grad_lse + grad_entropy * (e.base - e.sum()));
    const double at_pivot = e.at_pivot * (grad_lse + grad_entropy * (e.pivot_gap * e.share - e.others));
    return {softmax, e.factor * grad_entropy, at_pivot};
}

}  // namespace polyce::POLYCE_ISA
