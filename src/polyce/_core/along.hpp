// Rows one after the other, vectorised along their classes: for many classes that lie close by.
//
// A group of rows goes through three passes: the sums of each row (sums.hpp), the few numbers that
// follow from them for all rows side by side (results.hpp), the gradient of each row.
#pragma once

#include "sums.hpp"

namespace polyce::POLYCE_ISA {

template <class T, bool capped>
struct Along : Sums<T, capped> {
    using Group<T>::job, Group<T>::lane, Group<T>::rows, Group<T>::is_counted;
    using Blocks<T>::block, Blocks<T>::copy, Blocks<T>::coefficients, Blocks<T>::grad_at;
    using Blocks<T>::direct, Blocks<T>::writes_direct, Blocks<T>::logits_of, Blocks<T>::probabilities_of, Blocks<T>::teacher;
    using Blocks<T>::count_from, Blocks<T>::read, Blocks<T>::read_one, Blocks<T>::read_coefficients, Blocks<T>::largest;
    using Sums<T, capped>::results, Sums<T, capped>::gaps, Sums<T, capped>::numbers, Sums<T, capped>::references;
    using Sums<T, capped>::missing, Sums<T, capped>::scale;
    using Sums<T, capped>::pitch, Sums<T, capped>::blocks, Sums<T, capped>::streams, Sums<T, capped>::keeps;
    using Sums<T, capped>::twice_over_cap, Sums<T, capped>::is_short, Sums<T, capped>::is_simple, Sums<T, capped>::reference;
    using Sums<T, capped>::read_gaps, Sums<T, capped>::transform;
    using Sums<T, capped>::sum_short, Sums<T, capped>::sum_row, Sums<T, capped>::set_state;
    using Blocks<T>::share, Blocks<T>::kept;
    using Sums<T, capped>::Sums;

    // What a forward pass has left of a row; false where it left none. Autograd's hooks may have
    // had it in their hands: what does not fit is not used.
    bool take_saved(int i) {
        if (!results.is_saved(i)) return false;
        const SavedRow& saved = job.saved[this->number(i)];
        const char *const row = logits_of(i), *const probabilities = probabilities_of(i);
        RowState s{saved.rest_max, saved.rest_sum, 0, 0, saved.rest_coefficient, 0, 0};
        if (results.at_top) {
            const bool fits = saved.pivot >= 0.0 && saved.pivot < double(job.classes);
            std::int64_t pivot = fits ? std::int64_t(saved.pivot) : 0;
            if (!fits || double(read_one(job.logits, row, pivot)) < s.rest_max) pivot = largest(row);
            lane.pivot[i] = pivot;
        }
        if (job.sparse) {
            s.pivot_coefficient = smoothing_share(job) * results.entries.weight_of(lane.pivot[i]);
        } else if (probabilities) {
            const std::int64_t pivot = lane.pivot[i];
            const T weight = job.class_weight ? static_cast<const T*>(job.class_weight)[pivot] : T(1);
            T probability;
            if (job.teacher) {
                const SavedTeacher& known = saved_teachers(job)[this->number(i)];
                lane.teacher_top[i] = T(known.top), lane.teacher_sum[i] = known.sum;
                this->teacher.softmax(i, probabilities, pivot, 1, coefficients);
                probability = coefficients[0];
            } else {
                probability = read_one(job.probabilities, probabilities, pivot);
            }
            s.pivot_coefficient = double(coefficient(job, probability, weight, kept, share));
        }
        lane.pivot_logit[i] = read_one(job.logits, row, lane.pivot[i]);
        set_state(i, s);
        return true;
    }

    // The labels, whose place the pivots may take, and their logits.
    void keep_labels() {
        for (int i = 0; i < rows && (results.apart || job.stats.rank); ++i) {
            lane.label[i] = lane.pivot[i];
            const bool reads = is_counted(i) && is_here(lane.label[i]);
            lane.label_logit[i] = reads ? read_one(job.logits, logits_of(i), lane.label[i]) : T(0);
        }
    }

