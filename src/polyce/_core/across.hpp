// Many rows side by side, vectorised across them: for few classes, or where rows lie closer
// together than classes do.
//
// A tile of 128 rows is brought, some classes at a time, into scratch memory in which a class's
// row lies together; the rows' few numbers are computed side by side as well. All loops over rows
// take 16 at a time, which makes whole registers of them for every instruction set.
#pragma once

#include "few.hpp"
#include "results.hpp"
#include "teacher.hpp"

namespace polyce::POLYCE_ISA {

template <class T, bool capped>
struct Across : Pivots<T> {
    using Tile<T>::job, Tile<T>::lane, Tile<T>::logits, Tile<T>::gaps, Tile<T>::coefficients;
    using Tile<T>::first_row, Tile<T>::rows, Tile<T>::used, Tile<T>::by_labels;
    using Tile<T>::each_lane, Tile<T>::fill, Tile<T>::empty, Tile<T>::add, Tile<T>::pitch;
    using Pivots<T>::each_chunk, Pivots<T>::each_label, Pivots<T>::each_pivot, Pivots<T>::find_pivots;

    Results<T, capped> results;
    T scale, cap, twice_over_cap, share, kept;

    Across(const Job& job, char* scratch)
        : Pivots<T>(job, scratch), results(*this), scale(T(job.scale)), cap(T(job.cap)),
          twice_over_cap(T(capped ? 2.0 * job.scale / job.cap : 0.0)),
          share(T(smoothing_share(job))), kept(T(1.0 - job.smoothing)) {
        // What is needed once can give way to what is made of it, and stays in the first cache so.
        if (!needs_gaps()) gaps = logits;
    }

    void fill_coefficients(std::int64_t start, int count) const {
        if (job.teacher) {
            fill_softmax(start, count);
        } else if (job.probabilities.data) {
            fill(job.probabilities, start, count, coefficients);
        }
        const T* weights = weights_of<T>(job);
        const T kept = this->kept, share = this->share;
        for (int c = 0; c < count; ++c) {
            const T weight = weights ? weights[start + c] : T(1);
            T* r = coefficients + c * pitch;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { r[i] = coefficient(job, r[i], weight, kept, share); });
        }
    }

    // Turns a teacher's logits in the tile into exponentials, by their largest logits m.
    POLYCE_APART void teach(int count, const T (&m)[width]) const {
        const TeacherScale<T> scale(job);
        const auto write = [&](auto scaled) {
            for (int c = 0; c < count; ++c) {
                T* r = coefficients + c * pitch;
                each_lane([&](int i) POLYCE_INLINE_LAMBDA { r[i] = exp_of_difference<scaled>(r[i], m[i], scale.high, scale.low); });
            }
        };
        scale.is_one() ? write(std::false_type{}) : write(std::true_type{});
    }

