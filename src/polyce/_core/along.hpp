// Rows one after the other, vectorised along their classes: for many classes that lie close by.
//
// A group of rows goes through three passes: the sums of each row, the few numbers that follow from
// them for all rows side by side (results.hpp), the gradient of each row. Within a pass a row goes
// by blocks that stay in the first cache.
#pragma once

#include "results.hpp"
#include "vector.hpp"

namespace polyce::POLYCE_ISA {

template <class T, bool capped>
struct Along : Group<T> {
    using Group<T>::job, Group<T>::lane, Group<T>::rows, Group<T>::first_row, Group<T>::is_counted;

    static constexpr int block = 2048;
    // Logits of so many short rows stay in the first cache together, beside those that come next.
    static constexpr std::int64_t held = 4096;
    // Below this many numbers a group would not be worth fetching.
    static constexpr std::int64_t group_numbers = 16384;
    // So many exponentials of a row stay in the second cache.
    static constexpr std::int64_t most_kept = 1 << 18;

    Results<T, capped> results;
    // Scratch: the logits of a block, what their exponents are, the coefficients.
    T *copy, *gaps, *coefficients;
    // Rows, each `pitch` after the one before it, and what the exponentials of each block refer to.
    T *numbers, *references;
    std::int64_t pitch, blocks;
    std::int64_t logits_at[width], probabilities_at[width], grad_at[width];
    bool direct, writes_direct, keeps;
    T scale, cap, twice_over_cap, share, kept;

    Along(const Job& job, char* scratch)
        : Group<T>(job, scratch), results(*this), copy(reinterpret_cast<T*>(scratch + Group<T>::lanes_bytes)),
          gaps(copy + block + pack_size), coefficients(gaps + block + pack_size),
          numbers(coefficients + block + pack_size), references(numbers + numbers_in_scratch(job)),
          pitch(padded(job.classes)), blocks(blocks_of(job)), direct(is_direct(job, job.logits)),
          writes_direct(is_direct(job, job.grad)), keeps(keeps_exponentials(job)), scale(T(job.scale)), cap(T(job.cap)),
          twice_over_cap(T(capped ? 2.0 * job.scale / job.cap : 0.0)), share(T(smoothing_share(job))),
          kept(T(1.0 - job.smoothing)) {}

    static std::int64_t rows_in_group(const Job& job) {
        const std::int64_t rows = group_numbers / (job.classes + 1);
        return rows < 1 ? 1 : rows > width ? width : rows;
    }

    // Rows whose logits fit in scratch memory beside one another.
    static int rows_held(const Job& job) {
        const std::int64_t most = rows_in_group(job), some = held / (padded(job.classes) + pack_size);
        return int(some < 1 ? 1 : some < most ? some : most);
    }

    static bool is_short(const Job& job) { return job.classes <= block; }

    // Nothing but exponentials makes up the sums.
    static bool is_simple(const Job& job) { return !capped && !has_coefficients(job) && !job.stats.entropy; }

    // Where nothing else makes a gradient, they are kept, not computed again.
    static bool keeps_exponentials(const Job& job) {
        return job.grad.data && !job.backward_only && is_simple(job) && job.classes <= most_kept;
    }

    static std::int64_t blocks_of(const Job& job) { return (job.classes + block - 1) / block; }

    static std::int64_t numbers_in_scratch(const Job& job) {
        const std::int64_t in_group = keeps_exponentials(job) ? rows_in_group(job) : 0;
        const std::int64_t together = is_short(job) ? rows_held(job) : 0;
        return (in_group > together ? in_group : together) * padded(job.classes) + pack_size;
    }

    static std::int64_t scratch_bytes(const Job& job) {
        const std::int64_t references = keeps_exponentials(job) ? rows_in_group(job) * blocks_of(job) : 0;
        const std::int64_t count = 3 * (block + pack_size) + numbers_in_scratch(job) + references;
        return Group<T>::lanes_bytes + count * std::int64_t(sizeof(T));
    }

    static bool is_direct(const Job& job, const Matrix& m) {
        const auto address = reinterpret_cast<std::uintptr_t>(m.data);
        bool aligned = address % alignof(T) == 0;
        for (int a = 0; a < job.axes; ++a) aligned = aligned && m.row_stride[a] % std::int64_t(alignof(T)) == 0;
        const Float own = sizeof(T) == 8 ? Float::f64 : Float::f32;
        return m.dtype == own && m.class_stride == std::int64_t(sizeof(T)) && aligned;
    }

