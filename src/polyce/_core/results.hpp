// From the sums of a group of rows to their losses, what their gradients are made of, and their
// statistics: the row formula of row.hpp, side by side.
#pragma once

#include "entries.hpp"

namespace polyce::POLYCE_ISA {

template <class T, bool capped>
struct Results {
    Group<T>& group;
    const Job& job;
    Lanes<T>& lane;
    Transform<capped> transform;
    Entries<T, capped> entries;
    bool spread;  // classes besides the pivot have coefficients
    bool at_top;  // the pivot is the class of the largest logit
    bool apart;   // though there are labels, which may be other classes
    bool plain;   // none of these, nor z_loss or a sparse target
    bool valued;  // the gradient is also that of lse or entropy
    bool multiplies;  // the gradient's entries are multiples of the exponentials
    bool squares;     // the exponentials' squares are summed, for a label's Brier score
    bool distances;   // the rows are looked at again, for that of probabilities

    explicit Results(Group<T>& group)
        : group(group), job(group.job), lane(group.lane), transform{job.scale, job.cap}, entries(group),
          spread(has_coefficients(job)), at_top(pivots_on_largest(job)), apart(at_top && group.by_labels),
          plain(!spread && !apart && !job.sparse && job.z_loss == 0.0),
          valued(job.grad.data && (job.grad_lse || job.grad_entropy)),
          multiplies(!spread && !capped && !job.grad_entropy), squares(needs_squares(job)),
          distances(job.stats.brier && !group.by_labels) {}

    // Whether the sums of coefficients and the entropy's are looked at.
    bool needs_all_sums() const { return !plain || valued || job.stats.valid || job.saved || job.part.rows; }