    void sum() {
        results.begin_sums();
        if (!job.classes) return results.end_sums();
        const bool saved = has_saved(job);
        if constexpr (!capped) {
            if (is_short(job) && is_simple(job) && !results.at_top && !saved && !job.part.rows) {
                sum_short();
                return results.end_sums();
            }
        }
        for (int i = 0; i < rows; ++i) {
            if (!is_counted(i) || (saved && take_saved(i))) continue;
            sum_row(i);
        }
        results.end_sums();
    }

    // Of short rows whose exponentials are kept, into memory that takes them as they are.
    void write_short() const {
        const int count = int(job.classes);
        for (int i = 0; i < rows; ++i) {
            T* const to = reinterpret_cast<T*>(job.grad.data + grad_at[i]);
            if (is_counted(i)) {
                multiply_kept(i, 0, count, to);
                to[lane.pivot[i]] = lane.at_pivot[i];
            } else {
                std::fill_n(to, count, T(0));
            }
        }
    }

    void write_gradient() {
        if constexpr (!capped) {
            if (keeps && is_simple(job) && is_short(job) && writes_direct && !streams) return write_short();
        }
        for (int i = 0; i < rows; ++i) write_gradient(i);
        if (streams) end_streaming();
    }

    void write_gradient(int i) {
        const char* const row = logits_of(i);
        char* const grad = job.grad.data + grad_at[i];
        const Matrix& out = job.grad;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            char* const place = grad + start * out.class_stride;
            T* const to = writes_direct && !streams ? reinterpret_cast<T*>(place) : gaps;
            if (!is_counted(i)) {
                for (int c = 0; c < count; ++c) to[c] = T(0);
            } else {
                write_block(i, row, start, count, to);
            }
            if (streams) {
                char* packed = reinterpret_cast<char*>(copy);
                if (!writes_direct) narrow_run(out.dtype, to, count, packed, size_of(out.dtype));
                stream(place, writes_direct ? reinterpret_cast<const char*>(to) : packed, count * size_of(out.dtype));
            } else if (!writes_direct) {
                narrow_run(out.dtype, to, count, place, out.class_stride);
            }
        }
        if (is_here(lane.pivot[i])) write_one(grad, lane.pivot[i], lane.at_pivot[i]);
        if (results.apart && is_counted(i) && lane.label[i] != lane.pivot[i] && is_here(lane.label[i])) {
            write_one(grad, lane.label[i], results.at_label(i, T(0)));
        }
    }

    void write_block(int i, const char* row, std::int64_t start, int count, T* to) const {
        if constexpr (!capped) {
            if (keeps) return write_kept(i, row, start, count, to);
        }
        compute_gradient(i, logits_from(row, start, count), start, count, to);
    }

    // What exponentials of a block that were kept are multiplied by in place of those of the row.
    POLYCE_INLINE T carried(T factor, int i, std::int64_t start) const {
        if (is_short(job)) return factor;
        const double own = double(references[i * blocks + start / block]);
        const double moved = difference(transform(), own, double(reference(lane.rest_max[i])));
        return T(double(factor) * exp_negative_full(moved));
    }

    const T* logits_from(const char* row, std::int64_t start, int count) const {
        return direct ? reinterpret_cast<const T*>(row + start * job.logits.class_stride) : read(row, start, count);
    }

    // From exponentials that were kept, and the one that was not.
    void write_kept(int i, const char* row, std::int64_t start, int count, T* to) const {
        const int place = results.at_top ? int(missing[i * blocks + start / block]) : -1;
        // Before the gradient is written, which may be over it.
        const T logit = place < 0 ? T(0) : read_one(job.logits, row, start + place);
        if (results.multiplies) {
            multiply_kept(i, start, count, to);
        } else if (results.spread) {
            subtract_from_kept(i, start, count, to);
        } else {
            combine_kept(i, logits_from(row, start, count), start, count, to);
        }
        if (place < 0) return;
        const T gap = (logit - reference(lane.rest_max[i])) * scale, e = exp_negative(gap);
        if (results.spread) {
            const auto [r, factor] = this->coefficients_of(i, start, count);
            to[place] = (e * lane.softmax[i] - r[place] * factor) * lane.last[i];
            return;
        }
        to[place] = e * lane.once[i] + (results.multiplies ? T(0) : weighted_gap(e, gap) * lane.by_gap[i]);
    }