    const char* logits_of(int i) const { return job.logits.data + logits_at[i]; }
    const char* probabilities_of(int i) const {
        return job.probabilities.data ? job.probabilities.data + probabilities_at[i] : nullptr;
    }

    int count_from(std::int64_t start) const {
        return int(job.classes - start < block ? job.classes - start : block);
    }

    // The logits from class `start` on, with -inf after the last, for which there must be room.
    void copy_logits(const char* row, std::int64_t start, int count, T* to) const {
        const Matrix& m = job.logits;
        const char* from = row + start * m.class_stride;
        if (direct) {
            map_run(reinterpret_cast<const T*>(from), count, to, [](auto x) POLYCE_INLINE_LAMBDA { return x; });
        } else {
            widen_run(m.dtype, from, m.class_stride, count, to);
        }
        store(to + count, filled(-infinity<T>));
    }

    // The same with -inf in the pivot's place, if there is one; not copied where they can stay.
    const T* read(const char* row, std::int64_t start, int count, std::int64_t pivot) const {
        const bool holds_pivot = start <= pivot && pivot < start + count;
        const char* from = row + start * job.logits.class_stride;
        if (direct && count == block && !holds_pivot) return reinterpret_cast<const T*>(from);
        copy_logits(row, start, count, copy);
        if (holds_pivot) copy[pivot - start] = -infinity<T>;
        return copy;
    }

    T read_one(const Matrix& m, const char* row, std::int64_t c) const {
        T value;
        widen_run(m.dtype, row + c * m.class_stride, 0, 1, &value);
        return value;
    }

    // The coefficients from class `start` on, with 0 after the last.
    void read_coefficients(const char* probabilities, std::int64_t start, int count) const {
        if (probabilities) {
            const Matrix& p = job.probabilities;
            widen_run(p.dtype, probabilities + start * p.class_stride, p.class_stride, count, coefficients);
        }
        const T* weights = static_cast<const T*>(job.class_weight);
        const T kept = this->kept, share = this->share;
        T* const r = coefficients;
        if (!probabilities) {
            POLYCE_SIMD
            for (int i = 0; i < count; ++i) r[i] = T(0);
        }
        for (int i = 0; i < count; ++i) {
            r[i] = coefficient(job, r[i], weights ? weights[start + i] : T(1), kept, share);
        }
        store(r + count, filled(T(0)));
    }

    // x(logit) - x(m) of a block, into `gaps`.
    void read_gaps(const T* x, std::int64_t count, T m) const {
        const T scale = this->scale, cap = this->cap, twice_over_cap = this->twice_over_cap;
        T* const t = gaps;
        if constexpr (capped) {
            const T decay = decay_of(m, twice_over_cap);
            POLYCE_SIMD
            for (int i = 0; i < count; ++i) t[i] = capped_gap(x[i], m, decay, scale, cap);
        } else {
            POLYCE_SIMD
            for (int i = 0; i < count; ++i) t[i] = (x[i] - m) * scale;
        }
    }

    // Carries a part's sums over to a larger maximum.
    void raise(RowState& s, double top) const {
        const double reference = top == -infinity<double> ? 0.0 : top;
        const double own = s.rest_max == -infinity<double> ? 0.0 : s.rest_max;
        const double risen = difference(transform(), reference, own);
        if (s.rest_sum != 0.0) {
            const double decay = exp_negative_full(difference(transform(), s.rest_max, reference));
            s.rest_entropy = (s.rest_entropy + s.rest_sum * risen) * decay;
            s.rest_sum *= decay;
        }
        if (s.rest_coefficient != 0.0) s.rest_excess += s.rest_coefficient * risen;
        s.rest_max = top;
    }

    const Transform<capped>& transform() const { return results.transform; }

    static std::int64_t first_equal(const T* x, int count, T value) {
        for (int i = 0; i < count; ++i) {
            if (x[i] == value) return i;
        }
        return 0;
    }

    // The first class with the largest logit.
    std::int64_t largest(const char* row) const {
        T top = -infinity<T>;
        std::int64_t found = 0;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            const T* x = read(row, start, count, -1);
            const T most = largest_of(x, padded(count));
            if (most > top) top = most, found = start + first_equal(x, count, most);
        }
        return found;
    }

