// Rows that are read along their classes, in blocks that stay in the first cache.
#pragma once

#include "teacher.hpp"

namespace polyce::POLYCE_ISA {

template <class T>
struct Blocks : Group<T> {
    using Group<T>::job;

    static constexpr int block = Teacher<T>::block;

    // Scratch: the logits of a block, its coefficients.
    T *copy, *coefficients;
    Teacher<T> teacher;
    std::int64_t logits_at[width], probabilities_at[width], grad_at[width];
    bool direct;
    bool is_plain;  // the coefficients are the probabilities
    bool writes_direct;
    T share, kept;

    Blocks(const Job& job, char* scratch, std::int64_t most_rows)
        : Group<T>(job, scratch, most_rows), copy(reinterpret_cast<T*>(scratch + Group<T>::bytes(job, most_rows))),
          coefficients(copy + block + pack_size),
          teacher(job, this->lane, coefficients + block + pack_size, most_rows, is_direct(job, job.probabilities)),
          direct(is_direct(job, job.logits)), is_plain(job.probabilities.data && !job.class_weight && job.smoothing == 0.0),
          writes_direct(is_direct(job, job.grad)), share(T(smoothing_share(job))),
          kept(T(1.0 - job.smoothing)) {}

    static std::int64_t numbers_in_blocks(const Job& job, std::int64_t most_rows) {
        return 2 * (block + pack_size) + Teacher<T>::numbers_in_scratch(job, most_rows);
    }

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
    POLYCE_INLINE void copy_logits(const char* row, std::int64_t start, int count, T* to) const {
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
    POLYCE_APART const T* without(std::int64_t pivot, const T* x, const char* row, std::int64_t start, int count) const {
        if (x != copy) copy_logits(row, start, count, copy);
        copy[pivot - start] = -infinity<T>;
        return copy;
    }

    T read_one(const Matrix& m, const char* row, std::int64_t c) const {
        return with_type(m.dtype, [&](auto type) { return T(widen(fetch<decltype(type)>(row + c * m.class_stride))); });
    }

    // The probabilities from class `start` on, into `coefficients`.
    void read_probabilities(const char* probabilities, std::int64_t start, int count) const {
        const Matrix& p = job.probabilities;
        widen_run(p.dtype, probabilities + start * p.class_stride, p.class_stride, count, coefficients);
    }

    // Some coefficients: numbers times a factor.
    struct Run {
        const T* numbers;
        T factor;
    };

    // The coefficients of a row from class `start` on, with 0 after the last, as they lie if they can
    // stay.
    Run coefficients_of(int i, std::int64_t start, int count) const {
        if (is_plain && job.teacher && teacher.keeps) return {teacher.kept(i, start), teacher.factor(i, start)};
        if (is_plain && !job.teacher && teacher.direct && count == block) {
            return {reinterpret_cast<const T*>(probabilities_of(i) + start * job.probabilities.class_stride), T(1)};
        }
        read_coefficients(i, start, count);
        return {coefficients, T(1)};
    }

    // Of coefficients that were read so, a copy with 0 in the pivot's place.
    Run without(std::int64_t pivot, Run r, std::int64_t start, int count) const {
        const std::int64_t full = padded(count);
        map_run(r.numbers, full, coefficients, [&](auto v) POLYCE_INLINE_LAMBDA { return v * splat<decltype(v)>(r.factor); });
        coefficients[pivot - start] = T(0);
        return {coefficients, T(1)};
    }

    // What is asked of the memory meanwhile, from class `start` on.
    Ahead ahead_of_logits(int i, std::int64_t start) const { return ahead_of(job.logits, logits_of(i), start); }
    Ahead ahead_of_probabilities(int i, std::int64_t start) const {
        return job.probabilities.data ? ahead_of(job.probabilities, probabilities_of(i), start) : Ahead{};
    }
    static Ahead ahead_of(const Matrix& m, const char* row, std::int64_t start) {
        if (m.class_stride != size_of(m.dtype)) return {};
        return {row + start * m.class_stride, int(m.class_stride)};
    }

    // The coefficients of a row from class `start` on, with 0 after the last.
    void read_coefficients(int i, std::int64_t start, int count) const {
        const char* const probabilities = probabilities_of(i);
        if (job.teacher) {
            teacher.softmax(i, probabilities, start, count, coefficients);
        } else if (probabilities) {
            read_probabilities(probabilities, start, count);
        }
        const T* weights = weights_of<T>(job);
        const T kept = this->kept, share = this->share;
        T* const r = coefficients;
        store(r + count, filled(T(0)));
        if (is_plain) return;
        if (!probabilities) {
            POLYCE_SIMD
            for (int c = 0; c < count; ++c) r[c] = T(0);
        }
        for (int c = 0; c < count; ++c) {
            r[c] = coefficient(job, r[c], weights ? weights[start + c] : T(1), kept, share);
        }
    }

    POLYCE_APART static std::int64_t first_equal(const T* x, int count, T value) {
        int i = 0;
        const auto skip = [&](auto together) POLYCE_INLINE_LAMBDA {
            for (; i + together <= count; i += together) {
                int found = 0;
                POLYCE_SIMD_SUM(found)
                for (int k = 0; k < together; ++k) found += x[i + k] == value ? 1 : 0;
                if (found) return;
            }
        };
        skip(std::integral_constant<int, 8 * pack_size>{});
        skip(std::integral_constant<int, pack_size>{});
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
    POLYCE_APART std::int64_t largest(const char* row) const {
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