    // For an entropy with a cotangent. Beyond the bound there is no exponential, and an infinite gap
    // would leave a nan.
    void combine_kept(int i, const T* x, std::int64_t start, int count, T* to) const {
        const T m = reference(lane.rest_max[i]), bound = Exp<T>::lowest / scale;
        const T once = carried(lane.once[i], i, start), by_gap = carried(lane.by_gap[i], i, start) * scale;
        const T* const e = numbers + i * pitch + start;
        POLYCE_SIMD
        for (int c = 0; c < count; ++c) {
            const T gap = x[c] - m;
            to[c] = e[c] * (once - (bound > gap ? bound : gap) * by_gap);
        }
    }

    void subtract_from_kept(int i, std::int64_t start, int count, T* to) const {
        const T softmax = carried(lane.softmax[i], i, start), last = lane.last[i];
        const auto [r, factor] = this->coefficients_of(i, start, count);
        const T* const e = numbers + i * pitch + start;
        const T each = factor;
        POLYCE_SIMD
        for (int c = 0; c < count; ++c) to[c] = (e[c] * softmax - r[c] * each) * last;
    }

    POLYCE_INLINE void multiply_kept(int i, std::int64_t start, int count, T* to) const {
        const T f = carried(lane.once[i], i, start);
        map_run(numbers + i * pitch + start, count, to, [&](auto e) POLYCE_INLINE_LAMBDA {
            return e * splat<decltype(e)>(f);
        });
    }

    // From logits `x`, which may be in the place of the gradient.
    void compute_gradient(int i, const T* x, std::int64_t start, int count, T* to) const {
        const T m = reference(lane.rest_max[i]), scale = this->scale, twice_over_cap = this->twice_over_cap;
        const T once = lane.once[i], softmax = lane.softmax[i], last = lane.last[i];
        if (results.valued && !results.multiplies) return compute_valued(i, x, start, count, to);
        if constexpr (capped) {
            read_gaps(x, count, m);
            const T *const r = coefficients, *const t = gaps;
            read_coefficients_or_none(i, start, count);
            POLYCE_SIMD
            for (int c = 0; c < count; ++c) {
                const T entry = exp_negative(t[c]) * softmax - r[c];
                to[c] = entry * last * slope_of(decay_of(x[c], twice_over_cap), scale);
            }
        } else if (results.spread) {
            subtract_from_softmax(i, x, start, count, to);
        } else {
            map_run(x, count, to, [&](auto v) POLYCE_INLINE_LAMBDA {
                using V = decltype(v);
                return exp_negative(V((v - splat<V>(m)) * splat<V>(scale))) * splat<V>(once);
            });
        }
    }

    // Of a teacher whose exponentials were not kept, both in one loop, for which memory is asked in time.
    void subtract_from_softmax(int i, const T* x, std::int64_t start, int count, T* to) const {
        if (this->is_plain && job.teacher && !teacher.keeps) {
            const T* const t = teacher.read_logits(probabilities_of(i), start, count, coefficients);
            const T top = lane.teacher_top[i], each = T(1.0 / lane.teacher_sum[i]);
            teacher.with_exponential(top, [&](auto exponential) {
                subtract(i, x, start, count, to, [=](int c) POLYCE_INLINE_LAMBDA { return exponential(t[c]) * each; });
            });
        } else {
            const auto [numbers, factor] = this->coefficients_of(i, start, count);
            const T *const r = numbers, each = factor;
            subtract(i, x, start, count, to, [=](int c) POLYCE_INLINE_LAMBDA { return r[c] * each; });
        }
    }

