// What both orders of reading, along.hpp and across.hpp, do for each row: its place in memory, what
// its target means, and what becomes of its sums. The meaning of a target is that of targets.py.
#pragma once

#include <algorithm>

#include "formats.hpp"
#include "job.hpp"
#include "row.hpp"

namespace polyce::POLYCE_ISA {

// Rows are gone through in groups of at most so many.
constexpr int width = 128;

// Byte offsets of `count` rows from `first` on, at most `width`, in C order of the row axes. Computed
// for the last two axes at once, as the last one may be short.
POLYCE_APART inline void row_offsets(
    const Job& job, const std::int64_t* strides, std::int64_t first, int count, std::int64_t* offsets
) {
    offsets[0] = 0;
    if (job.axes == 0) return;
    std::int64_t index[max_axes], offset = 0, left = first;
    for (int a = job.axes - 1; a >= 0; --a) {
        index[a] = left % job.axis_size[a];
        left /= job.axis_size[a];
        offset += index[a] * strides[a];
    }
    const int last = job.axes - 1, outer = last - 1;
    const std::int64_t size = job.axis_size[last], step = strides[last];
    const std::int64_t carry = last ? strides[outer] - size * step : 0;
    // With n < 2 width and size < width the quotient n / size is n·inverse / 2^16.
    const std::int64_t inverse = (0x10000 + size - 1) / size;
    for (int i = 0;;) {
        const std::int64_t begun = index[last], left_of_outer = last ? job.axis_size[outer] - index[outer] : 1;
        const int run = int(std::min<std::int64_t>(count - i, left_of_outer * size - begun));
        POLYCE_SIMD
        for (int k = 0; k < run; ++k) {
            const std::int64_t n = begun + k;
            const std::int64_t carries = size < width ? n * inverse >> 16 : n >= size;
            offsets[i + k] = offset + k * step + carries * carry;
        }
        i += run;
        if (i == count) return;
        offset += run * step + left_of_outer * carry;
        index[last] = 0;
        index[outer] = job.axis_size[outer];
        for (int a = outer; a > 0 && index[a] == job.axis_size[a]; --a) {
            offset += strides[a - 1] - index[a] * strides[a];
            index[a] = 0;
            ++index[a - 1];
        }
    }
}

// A label as a signed number. Of uint64 the upper half turns negative, which no class is.
POLYCE_INLINE std::int64_t label_at(const Job& job, std::int64_t row) {
    return with_type(job.label_dtype, [&](auto type) {
        const char* labels = static_cast<const char*>(job.labels);
        return std::int64_t(fetch<decltype(type)>(labels + row * std::int64_t(sizeof type)));
    });
}

POLYCE_INLINE bool out_of_range(std::int64_t label, std::int64_t classes) {
    return std::uint64_t(label) >= std::uint64_t(classes);
}

// The place of the first of some labels that is out of range and not ignored, or -1.
inline std::int64_t first_bad_label(const Job& job, std::int64_t first, std::int64_t count) {
    for (std::int64_t at = first; at < first + count; ++at) {
        const std::int64_t label = label_at(job, at);
        const bool ignored = job.has_ignored && label == job.ignored;
        if (!ignored && out_of_range(label, all_classes(job))) return at;
    }
    return -1;
}

// What the target says of a row before its logits are looked at.
struct RowTarget {
    std::int64_t label;   // always in range; 0 for rows without one
    bool counted, invalid;
    double weight;        // what multiplies loss and gradient; nan for a bad label
    double label_weight;  // w_y, 1 without class weights
};

template <class T>
POLYCE_INLINE RowTarget read_target(const Job& job, std::int64_t row) {
    RowTarget target{0, true, false, 1.0, 1.0};
    if (job.sample_weight) {
        target.weight = job.sample_weight[row];
        target.counted = target.weight != 0.0;
    }
    if (job.sparse) {
        target.invalid = target.counted && first_bad_label(job, row * job.entries, job.entries) >= 0;
        if (target.invalid) target.weight = std::numeric_limits<double>::quiet_NaN();
    }
    if (!has_labels(job)) return target;
    const std::int64_t label = label_at(job, row);
    if (job.has_ignored && label == job.ignored) {
        target.counted = false;
    } else if (out_of_range(label, all_classes(job))) {
        target.invalid = target.counted;
        if (target.invalid) target.weight = std::numeric_limits<double>::quiet_NaN();
    } else {
        target.label = label;
        if (job.class_weight) target.label_weight = static_cast<const T*>(job.class_weight)[label];
    }
    return target;
}

// The coefficient of every class that a label gives by smoothing, per unit of class weight.
POLYCE_INLINE double smoothing_share(const Job& job) {
    const std::int64_t classes = all_classes(job);
    return job.smoothing / double(classes > 0 ? classes : 1);
}

POLYCE_INLINE double label_coefficient(const Job& job, double label_weight) {
    return label_weight * (1.0 - job.smoothing + smoothing_share(job));
}

// Whether classes besides the pivot have coefficients.
POLYCE_INLINE bool has_coefficients(const Job& job) {
    return job.probabilities.data || job.smoothing != 0.0;
}

// Turns a run of probabilities (ignored for labels) into coefficients; `weights` are the class
// weights of the same classes, `step` apart, or null.
template <class T>
POLYCE_INLINE T coefficient(const Job& job, T probability, T weight, T kept, T share) {
    const T even = job.probabilities.data ? probability * kept + share : share;
    return even * weight;
}

// The class weights from the first class on that is here, or null.
template <class T>
POLYCE_INLINE const T* weights_of(const Job& job) {
    const T* const weights = static_cast<const T*>(job.class_weight);
    return weights ? weights + job.part.start : nullptr;
}

// Whether rows are summed for their entropy: it is asked for, or has a cotangent.
POLYCE_INLINE bool needs_entropy(const Job& job) {
    return job.stats.entropy || job.grad_entropy || job.part.needs_entropy;
}

// Whether the first class with the largest logit is looked for.
POLYCE_INLINE bool needs_first(const Job& job) {
    return job.stats.prediction || job.stats.correct || job.part.needs_first;
}

// Whether the exponentials' squares are summed, for a label's Brier score.
POLYCE_INLINE bool needs_squares(const Job& job) {
    return (job.stats.brier && has_labels(job)) || job.part.needs_squares;
}

// Whether the class of the largest logit is the pivot. It is where there are no labels, and wherever
// the entropy is needed: with another class as pivot the sum over the rest holds the largest's 1, in
// which the digits of the others are lost.
POLYCE_INLINE bool pivots_on_largest(const Job& job) {
    return !has_labels(job) || needs_entropy(job);
}

// A label that is not the pivot is one of the other classes, with a coefficient of its own beside
// what smoothing gives it.
struct LabelApart {
    bool exists = false;
    double logit = 0, coefficient = 0;