    // Σ exp(x_c - m), of which each is left in `to`.
    template <bool keep, bool scaled>
    static POLYCE_INLINE double sum_exponentials(const T* x, std::int64_t count, T m, T scale, T* to, Ahead ahead) {
        return sum_of<T>(count, ahead, [&](std::int64_t i) POLYCE_INLINE_LAMBDA {
            const Pack<T> e = each_part([&](auto v) POLYCE_INLINE_LAMBDA {
                using V = decltype(v);
                const V gap = v - splat<V>(m);
                return exp_negative(scaled ? V(gap * splat<V>(scale)) : gap);
            }, load(x + i));
            if (keep) store(to + i, e);
            return e;
        });
    }

    // Calls f with what there is to decide on before logits are gone through: whether exponentials
    // are kept, and whether there is a scale.
    template <class F>
    void with_choices(F f) const {
        if (keeps) {
            scale == T(1) ? f(std::true_type{}, std::false_type{}) : f(std::true_type{}, std::true_type{});
        } else {
            scale == T(1) ? f(std::false_type{}, std::false_type{}) : f(std::false_type{}, std::true_type{});
        }
    }

    static T reference(T m) { return m == -infinity<T> ? T(0) : m; }

    bool wants_first() const { return job.stats.prediction || job.stats.correct; }

    // Short rows, some at a time: so that what is written to a row is long there when it is read.
    void sum_short() {
        const int count = int(job.classes), together = rows_held(job);
        const std::int64_t full = pitch;
        for (int begin = 0; begin < rows; begin += together) {
            const int end = begin + together < rows ? begin + together : rows;
            T* const first = numbers + (keeps ? begin * pitch : 0);
            const auto each = [&](auto f) POLYCE_INLINE_LAMBDA {
                for (int i = begin; i < end; ++i) {
                    if (is_counted(i)) f(i, first + (i - begin) * pitch);
                }
            };
            each([&](int i, T* x) POLYCE_INLINE_LAMBDA {
                copy_logits(logits_of(i), 0, count, x);
                lane.pivot_logit[i] = x[lane.pivot[i]];
                x[lane.pivot[i]] = -infinity<T>;
            });
            each([&](int i, T* x) POLYCE_INLINE_LAMBDA { lane.rest_max[i] = largest_of(x, full); });
            if (wants_first()) {
                each([&](int i, T* x) POLYCE_INLINE_LAMBDA { lane.first[i] = first_equal(x, count, lane.rest_max[i]); });
            }
            with_choices([&](auto keep, auto scaled) {
                const T scale = this->scale;
                each([&](int i, T* x) POLYCE_INLINE_LAMBDA {
                    if (i + together < rows) fetch_row(i + together);
                    const T m = reference(lane.rest_max[i]);
                    lane.rest_sum[i] = sum_exponentials<keep, scaled>(x, full, m, scale, x, {});
                });
            });
        }
    }

    void fetch_row(int i) const {
        const std::int64_t each = job.logits.class_stride;
        if (each != size_of(job.logits.dtype)) return;
        for (std::int64_t at = 0; at < job.classes * each; at += 64) POLYCE_FETCH(logits_of(i) + at, 3);
    }