    void begin_sums() const {
        group.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.rest_max[i] = -infinity<T>;
            lane.pivot_logit[i] = T(0);
            lane.rest_sum[i] = lane.pivot_coefficient[i] = 0.0;
            lane.first[i] = 0;
        });
        if (sizeof(T) == 8) group.each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.lost_sum[i] = 0.0; });
        if (!needs_all_sums()) return;
        group.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.rest_coefficient[i] = lane.rest_excess[i] = lane.rest_entropy[i] = 0.0;
            lane.lost_coefficient[i] = lane.lost_excess[i] = lane.lost_entropy[i] = 0.0;
        });
        if (!job.stats.brier && !job.stats.rank && !squares) return;
        group.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.squares[i] = lane.lost_squares[i] = lane.pivot_target[i] = 0.0;
            lane.rank[i] = 0;
        });
    }

    // Adds what the labels or entries themselves contribute.
    void end_sums() const {
        if (job.sparse) {
            add_entries();
        } else if (apart) {
            add_labels();
        } else if (group.by_labels) {
            const double each = label_coefficient(job, 1.0);
            group.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.pivot_coefficient[i] = lane.label_weight[i] * each;
            });
        }
    }

    void add_labels() const {
        for (int i = 0; i < group.rows; ++i) {
            if (lane.label[i] == lane.pivot[i]) {
                lane.pivot_coefficient[i] = label_coefficient(job, lane.label_weight[i]);
            } else if (!out_of_range(lane.label[i], job.classes)) {
                RowState s = state(i);
                count_label(job, transform, s, lane.label_weight[i], double(lane.label_logit[i]));
                lane.rest_coefficient[i] = s.rest_coefficient, lane.rest_excess[i] = s.rest_excess;
            }
        }
    }

    // Their logits are in the caches now.
    POLYCE_APART void add_entries() const {
        entries.read();
        entries.each_row([&](int i, std::int64_t at) {
            RowState s = state(i);
            entries.add_to(transform, i, at, s);
            lane.pivot_coefficient[i] = s.pivot_coefficient;
            if (is_saved(i)) return;
            lane.rest_coefficient[i] = s.rest_coefficient, lane.rest_excess[i] = s.rest_excess;
        });
    }

    // Of a part of the classes: the sums of each row, where it counts. Without the pivot, which lies in
    // another part then, there is none of its numbers.
    POLYCE_APART double write_part() const {
        for (int i = 0; i < group.rows; ++i) {
            const RowState s = group.is_counted(i) ? state(i) : RowState{-infinity<double>, 0, 0, 0, 0, 0, 0};
            const bool here = group.is_counted(i) && !out_of_range(lane.pivot[i], job.classes);
            double* place = job.part.rows + group.number(i);
            const auto put = [&](double value) {
                *place = value;
                place += job.rows;
            };
            put(s.rest_max), put(s.rest_sum);
            put(here ? s.pivot_logit : at_top ? -infinity<double> : 0.0), put(here ? s.pivot_coefficient : 0.0);
            put(s.rest_coefficient), put(s.rest_excess), put(s.rest_entropy);
            put(double(job.part.start + lane.first[i])), put(squares && group.is_counted(i) ? lane.squares[i] : 0.0);
            put(double(job.part.start + lane.pivot[i])), put(apart ? double(lane.label_logit[i]) : 0.0);
        }
        return 0.0;
    }

    POLYCE_APART double write_teachers() const {
        for (int i = 0; i < group.rows; ++i) {
            // Without a class of any probability there is no exponential either.
            const double sum = lane.teacher_sum[i];
            double* const place = job.part.rows + group.number(i);
            place[0] = sum == 0.0 ? -infinity<double> : double(lane.teacher_top[i]);
            place[job.rows] = sum;
        }
        return 0.0;
    }

    // Of whole rows: what their parts have joined to, for the gradient of one of them.
    POLYCE_APART void take_whole() const {
        begin_sums();
        for (int i = 0; i < group.rows; ++i) {
            const double* const row = job.part.rows + group.number(i);
            const auto found = [&](Part::Number number) { return row[number * job.rows]; };
            lane.rest_max[i] = T(found(Part::rest_max)), lane.rest_sum[i] = found(Part::rest_sum);
            lane.pivot_logit[i] = T(found(Part::pivot_logit)), lane.pivot_coefficient[i] = found(Part::pivot_coefficient);
            lane.rest_coefficient[i] = found(Part::rest_coefficient), lane.rest_entropy[i] = found(Part::rest_entropy);
            if (at_top) lane.pivot[i] = std::int64_t(found(Part::pivot)) - job.part.start;
        }
        if (job.sparse) entries.read();
    }

    // Whether a row's sums are what a forward pass has left of it, and not of its logits.
    bool is_saved(int i) const {
        if (!has_saved(job)) return false;
        const double sum = job.saved[group.number(i)].rest_sum;
        return sum == sum;
    }

    POLYCE_INLINE RowState state(int i) const {
        return {double(lane.rest_max[i]), lane.rest_sum[i], double(lane.pivot_logit[i]), lane.pivot_coefficient[i],
                lane.rest_coefficient[i], lane.rest_excess[i], lane.rest_entropy[i]};
    }

    // The losses. Where the pivots alone have coefficients, also what the gradients are made of.
    template <bool with_gradient, bool only_pivots>
    POLYCE_APART void finish() const {
        static_assert(only_pivots || !with_gradient, "compilers do not vectorise all of it in one loop");
        const double own_scale = capped ? 1.0 : job.scale, z_loss = job.z_loss;
        const Transform<capped> transform = this->transform;
        group.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            RowState s = state(i);
            if (only_pivots) s.rest_coefficient = s.rest_excess = 0.0;
            const RowScalars found = scalars(transform, s, sizeof(T) == 8);
            const double penalty = only_pivots || z_loss == 0.0 ? 0.0 : z_loss * lane.label_weight[i];
            const double lse = only_pivots ? 0.0 : log_sum_exp(transform, s, found);
            const double loss = row_loss(s, found, penalty, lse);
            lane.loss[i] = lane.counted[i] == 0.0 ? 0.0 : lane.weight[i] * loss;
            if constexpr (with_gradient) {
                const RowGradient g = row_gradient(s, found, penalty, lse, false, sizeof(T) == 8);
                const double factor = lane.factor[i], at_pivot = g.at_pivot * factor;
                if (!capped) lane.once[i] = T(factor * own_scale * g.softmax);
                if (capped) {
                    lane.softmax[i] = T(g.softmax);
                    lane.last[i] = T(factor * own_scale);
                }
                lane.at_pivot[i] = T(lane.counted[i] == 0.0 ? 0.0 : at_pivot * slope(transform, s.pivot_logit));
            }
        });
    }

    void finish() const {
        if (plain && job.grad.data && !valued) return finish<true, true>();
        plain ? finish<false, true>() : finish<false, false>();
        if (job.grad.data) valued ? finish_gradient<true>() : finish_gradient<false>();
    }

    // What the gradient is made of. With cotangents of lse or entropy, entry c is
    // (exp(t)·softmax - r_c)·last + exp(t)·more + exp(t)·(-t)·by_gap, times the slope of a softcap.
    template <bool of_stats>
    void finish_gradient() const {
        const double own_scale = capped ? 1.0 : job.scale, z_loss = job.z_loss;
        const Transform<capped> transform = this->transform;
        const bool at_top = this->at_top;
        group.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const RowState s = state(i);
            const RowScalars found = scalars(transform, s, sizeof(T) == 8);
            const double penalty = z_loss == 0.0 ? 0.0 : z_loss * lane.label_weight[i];
            const RowGradient g = row_gradient(s, found, penalty, log_sum_exp(transform, s, found), at_top, sizeof(T) == 8);
            StatsGradient more;
            if constexpr (of_stats) more = stats_gradient(s, found, lane.grad_lse[i], lane.grad_entropy[i]);
            const double factor = lane.factor[i], at_pivot = g.at_pivot * factor + more.at_pivot;
            lane.once[i] = T(of_stats ? (g.softmax * factor + more.softmax) * own_scale : factor * own_scale * g.softmax);
            lane.softmax[i] = T(g.softmax);
            if constexpr (of_stats) lane.more[i] = T(more.softmax * own_scale), lane.by_gap[i] = T(more.by_gap * own_scale);
            lane.last[i] = T(factor * own_scale);
            lane.at_pivot[i] = T(lane.counted[i] == 0.0 ? 0.0 : at_pivot * slope(transform, s.pivot_logit));
        });
        if (!of_stats || spread || capped) return;
        // One factor of the exponentials, as nothing is subtracted from them.
        group.each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.softmax[i] = lane.last[i] = T(0);
            lane.more[i] = lane.once[i];
        });
    }

    // Calls f with what single entries of a row's gradient are made of.
    template <class F>
    decltype(auto) with_gradient_of(int i, F f) const {
        const RowState s = state(i);
        const RowScalars found = scalars(transform, s, sizeof(T) == 8);
        const double penalty = penalty_of(job, lane.label_weight[i]);
        const RowGradient g = row_gradient(s, found, penalty, log_sum_exp(transform, s, found), true, sizeof(T) == 8);
        StatsGradient more;
        if (valued) more = stats_gradient(s, found, lane.grad_lse[i], lane.grad_entropy[i]);
        return f(s, g, more);
    }

    // What the label's entry of the gradient is, where the label is not the pivot.
    T at_label(int i, T entry) const {
        if (lane.label[i] == lane.pivot[i] || !group.is_counted(i)) return entry;
        return with_gradient_of(i, [&](const RowState& s, const RowGradient& g, const StatsGradient& more) {
            return T(label_apart(i).gradient(transform, s, g, lane.factor[i], more));
        });
    }

    // Writes the gradient at the entries' classes over what the kernels have written there.
    POLYCE_APART void write_entries() const {
        std::int64_t grad_at[width];
        row_offsets(job, job.grad.row_stride, group.first_row, group.rows, grad_at);
        entries.each_row([&](int i, std::int64_t at) {
            with_gradient_of(i, [&](const RowState& s, const RowGradient& g, const StatsGradient& more) {
                entries.write(transform, i, at, s, g, more, job.grad.data + grad_at[i]);
            });
        });
    }

    LabelApart label_apart(int i) const {
        return {apart && lane.label[i] != lane.pivot[i], double(lane.label_logit[i]),
                label_coefficient(job, lane.label_weight[i])};
    }

    void save_rows() const {
        for (int i = 0; i < group.rows; ++i) {
            const LabelApart label = apart ? label_apart(i) : LabelApart{};
            job.saved[group.number(i)] = saved_row(transform, state(i), label, lane.pivot[i]);
            if (!job.teacher || !group.is_counted(i)) continue;
            saved_teachers(job)[group.number(i)] = {double(lane.teacher_top[i]), lane.teacher_sum[i]};
        }
    }

    // What is asked for of each row, and the sum of the losses.
    double write() const {
        if (job.stats.valid) write_stats();
        if (job.losses) {
            const int size = size_of(job.result_dtype);
            char* const losses = static_cast<char*>(job.losses);
            if (job.in_order) {
                narrow_run(job.result_dtype, lane.loss, group.rows, losses + group.first_row * size, size);
            } else {
                for (int i = 0; i < group.rows; ++i) {
                    narrow_run(job.result_dtype, lane.loss + i, 1, losses + lane.number[i] * size, size);
                }
            }
        }
        double sums[step] = {};
        for (int start = 0; start < group.used; start += step) {
            POLYCE_SIMD
            for (int i = 0; i < step; ++i) sums[i] += lane.loss[start + i];
        }
        for (int half = step / 2; half; half /= 2) {
            for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
        }
        return sums[0];
    }

    void write_stats() const {
        const bool beside_target = job.stats.top_probability || job.stats.brier || job.stats.rank;
        std::int64_t probabilities[width] = {};
        const char* const data = job.probabilities.data;
        if (data) row_offsets(job, job.probabilities.row_stride, group.first_row, group.rows, probabilities);
        for (int i = 0; i < group.rows; ++i) {
            const std::int64_t row = group.number(i);
            const char* p = data ? data + probabilities[i] : nullptr;
            const RowTarget target = read_target<T>(job, row);
            store_stats<T>(job, transform, row, target, state(i), lane.pivot[i], lane.first[i], p);
            if (beside_target) store_beside_target(i, row, target);
        }
    }

    POLYCE_APART void store_beside_target(int i, std::int64_t row, const RowTarget& target) const {
        const Stats& stats = job.stats;
        const RowState s = state(i);
        const RowScalars r = scalars(transform, s, job.wide);
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const bool defined = target.counted && job.classes && r.excess == r.excess, labelled = defined && !target.invalid;
        if (stats.top_probability) {
            static_cast<T*>(stats.top_probability)[row] = T(defined ? 1.0 / (1.0 + r.excess) : nan);
        }
        if (stats.brier) static_cast<T*>(stats.brier)[row] = T(labelled ? brier(i, s, r) : nan);
        if (stats.rank) stats.rank[row] = labelled ? lane.rank[i] : -1;
    }

    // As in rowstate.py and rowstats.py.
    double brier(int i, const RowState& s, const RowScalars& r) const {
        const RowSoftmax p = row_softmax(s, r);
        if (distances) {
            const double t = lane.pivot_target[i], gap = p.share < 0.5 ? (1.0 - t) - p.share : p.at_pivot - t;
            return lane.squares[i] + gap * gap;
        }
        const double others = lane.squares[i] * p.factor * p.factor;
        if (!apart || lane.label[i] == lane.pivot[i]) return p.share * p.share + others;
        const double reference = s.rest_max == -infinity<double> ? 0.0 : s.rest_max;
        const double label = exp_negative_full(difference(transform, double(lane.label_logit[i]), reference)) * p.factor;
        return (1.0 - label) * (1.0 - label) + p.at_pivot * p.at_pivot + (others - label * label);
    }
};

}  // namespace polyce::POLYCE_ISA
