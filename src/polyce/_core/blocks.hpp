// Rows that are read along their classes, in blocks that stay in the first cache.
#pragma once

#include "group.hpp"
#include "vector.hpp"

namespace polyce::POLYCE_ISA {

template <class T>
struct Blocks : Group<T> {
    using Group<T>::job;

    static constexpr int block = 2048;
    static constexpr std::int64_t numbers_in_blocks = 2 * (block + pack_size);

    // Scratch: the logits of a block, its coefficients.
    T *copy, *coefficients;
    std::int64_t logits_at[width], probabilities_at[width], grad_at[width];
    bool direct, writes_direct;
    T share, kept;
    // The teacher of the row whose coefficients are read.
    T teacher_top = 0, teacher_inverse = 0;

    Blocks(const Job& job, char* scratch, std::int64_t most_rows)
        : Group<T>(job, scratch, most_rows), copy(reinterpret_cast<T*>(scratch + Group<T>::bytes(job, most_rows))),
          coefficients(copy + block + pack_size), direct(is_direct(job, job.logits)),
          writes_direct(is_direct(job, job.grad)), share(T(smoothing_share(job))),
          kept(T(1.0 - job.smoothing)) {}

    void begin(std::int64_t first, int count) {
        Group<T>::begin(first, count);
        row_offsets(job, job.logits.row_stride, first, count, logits_at);
        if (job.probabilities.data) row_offsets(job, job.probabilities.row_stride, first, count, probabilities_at);
        if (job.grad.data) row_offsets(job, job.grad.row_stride, first, count, grad_at);
    }

    // Whether numbers can be taken as they lie, and written so.
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
        if (direct && count >= pack_size) {
            copy_run(reinterpret_cast<const T*>(from), count, to);
        } else {
            widen_run(m.dtype, from, m.class_stride, count, to);
        }
        store(to + count, filled(-infinity<T>));
    }

    // The same; not copied where they can stay.
    const T* read(const char* row, std::int64_t start, int count) const {
        if (direct && count == block) return reinterpret_cast<const T*>(row + start * job.logits.class_stride);
        copy_logits(row, start, count, copy);
        return copy;
    }

    // Of logits `x` that were read so, a copy with -inf in the pivot's place.
    const T* without(std::int64_t pivot, const T* x, const char* row, std::int64_t start, int count) const {
        if (x != copy) copy_logits(row, start, count, copy);
        copy[pivot - start] = -infinity<T>;
        return copy;
    }

    T read_one(const Matrix& m, const char* row, std::int64_t c) const {
        T value;
        widen_run(m.dtype, row + c * m.class_stride, 0, 1, &value);
        return value;
    }

    // The probabilities from class `start` on, into `coefficients`.
    void read_probabilities(const char* probabilities, std::int64_t start, int count) const {
        const Matrix& p = job.probabilities;
        widen_run(p.dtype, probabilities + start * p.class_stride, p.class_stride, count, coefficients);
    }

    // Finds what turns a row's teacher into probabilities.
    POLYCE_APART void read_teacher(int i) {
        const Matrix& t = job.probabilities;
        T top = -infinity<T>;
        double total = 0.0;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            widen_run(t.dtype, probabilities_of(i) + start * t.class_stride, t.class_stride, count, coefficients);
            store(coefficients + count, filled(-infinity<T>));
            const T most = largest_of(largest_lanes(coefficients, padded(count)));
            if (most > top) {
                if (total != 0.0) total *= exp_negative_full((double(top) - double(most)) * job.teacher_scale);
                top = most;
            }
            teach(padded(count), top == -infinity<T> ? T(0) : top, T(1));
            total += sum_run(coefficients, padded(count));
        }
        this->lane.teacher_top[i] = top == -infinity<T> ? T(0) : top;
        this->lane.teacher_inverse[i] = T(1.0 / total);
        use_teacher(i);
    }

    // Turns a teacher's logits t, in the place of coefficients, into exp(scale (t - m))·factor.
    POLYCE_APART void teach(std::int64_t count, T m, T factor) const {
        const T scale = T(job.teacher_scale);
        T* const r = coefficients;
        POLYCE_SIMD
        for (std::int64_t i = 0; i < count; ++i) r[i] = exp_negative((r[i] - m) * scale) * factor;
    }

    static double sum_run(const T* values, std::int64_t count) {
        return sum_of(sum_lanes<T>(count, {}, [&](std::int64_t i) POLYCE_INLINE_LAMBDA { return load(values + i); }));
    }

    void use_teacher(int i) { teacher_top = this->lane.teacher_top[i], teacher_inverse = this->lane.teacher_inverse[i]; }

    // The coefficients from class `start` on, with 0 after the last.
    void read_coefficients(const char* probabilities, std::int64_t start, int count) const {
        if (probabilities) read_probabilities(probabilities, start, count);
        const T* weights = static_cast<const T*>(job.class_weight);
        const T kept = this->kept, share = this->share;
        T* const r = coefficients;
        if (job.teacher) teach(count, teacher_top, teacher_inverse);
        if (!probabilities) {
            POLYCE_SIMD
            for (int i = 0; i < count; ++i) r[i] = T(0);
        }
        for (int i = 0; i < count; ++i) {
            r[i] = coefficient(job, r[i], weights ? weights[start + i] : T(1), kept, share);
        }
        store(r + count, filled(T(0)));
    }

    static std::int64_t first_equal(const T* x, int count, T value) {
        int i = 0;
        for (; i + pack_size <= count; i += pack_size) {
            int found = 0;
            POLYCE_SIMD_SUM(found)
            for (int k = 0; k < pack_size; ++k) found += x[i + k] == value ? 1 : 0;
            if (found) break;
        }
        for (; i < count; ++i) {
            if (x[i] == value) return i;
        }
        return 0;
    }

    POLYCE_APART static std::int64_t count_larger(const T* x, std::int64_t count, T value) {
        int found = 0;
        POLYCE_SIMD_SUM(found)
        for (std::int64_t i = 0; i < count; ++i) found += x[i] > value ? 1 : 0;
        return found;
    }

    // The first class with the largest logit.
    std::int64_t largest(const char* row) const {
        T top = -infinity<T>;
        std::int64_t found = 0;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            const T* x = read(row, start, count);
            const T most = largest_of(largest_lanes(x, padded(count)));
            if (most > top) top = most, found = start + first_equal(x, count, most);
        }
        return found;
    }
};

}  // namespace polyce::POLYCE_ISA