    template <class R>
    POLYCE_INLINE void subtract(int i, const T* x, std::int64_t start, int count, T* to, R coefficient_at) const {
        const T m = reference(lane.rest_max[i]), scale = this->scale;
        const T softmax = lane.softmax[i], last = lane.last[i];
        const AheadOfTwo ahead{this->ahead_of_logits(i, start + block), this->ahead_of_probabilities(i, start + block)};
        for (int from = 0; from < count; from += run_size) {
            const int end = from + run_size < count ? from + run_size : count;
            ahead.fetch(from);
            POLYCE_SIMD
            for (int c = from; c < end; ++c) {
                to[c] = (exp_negative((x[c] - m) * scale) * softmax - coefficient_at(c)) * last;
            }
        }
    }

    // The gradient of loss, lse and entropy.
    void compute_valued(int i, const T* x, std::int64_t start, int count, T* to) const {
        const T m = reference(lane.rest_max[i]), scale = this->scale, twice_over_cap = this->twice_over_cap;
        read_gaps(x, count, m);
        read_coefficients_or_none(i, start, count);
        const T softmax = lane.softmax[i], last = lane.last[i], more = lane.more[i], by_gap = lane.by_gap[i];
        const T *const r = coefficients, *const t = gaps;
        POLYCE_SIMD
        for (int c = 0; c < count; ++c) {
            const T e = exp_negative(t[c]);
            const T entry = (e * softmax - r[c]) * last + (e * more + weighted_gap(e, t[c]) * by_gap);
            to[c] = capped ? entry * slope_of(decay_of(x[c], twice_over_cap), scale) : entry;
        }
    }

    void read_coefficients_or_none(int i, std::int64_t start, int count) const {
        if (results.spread) {
            read_coefficients(i, start, count);
        } else {
            std::fill_n(coefficients, count, T(0));
        }
    }

    bool is_here(std::int64_t c) const { return !out_of_range(c, job.classes); }

    void write_one(char* grad, std::int64_t c, T value) const {
        with_type(job.grad.dtype, [&](auto type) {
            const auto stored = narrow<decltype(type)>(value);
            std::memcpy(grad + c * job.grad.class_stride, &stored, sizeof stored);
        });
    }

    // The sum of the losses of one group of rows.
    double run(std::int64_t first, int count) {
        this->begin(first, count);
        this->read_targets();
        if (reads_teacher(job)) {
            for (int i = 0; i < rows; ++i) this->teacher.read(i, probabilities_of(i), copy);
            return results.write_teachers();
        }
        keep_labels();
        writes_part(job) ? results.take_whole() : sum();
        if (reads_part(job)) return results.write_part();
        if (job.saved && !job.backward_only) results.save_rows();
        results.finish();
        // Before the gradient, which may be over the logits.
        for (int i = 0; i < rows && results.distances; ++i) {
            if (is_counted(i)) this->sum_distances(i);
        }
        if (job.grad.data && job.classes) write_gradient();
        if (job.grad.data && job.sparse) results.write_entries();
        return results.write();
    }

    // log(softmax): what the likeliest class lacks to 0 is its loss.
    void log_softmax(std::int64_t first, int count) {
        this->begin(first, count);
        for (int i = 0; i < this->used; ++i) {
            lane.weight[i] = lane.label_weight[i] = i < rows ? 1.0 : 0.0;
            lane.counted[i] = lane.weight[i];
        }
        for (int i = 0; i < rows; ++i) lane.pivot[i] = largest(logits_of(i));
        sum();
        results.template finish<false, true>();
        for (int i = 0; i < rows; ++i) {
            const T top = lane.pivot_logit[i], lost = T(lane.loss[i]);
            const std::int64_t pivot = lane.pivot[i];
            for (std::int64_t start = 0; start < job.classes; start += block) {
                const int here = count_from(start);
                read_gaps(read(logits_of(i), start, here), here, top);
                T* const t = gaps;
                POLYCE_SIMD
                for (int c = 0; c < here; ++c) t[c] = t[c] - lost;
                if (start <= pivot && pivot < start + here) t[pivot - start] = -lost;
                char* const place = job.grad.data + grad_at[i] + start * job.grad.class_stride;
                narrow_run(job.grad.dtype, t, here, place, job.grad.class_stride);
            }
        }
    }
};

}  // namespace polyce::POLYCE_ISA
