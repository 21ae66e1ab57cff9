// The entries of a sparse target: coefficients at some classes of each row, beside those of all classes.
// The kernels go through the classes as if there were none; what the entries add to the sums and to
// the gradient is put there afterwards.
#pragma once

#include "group.hpp"

namespace polyce::POLYCE_ISA {

template <class T, bool capped>
struct Entries {
    const Group<T>& group;
    const Job& job;
    Lanes<T>& lane;
    // Scratch, of each row: the classes, -1 for those that take no part or lie in another; their logits, which the
    // gradient may overwrite; and their coefficients.
    std::int64_t* classes;
    double* coefficients;
    T* logits;

    explicit Entries(Group<T>& group)
        : group(group), job(group.job), lane(group.lane), classes(reinterpret_cast<std::int64_t*>(group.entries_scratch)),
          coefficients(reinterpret_cast<double*>(classes + group.most_rows * job.entries)),
          logits(reinterpret_cast<T*>(coefficients + group.most_rows * job.entries)) {}

    // Calls f(the row's place in the group, its first number in scratch) for rows that count.
    template <class F>
    void each_row(F f) const {
        for (int i = 0; i < group.rows; ++i) {
            if (group.is_counted(i)) f(i, i * job.entries);
        }
    }

    POLYCE_APART void read() const {
        std::int64_t logits_at[width];
        row_offsets(job, job.logits.row_stride, group.first_row, group.rows, logits_at);
        const T* const probabilities = static_cast<const T*>(job.entry_probabilities);
        const double kept = 1.0 - job.smoothing;
        each_row([&](int i, std::int64_t at) {
            const std::int64_t first = group.number(i) * job.entries;
            for (std::int64_t k = 0; k < job.entries; ++k) {
                const std::int64_t label = label_at(job, first + k);
                const bool ignored = job.has_ignored && label == job.ignored;
                const std::int64_t c = label - job.part.start;
                classes[at + k] = ignored || out_of_range(c, job.classes) ? -1 : c;
                if (classes[at + k] < 0) continue;
                coefficients[at + k] = double(probabilities[first + k]) * kept * (kept == 0.0 ? 1.0 : weight_of(c));
                const char* const row = job.logits.data + logits_at[i];
                widen_run(job.logits.dtype, row + c * job.logits.class_stride, 0, 1, logits + at + k);
            }
        });
    }

    double weight_of(std::int64_t c) const {
        return job.class_weight ? double(weights_of<T>(job)[c]) : 1.0;
    }

    void add_to(const Transform<capped>& transform, int i, std::int64_t at, RowState& s) const {
        for (std::int64_t k = at; k < at + job.entries; ++k) {
            if (classes[k] < 0) continue;
            if (classes[k] == lane.pivot[i]) {
                s.pivot_coefficient += coefficients[k];
            } else {
                const bool is_finite = logits[k] > -infinity<T>;
                count_apart(transform, s, is_finite ? coefficients[k] : together(at, k), double(logits[k]));
            }
        }
    }

    // What the entries of a class add up to, at the first of them, and 0 at the others: an infinite gap
    // times each of two that cancel would be nan.
    POLYCE_APART double together(std::int64_t at, std::int64_t k) const {
        double sum = 0.0;
        for (std::int64_t other = at; other < at + job.entries; ++other) {
            if (classes[other] != classes[k]) continue;
            if (other < k) return 0.0;
            sum += coefficients[other];
        }
        return sum;
    }

    // Whether a class has one entry in a row. Sums of several, in their order, wait for one another.
    bool is_single(std::int64_t at, std::int64_t c) const {
        const std::int64_t *const own = classes + at, count = job.entries;
        std::int64_t found = 0;
        POLYCE_SIMD_SUM(found)
        for (std::int64_t k = 0; k < count; ++k) found += own[k] == c ? 1 : 0;
        return found == 1;
    }

    // Writes the entries' places in the gradient of a row; the pivot's has been written.
    void write(
        const Transform<capped>& transform, int i, std::int64_t at, const RowState& s, const RowGradient& g,
        const StatsGradient& more, char* grad
    ) const {
        const double share = smoothing_share(job);
        for (std::int64_t k = at; k < at + job.entries; ++k) {
            const std::int64_t c = classes[k];
            if (c < 0 || c == lane.pivot[i]) continue;
            double r = share == 0.0 ? 0.0 : share * weight_of(c);
            if (is_single(at, c)) {
                r += coefficients[k];
            } else {
                for (std::int64_t other = at; other < at + job.entries; ++other) r += classes[other] == c ? coefficients[other] : 0.0;
            }
            const T entry = T(LabelApart{true, double(logits[k]), r}.gradient(transform, s, g, lane.factor[i], more));
            narrow_run(job.grad.dtype, &entry, 1, grad + c * job.grad.class_stride, job.grad.class_stride);
        }
    }
};

}  // namespace polyce::POLYCE_ISA