    void sum_row(int i) {
        const char *const row = logits_of(i), *const probabilities = probabilities_of(i);
        const std::int64_t pivot = lane.pivot[i];
        RowState s{-infinity<double>, 0, 0, 0, 0, 0, 0};
        const bool coefficients_too = results.spread, entropy = job.stats.entropy;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            const std::int64_t full = padded(count), each = job.logits.class_stride;
            Ahead ahead;
            if (each == size_of(job.logits.dtype)) ahead = {row + (start + block) * each, int(each)};
            const T* x = read(row, start, count, pivot);
            const T most = largest_of(x, full);
            if (double(most) > s.rest_max) {
                raise(s, double(most));
                if (wants_first()) lane.first[i] = start + first_equal(x, count, most);
            }
            const T m = reference(T(s.rest_max));
            if (is_simple(job)) {
                if (keeps) references[i * blocks + start / block] = m;
                T* const to = numbers + i * pitch + start;
                with_choices([&](auto keep, auto scaled) {
                    s.rest_sum += sum_exponentials<keep, scaled>(x, full, m, scale, to, ahead);
                });
                continue;
            }
            read_gaps(x, full, m);
            s.rest_sum += sum_exponentials<false, false>(gaps, full, T(0), T(1), nullptr, ahead);
            if (entropy) s.rest_entropy += sum_entropy(full);
            if (!coefficients_too) continue;
            read_coefficients(probabilities, start, count);
            if (start <= pivot && pivot < start + count) {
                s.pivot_coefficient = double(coefficients[pivot - start]);
                coefficients[pivot - start] = T(0);
            }
            s.rest_coefficient += sum_run(coefficients, full);
            s.rest_excess += sum_excess(full);
        }
        lane.pivot_logit[i] = read_one(job.logits, row, pivot);
        set_state(i, s);
    }

    void set_state(int i, const RowState& s) const {
        lane.rest_max[i] = T(s.rest_max), lane.rest_sum[i] = s.rest_sum;
        lane.pivot_coefficient[i] = s.pivot_coefficient, lane.rest_coefficient[i] = s.rest_coefficient;
        lane.rest_excess[i] = s.rest_excess, lane.rest_entropy[i] = s.rest_entropy;
    }

    static double sum_run(const T* values, std::int64_t count) {
        return sum_of<T>(count, {}, [&](std::int64_t i) POLYCE_INLINE_LAMBDA { return load(values + i); });
    }

    double sum_entropy(std::int64_t count) const {
        const T* const t = gaps;
        T* const terms = coefficients;
        POLYCE_SIMD
        for (int i = 0; i < count; ++i) {
            const T e = exp_negative(t[i]);
            terms[i] = e == T(0) ? T(0) : -t[i] * e;
        }
        return sum_run(terms, count);
    }

    // Leaves its terms in the place of the gaps.
    double sum_excess(std::int64_t count) const {
        const T* const r = coefficients;
        T* const t = gaps;
        POLYCE_SIMD
        for (int i = 0; i < count; ++i) {
            // Only what is infinite is skipped: a nan has to stay.
            t[i] = r[i] == T(0) && t[i] == -infinity<T> ? T(0) : r[i] * -t[i];
        }
        return sum_run(t, count);
    }

    // What a forward pass has left of a row; false where it left none. Autograd's hooks may have
    // had it in their hands: what does not fit is not used.
    bool take_saved(int i) {
        const SavedRow& saved = job.saved[first_row + i];
        if (saved.rest_sum != saved.rest_sum) return false;
        const char *const row = logits_of(i), *const probabilities = probabilities_of(i);
        RowState s{saved.rest_max, saved.rest_sum, 0, 0, saved.rest_coefficient, 0, 0};
        if (probabilities) {
            const bool fits = saved.pivot >= 0.0 && saved.pivot < double(job.classes);
            std::int64_t pivot = fits ? std::int64_t(saved.pivot) : 0;
            if (!fits || double(read_one(job.logits, row, pivot)) < s.rest_max) pivot = largest(row);
            const T weight = job.class_weight ? static_cast<const T*>(job.class_weight)[pivot] : T(1);
            const T probability = read_one(job.probabilities, probabilities, pivot);
            s.pivot_coefficient = double(coefficient(job, probability, weight, kept, share));
            lane.pivot[i] = pivot;
        }
        lane.pivot_logit[i] = read_one(job.logits, row, lane.pivot[i]);
        set_state(i, s);
        return true;
    }

    void sum() {
        results.begin_sums();
        if (!job.classes) return results.end_sums();
        const bool saved = job.backward_only && job.saved;
        for (int i = 0; i < rows && results.apart; ++i) {
            lane.label[i] = lane.pivot[i];
            lane.label_logit[i] = is_counted(i) ? read_one(job.logits, logits_of(i), lane.label[i]) : T(0);
        }
        for (int i = 0; i < rows && results.at_top && !saved; ++i) {
            if (is_counted(i)) lane.pivot[i] = largest(logits_of(i));
        }
        if (is_short(job) && is_simple(job) && !saved) {
            sum_short();
        } else {
            for (int i = 0; i < rows; ++i) {
                if (!is_counted(i) || (saved && take_saved(i))) continue;
                if (saved && results.at_top) lane.pivot[i] = largest(logits_of(i));
                sum_row(i);
            }
        }
        results.end_sums();
    }

    void write_gradient(int i) {
        const char *const row = logits_of(i), *const probabilities = probabilities_of(i);
        char* const grad = job.grad.data + grad_at[i];
        const Matrix& out = job.grad;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            char* const place = grad + start * out.class_stride;
            T* const to = writes_direct && !job.streams ? reinterpret_cast<T*>(place) : gaps;
            if (!is_counted(i)) {
                for (int c = 0; c < count; ++c) to[c] = T(0);
            } else if (keeps) {
                multiply_kept(i, start, count, to);
            } else {
                const T* x = direct ? reinterpret_cast<const T*>(row + start * job.logits.class_stride)
                                    : read(row, start, count, -1);
                compute_gradient(i, x, probabilities, start, count, to);
            }
            if (job.streams) {
                char* packed = reinterpret_cast<char*>(copy);
                if (!writes_direct) narrow_run(out.dtype, to, count, packed, size_of(out.dtype));
                stream(place, writes_direct ? reinterpret_cast<const char*>(to) : packed, count * size_of(out.dtype));
            } else if (!writes_direct) {
                narrow_run(out.dtype, to, count, place, out.class_stride);
            }
        }
        write_one(grad, lane.pivot[i], lane.at_pivot[i]);
        if (results.apart && is_counted(i) && lane.label[i] != lane.pivot[i]) {
            write_one(grad, lane.label[i], results.at_label(i, T(0)));
        }
    }

    void multiply_kept(int i, std::int64_t start, int count, T* to) const {
        T f = lane.once[i];
        if (!is_short(job)) {
            const double own = double(references[i * blocks + start / block]);
            const double moved = difference(transform(), own, double(reference(lane.rest_max[i])));
            f = T(double(f) * exp_negative_full(moved));
        }
        map_run(numbers + i * pitch + start, count, to, [&](auto e) POLYCE_INLINE_LAMBDA {
            return e * splat<decltype(e)>(f);
        });
    }

    // From logits `x`, which may be in the place of the gradient.
    void compute_gradient(int i, const T* x, const char* probabilities, std::int64_t start, int count, T* to) const {
        const T m = reference(lane.rest_max[i]), scale = this->scale, twice_over_cap = this->twice_over_cap;
        const T once = lane.once[i], softmax = lane.softmax[i], last = lane.last[i];
        if (!results.spread && !capped) {
            map_run(x, count, to, [&](auto v) POLYCE_INLINE_LAMBDA {
                using V = decltype(v);
                return exp_negative(V((v - splat<V>(m)) * splat<V>(scale))) * splat<V>(once);
            });
            return;
        }
        read_gaps(x, count, m);
        T *const r = coefficients, *const t = gaps;
        if (results.spread) {
            read_coefficients(probabilities, start, count);
        } else {
            for (int c = 0; c < count; ++c) r[c] = T(0);
        }
        if constexpr (capped) {
            POLYCE_SIMD
            for (int c = 0; c < count; ++c) {
                const T entry = exp_negative(t[c]) * softmax - r[c];
                to[c] = entry * last * slope_of(decay_of(x[c], twice_over_cap), scale);
            }
        } else {
            POLYCE_SIMD
            for (int c = 0; c < count; ++c) to[c] = (exp_negative(t[c]) * softmax - r[c]) * last;
        }
    }

    void write_one(char* grad, std::int64_t c, T value) const {
        narrow_run(job.grad.dtype, &value, 1, grad + c * job.grad.class_stride, job.grad.class_stride);
    }

    void find_rows(std::int64_t first, int count) {
        this->begin(first, count);
        row_offsets(job, job.logits.row_stride, first, count, logits_at);
        if (job.probabilities.data) row_offsets(job, job.probabilities.row_stride, first, count, probabilities_at);
        if (job.grad.data) row_offsets(job, job.grad.row_stride, first, count, grad_at);
    }

    // The sum of the losses of one group of rows.
    double run(std::int64_t first, int count) {
        find_rows(first, count);
        this->read_targets();
        sum();
        if (job.saved && !job.backward_only) results.save_rows();
        results.finish();
        for (int i = 0; i < rows && job.grad.data && job.classes; ++i) write_gradient(i);
        if (job.streams) end_streaming();
        return results.write();
    }

    // log(softmax): what the likeliest class lacks to 0 is its loss.
    void log_softmax(std::int64_t first, int count) {
        find_rows(first, count);
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
                read_gaps(read(logits_of(i), start, here, -1), here, top);
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