    // The label's entry of the gradient.
    template <bool capped>
    double gradient(
        const Transform<capped>& x, const RowState& s, const RowGradient& g, double factor, const StatsGradient& more
    ) const {
        const double gap = difference(x, logit, s.rest_max == -infinity<double> ? 0.0 : s.rest_max);
        const double e = exp_negative_full(gap);
        const double entry = (e * g.softmax - coefficient) * factor;
        return (entry + (e * more.softmax + weighted_gap(e, gap) * more.by_gap)) * slope(x, logit);
    }
};

// Adds a coefficient of a class besides the pivot to the sums.
template <bool capped>
POLYCE_INLINE void count_apart(const Transform<capped>& x, RowState& s, double coefficient, double logit) {
    const double gap = difference(x, s.rest_max == -infinity<double> ? 0.0 : s.rest_max, logit);
    s.rest_coefficient += coefficient;
    if (coefficient != 0.0) s.rest_excess += coefficient * gap;
}

// Adds the label's own coefficient to the sums.
template <bool capped>
POLYCE_INLINE void count_label(
    const Job& job, const Transform<capped>& x, RowState& s, double label_weight, double logit
) {
    count_apart(x, s, job.smoothing == 1.0 ? 0.0 : label_weight * (1.0 - job.smoothing), logit);
}

// What a backward pass reads, which knows the label but of no entropy: the state with the label as
// the pivot.
template <bool capped>
POLYCE_INLINE SavedRow saved_row(
    const Transform<capped>& x, const RowState& s, const LabelApart& apart, std::int64_t pivot
) {
    if (!apart.exists) return {s.rest_max, s.rest_sum, s.rest_coefficient, double(pivot)};
    const double below = exp_negative_full(difference(x, s.rest_max, s.pivot_logit));
    const double label = exp_negative_full(difference(x, apart.logit, s.pivot_logit));
    const double others = (s.rest_sum == 0.0 ? 0.0 : s.rest_sum * below) - label;
    const double coefficient = s.rest_coefficient + s.pivot_coefficient - apart.coefficient;
    return {s.pivot_logit, 1.0 + (others > 0.0 ? others : 0.0), coefficient, double(pivot)};
}

POLYCE_INLINE double penalty_of(const Job& job, double label_weight) {
    return job.z_loss == 0.0 ? 0.0 : job.z_loss * label_weight;
}

// The first largest probability.
template <class T>
std::int64_t likeliest(const Job& job, const char* probabilities) {
    const Matrix& p = job.probabilities;
    std::int64_t best = 0;
    T top = -infinity<T>;
    for (std::int64_t c = 0; c < job.classes; ++c) {
        T value;
        widen_run(p.dtype, probabilities + c * p.class_stride, 0, 1, &value);
        // As argmax has it: a nan is the largest of all.
        if (value != value) return c;
        if (value > top) top = value, best = c;
    }
    return best;
}

// A teacher's likeliest class, -1 where it has no softmax.
template <class T>
POLYCE_APART std::int64_t likeliest_of_teacher(const Job& job, const char* teacher) {
    const Matrix& t = job.probabilities;
    std::int64_t best = -1;
    T top = -infinity<T>;
    for (std::int64_t c = 0; c < job.classes; ++c) {
        T value;
        widen_run(t.dtype, teacher + c * t.class_stride, 0, 1, &value);
        if (!(value < infinity<T>)) return -1;
        if (value > top) top = value, best = c;
    }
    return best;
}

// The likeliest class of a sparse target, -1 where none has a probability above 0. Entries of one
// class add up.
template <class T>
POLYCE_APART std::int64_t likeliest_entry(const Job& job, std::int64_t row) {
    const T* const p = static_cast<const T*>(job.entry_probabilities) + row * job.entries;
    const std::int64_t first = row * job.entries;
    std::int64_t best = -1;
    T most = 0;
    for (std::int64_t k = 0; k < job.entries; ++k) {
        const std::int64_t label = label_at(job, first + k);
        if (job.has_ignored && label == job.ignored) continue;
        T sum = 0;
        for (std::int64_t other = 0; other < job.entries; ++other) {
            if (label_at(job, first + other) == label) sum += p[other];
        }
        if (sum > most || (sum == most && label < best)) most = sum, best = label;
    }
    return best;
}

// The class that `correct` compares the prediction with.
template <class T>
std::int64_t preferred(const Job& job, std::int64_t row, const RowTarget& target, const char* probabilities) {
    if (job.sparse) return likeliest_entry<T>(job, row);
    if (!probabilities) return target.label;
    return job.teacher ? likeliest_of_teacher<T>(job, probabilities) : likeliest<T>(job, probabilities);
}

template <class T, bool capped>
void store_stats(
    const Job& job, const Transform<capped>& x, std::int64_t row, const RowTarget& target,
    const RowState& state, std::int64_t pivot, std::int64_t rest_first, const char* probabilities
) {
    const Stats& stats = job.stats;
    const RowScalars r = scalars(x, state, job.wide);
    const double lse = job.classes ? log_sum_exp(x, state, r) : std::numeric_limits<double>::quiet_NaN();
    const bool defined = target.counted && lse == lse;
    if (stats.valid) stats.valid[row] = target.counted;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (stats.lse) static_cast<T*>(stats.lse)[row] = T(target.counted ? lse : nan);
    if (stats.entropy) {
        static_cast<T*>(stats.entropy)[row] = T(target.counted && job.classes ? row_entropy(state, r).sum() : nan);
    }
    const bool leads = state.pivot_logit > state.rest_max ||
                       (state.pivot_logit == state.rest_max && pivot < rest_first);
    const std::int64_t prediction = leads ? pivot : rest_first;
    if (stats.prediction) stats.prediction[row] = defined ? prediction : -1;
    if (stats.correct) {
        stats.correct[row] =
            defined && !target.invalid && prediction == preferred<T>(job, row, target, probabilities);
    }
}

}  // namespace polyce::POLYCE_ISA