    // The teacher's probabilities of some classes. If these are all, the exponentials are there still.
    POLYCE_APART void fill_softmax(std::int64_t start, int count) const {
        if (job.classes > chunk || job.part.teacher) {
            fill(job.probabilities, start, count, coefficients);
            teach(count, lane.teacher_top);
        }
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.found[i] = T(1.0 / lane.teacher_sum[i]); });
        for (int c = 0; c < count; ++c) {
            T* r = coefficients + c * pitch;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { r[i] = r[i] * lane.found[i]; });
        }
    }

    // Finds what turns each row's teacher into probabilities.
    POLYCE_APART void read_teachers() {
        alignas(64) double lost[width];
        alignas(64) T before[width];
        const T* const t = coefficients;
        const Transform<false> transform{job.teacher_scale, 0};
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.teacher_top[i] = -infinity<T>;
            lane.teacher_sum[i] = lost[i] = 0.0;
        });
        each_chunk([&](std::int64_t start, int count) {
            fill(job.probabilities, start, count, coefficients);
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { before[i] = lane.teacher_top[i]; });
            for (int c = 0; c < count; ++c) {
                const T* row = t + c * pitch;
                each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                    lane.teacher_top[i] = row[i] > lane.teacher_top[i] ? row[i] : lane.teacher_top[i];
                });
            }
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                const double total = lane.teacher_sum[i];
                const double decay = exp_between(transform, double(before[i]), double(lane.teacher_top[i]), sizeof(T) == 8);
                lost[i] = total == 0.0 ? 0.0 : lost[i] * decay;
                lane.teacher_sum[i] = total == 0.0 ? 0.0 : total * decay;
            });
            refer_to(lane.teacher_top);
            teach(count, lane.m);
            add(count, lane.teacher_sum, lost, [&](int, int at) POLYCE_INLINE_LAMBDA { return load(t + at); });
        });
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.teacher_top[i] = lane.teacher_top[i] == -infinity<T> ? T(0) : lane.teacher_top[i];
            lane.teacher_sum[i] += lost[i];
        });
    }

    // Carries the sums over to a maximum that the classes in the tile have raised.
    void raise_to_top() {
        const Transform<capped> transform = results.transform;
        if (results.squares) raise_squares();
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const double before = double(lane.rest_max[i]), found = double(lane.top[i]);
            const double top = found > before ? found : before;
            const double reference = top == -infinity<double> ? 0.0 : top;
            const double own = before == -infinity<double> ? 0.0 : before;
            const double decay = exp_negative_full(difference(transform, before, reference));
            const double risen = difference(transform, reference, own);
            const double sum = lane.rest_sum[i], r = lane.rest_coefficient[i];
            const double entropy = (lane.rest_entropy[i] + sum * risen) * decay;
            lane.rest_entropy[i] = sum == 0.0 ? lane.rest_entropy[i] : entropy;
            lane.rest_sum[i] = sum == 0.0 ? 0.0 : sum * decay;
            lane.rest_excess[i] = lane.rest_excess[i] + (r == 0.0 ? 0.0 : r * risen);
            if constexpr (sizeof(T) == 8) {
                const double lost = lane.lost_sum[i];
                lane.lost_entropy[i] = sum == 0.0 ? 0.0 : (lane.lost_entropy[i] + lost * risen) * decay;
                lane.lost_sum[i] = sum == 0.0 ? 0.0 : lost * decay;
            }
            lane.top[i] = T(top);
        });
    }

    POLYCE_APART void raise_squares() const {
        const Transform<capped> transform = results.transform;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const double before = double(lane.rest_max[i]), found = double(lane.top[i]);
            const double top = found > before ? found : before;
            const double decay = exp_negative_full(difference(transform, before, top == -infinity<double> ? 0.0 : top));
            lane.squares[i] = lane.rest_sum[i] == 0.0 ? 0.0 : lane.squares[i] * (decay * decay);
            lane.lost_squares[i] = lane.rest_sum[i] == 0.0 ? 0.0 : lane.lost_squares[i] * (decay * decay);
        });
    }

    void refer_to(const T (&logits)[width]) {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.m[i] = logits[i] == -infinity<T> ? T(0) : logits[i];
        });
        if constexpr (capped) {
            const T twice_over_cap = this->twice_over_cap;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.decay[i] = decay_of(lane.m[i], twice_over_cap); });
        }
    }

    // x(logit) - x(m), from `logits` into `gaps`.
    void read_gaps(int count) const {
        const T scale = this->scale, cap = this->cap;
        for (int c = 0; c < count; ++c) {
            const T* x = logits + c * pitch;
            T* t = gaps + c * pitch;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { t[i] = gap_of(x[i], lane.m[i], lane.decay[i], scale, cap); });
        }
    }

    static POLYCE_INLINE T gap_of(T x, T m, T decay, T scale, T cap) {
        return capped ? capped_gap(x, m, decay, scale, cap) : (x - m) * scale;
    }

    void exponentials(int count) const {
        for (int c = 0; c < count; ++c) {
            T* t = gaps + c * pitch;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { t[i] = exp_negative(t[i]); });
        }
    }

    void add_coefficients(std::int64_t start, int count) {
        fill_coefficients(start, count);
        each_pivot(coefficients, [&](int i, T& r) { lane.pivot_coefficient[i] = double(r), r = T(0); });
        const T *const t = gaps, *const r = coefficients;
        add(count, lane.rest_coefficient, lane.lost_coefficient, [&](int, int at) POLYCE_INLINE_LAMBDA {
            return load(r + at);
        });
        add(count, lane.rest_excess, lane.lost_excess, [&](int, int at) POLYCE_INLINE_LAMBDA {
            return each_part(excess_of, load(r + at), load(t + at));
        });
    }

    // Whether the sums need what the exponents are, before the exponentials take its place.
    bool needs_gaps() const { return capped || results.spread || needs_entropy(job); }

    // Adds the exponentials, and what they make of the entropy; leaves them in `gaps`.
    void add_exponentials(int count) {
        T* const t = gaps;
        const T* const x = logits;
        const T scale = this->scale;
        if (needs_entropy(job)) {
            add(count, lane.rest_entropy, lane.lost_entropy, [&](int, int at) POLYCE_INLINE_LAMBDA {
                const Pack<T> gap = load(t + at);
                const Pack<T> e = each_part([](auto v) POLYCE_INLINE_LAMBDA { return exp_negative(v); }, gap);
                store(t + at, e);
                return each_part(weighted_gap, e, gap);
            });
            add(count, lane.rest_sum, lane.lost_sum, [&](int, int at) POLYCE_INLINE_LAMBDA { return load(t + at); });
            return;
        }
        if (needs_gaps()) {
            add(count, lane.rest_sum, lane.lost_sum, [&](int, int at) POLYCE_INLINE_LAMBDA {
                const Pack<T> e = each_part([](auto v) POLYCE_INLINE_LAMBDA { return exp_negative(v); }, load(t + at));
                store(t + at, e);
                return e;
            });
            return;
        }
        add(count, lane.rest_sum, lane.lost_sum, [&](int i, int at) POLYCE_INLINE_LAMBDA {
            const Pack<T> e = each_part([&](auto v, auto m) POLYCE_INLINE_LAMBDA {
                return exp_negative(decltype(v)((v - m) * splat<decltype(v)>(scale)));
            }, load(x + at), load(lane.m + i));
            store(t + at, e);
            return e;
        });
    }

    // Of what is in `gaps`.
    POLYCE_APART void add_squares(int count) const {
        const T* const t = gaps;
        add(count, lane.squares, lane.lost_squares, [&](int, int at) POLYCE_INLINE_LAMBDA {
            const Pack<T> e = load(t + at);
            return e * e;
        });
    }

    // Sums the squares of what the classes besides the pivots differ by from their probabilities.
    POLYCE_APART void sum_distances() {
        const Transform<capped> transform = results.transform;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const RowState s = results.state(i);
            lane.to_probability[i] = T(row_softmax(s, scalars(transform, s, sizeof(T) == 8)).factor);
        });
        each_chunk([&](std::int64_t start, int count) {
            fill(job.logits, start, count, logits);
            find_pivots(start, count);
            this->set_apart(count);
            read_gaps(count);
            exponentials(count);
            fill(job.probabilities, start, count, coefficients);
            each_pivot(coefficients, [&](int i, T& t) { lane.pivot_target[i] = double(t), t = T(0); });
            for (int c = 0; c < count; ++c) {
                T* t = gaps + c * pitch;
                const T* r = coefficients + c * pitch;
                each_lane([&](int i) POLYCE_INLINE_LAMBDA { t[i] = t[i] * lane.to_probability[i] - r[i]; });
            }
            add_squares(count);
        });
        if (sizeof(T) == 8 && job.classes > chunk) add_lost_squares();
    }

    void add_lost_squares() {
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.squares[i] += lane.lost_squares[i]; });
    }

    bool looks_at_labels() const { return results.apart || job.stats.rank; }

    void read_label_logits(std::int64_t start, int count) {
        each_label(start, count, [&](int i, std::int64_t at) { lane.label_logit[i] = logits[at]; });
    }

    void take_whole() {
        results.take_whole();
        refer_to(lane.rest_max);
    }

    void sum() {
        if (results.at_top) this->find_largest();
        results.begin_sums();
        if (job.stats.rank && job.classes > chunk) {
            // The first classes are compared with labels that come later.
            each_chunk([&](std::int64_t start, int count) {
                fill(job.logits, start, count, logits);
                read_label_logits(start, count);
            });
        }
        each_chunk([&](std::int64_t start, int count) {
            fill(job.logits, start, count, logits);
            if (looks_at_labels()) read_label_logits(start, count);
            if (job.stats.rank) this->count_larger(count);
            find_pivots(start, count);
            this->set_apart(count);
            if (needs_first(job)) this->find_first(start, count);
            if (start) raise_to_top();
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.rest_max[i] = lane.top[i]; });
            refer_to(lane.rest_max);
            if (needs_gaps()) read_gaps(count);
            if (results.spread) add_coefficients(start, count);
            add_exponentials(count);
            if (results.squares) add_squares(count);
        });
        if (sizeof(T) == 8 && job.classes > chunk) {
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.rest_sum[i] += lane.lost_sum[i], lane.rest_coefficient[i] += lane.lost_coefficient[i];
                lane.rest_excess[i] += lane.lost_excess[i], lane.rest_entropy[i] += lane.lost_entropy[i];
            });
            if (results.squares) add_lost_squares();
        }
        results.end_sums();
    }

    void write_gradient() {
        each_chunk([&](std::int64_t start, int count) {
            if (job.classes > chunk || results.distances || job.part.rows) {
                // What the sums were made of has given way to something else.
                fill(job.logits, start, count, logits);
                if (results.apart) read_label_logits(start, count);
                find_pivots(start, count);
                read_gaps(count);
                exponentials(count);
                if (results.spread) fill_coefficients(start, count);
            }
            if (!capped && results.multiplies) {
                multiply(count);
            } else if (results.valued) {
                for (int c = 0; c < count; ++c) compute_valued(c);
            } else {
                for (int c = 0; c < count; ++c) compute_gradient(c);
            }
            if (results.apart) each_label(start, count, [&](int i, std::int64_t at) { gaps[at] = results.at_label(i, gaps[at]); });
            empty(start, count);
        });
    }

    // Exponentials become the gradient.
    void multiply(int count) const {
        const Pack<T> zero = filled(T(0)), one = filled(T(1));
        for (int i = 0; i < used; i += pack_size) {
            const Pack<T> place = load(lane.place + i), at_pivot = load(lane.at_pivot + i);
            const Pack<T> kept = load(lane.kept + i), once = load(lane.once + i);
            Pack<T> here = zero;
            T* t = gaps + i;
            for (int c = 0; c < count; ++c, t += pitch) {
                const Pack<T> entry = chosen(kept, zero, zero, load(t) * once);
                store(t, chosen(place, here, at_pivot, entry));
                here = here + one;
            }
        }
    }

    // The same for a class, with coefficients or a softcap.
    void compute_gradient(int c) const {
        const T scale = this->scale, twice_over_cap = this->twice_over_cap;
        const T *x = logits + c * pitch, *r = coefficients + c * pitch;
        T* t = gaps + c * pitch;
        const bool spread = results.spread;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            T entry = (t[i] * lane.softmax[i] - (spread ? r[i] : T(0))) * lane.last[i];
            if constexpr (capped) entry = entry * slope_of(decay_of(x[i], twice_over_cap), scale);
            entry = lane.kept[i] == T(0) ? T(0) : entry;
            t[i] = lane.place[i] == T(c) ? lane.at_pivot[i] : entry;
        });
    }

    // The same for a class, as the gradient of loss, lse and entropy.
    void compute_valued(int c) const {
        const T scale = this->scale, cap = this->cap, twice_over_cap = this->twice_over_cap;
        const T *x = logits + c * pitch, *r = coefficients + c * pitch;
        T* t = gaps + c * pitch;
        const bool spread = results.spread;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const T gap = gap_of(x[i], lane.m[i], lane.decay[i], scale, cap);
            T entry = (t[i] * lane.softmax[i] - (spread ? r[i] : T(0))) * lane.last[i];
            entry = entry + (t[i] * lane.more[i] + weighted_gap(t[i], gap) * lane.by_gap[i]);
            if constexpr (capped) entry = entry * slope_of(decay_of(x[i], twice_over_cap), scale);
            entry = lane.kept[i] == T(0) ? T(0) : entry;
            t[i] = lane.place[i] == T(c) ? lane.at_pivot[i] : entry;
        });
    }

    // With more, a row has exponentials enough beside which its own numbers take little.
    static constexpr std::int64_t few = 10;

    bool has_few() const {
        const bool plain = !capped && results.plain && !results.valued && job.scale == 1.0;
        return sizeof(T) == 4 && plain && !job.part.rows && job.classes > 0 && job.classes <= few;
    }

    // The sum of the losses of one tile of rows.
    double run(std::int64_t first, int count) {
        this->begin(first, count);
        this->read_targets();
        if (looks_at_labels()) this->keep_labels();
        if (has_few()) {
            if (job.stats.valid) sum();
            if constexpr (sizeof(T) == 4) finish_few(*this);
        } else {
            if (job.teacher && !job.part.teacher) read_teachers();
            if (reads_teacher(job)) return results.write_teachers();
            writes_part(job) ? take_whole() : sum();
            if (reads_part(job)) return results.write_part();
            results.finish();
            if (results.distances) sum_distances();
            if (job.grad.data) write_gradient();
            if (job.grad.data && job.sparse) results.write_entries();
        }
        if (job.saved && !job.backward_only) leave_nothing();
        return results.write();
    }

    // For a backward pass that goes along the classes, as after a hook that has laid them otherwise.
    void leave_nothing() const {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        for (int i = 0; i < rows; ++i) job.saved[this->number(i)] = {nan, nan, nan, nan};
    }

    // log(softmax): what the likeliest class lacks to 0 is its loss.
    void log_softmax(std::int64_t first, int count) {
        this->begin(first, count);
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.weight[i] = lane.label_weight[i] = lane.counted[i] = 1.0;
        });
        this->find_largest();
        sum();
        results.template finish<false, true>();
        refer_to(lane.pivot_logit);
        each_chunk([&](std::int64_t start, int here) {
            fill(job.logits, start, here, logits);
            find_pivots(start, here);
            read_gaps(here);
            for (int c = 0; c < here; ++c) {
                T* t = gaps + c * pitch;
                each_lane([&](int i) POLYCE_INLINE_LAMBDA { t[i] = t[i] - T(lane.loss[i]); });
            }
            each_pivot(gaps, [&](int i, T& t) { t = -T(lane.loss[i]); });
            empty(start, here);
        });
    }
};

}  // namespace polyce::POLYCE_ISA
