// The softmax of a teacher's logits, of rows that are read along their classes: by the teacher's own
// maximum, in a pass of its own, whose exponentials are kept for the passes that follow.
#pragma once

#include "group.hpp"
#include "vector.hpp"

namespace polyce::POLYCE_ISA {

// What is left of an exponential's digits does not depend on the scale: the part of it that T has no
// room for is made up for.
template <class T>
struct TeacherScale {
    T high, low;

    explicit TeacherScale(const Job& job) : high(T(job.teacher_scale)), low(T(job.teacher_scale - double(T(job.teacher_scale)))) {}

    bool is_one() const { return high == T(1) && low == T(0); }

    // exp(scale (t - top)) of the teacher's logits, as a function of t.
    template <bool scaled>
    POLYCE_INLINE auto exponential(T top) const {
        return [high = high, low = low, top](auto t) POLYCE_INLINE_LAMBDA {
            using V = decltype(t);
            return exp_of_difference<scaled>(t, splat<V>(top), splat<V>(high), splat<V>(low));
        };
    }
};

template <class T>
struct Teacher {
    const Job& job;
    Lanes<T>& lane;
    TeacherScale<T> scale;
    Transform<false> transform;
    // Scratch, of each row: its exponentials, and what those of each block refer to.
    T *exponentials, *references;
    std::int64_t pitch, blocks;
    bool keeps, direct;

    static constexpr int block = 2048;
    // With as many of the student's, so many of a row stay in the second cache.
    static constexpr std::int64_t most_kept = 1 << 16;

    Teacher(const Job& job, Lanes<T>& lane, T* scratch, std::int64_t most_rows, bool direct)
        : job(job), lane(lane), scale(job), transform{job.teacher_scale, 0}, exponentials(scratch),
          references(scratch + (keeps_exponentials(job) ? most_rows * padded(job.classes) : 0)), pitch(padded(job.classes)),
          blocks(blocks_of(job)), keeps(keeps_exponentials(job)), direct(direct) {}

    static bool keeps_exponentials(const Job& job) {
        return job.teacher && !job.part.rows && !has_saved(job) && job.classes <= most_kept;
    }
    static std::int64_t blocks_of(const Job& job) { return (job.classes + block - 1) / block; }

    static std::int64_t numbers_in_scratch(const Job& job, std::int64_t most_rows) {
        return keeps_exponentials(job) ? padded(most_rows * (padded(job.classes) + blocks_of(job))) : 0;
    }

    int count_from(std::int64_t start) const { return int(job.classes - start < block ? job.classes - start : block); }

    // The logits of a block, with -inf after the last.
    const T* read_logits(const char* row, std::int64_t start, int count, T* copy) const {
        const Matrix& t = job.probabilities;
        const char* const from = row + start * t.class_stride;
        if (direct && count == block) return reinterpret_cast<const T*>(from);
        widen_run(t.dtype, from, t.class_stride, count, copy);
        store(copy + count, filled(-infinity<T>));
        return copy;
    }

    // Finds what turns a row's logits into probabilities. `copy` has room for a block.
    POLYCE_APART void read(int i, const char* row, T* copy) const {
        scale.is_one() ? read<false>(i, row, copy) : read<true>(i, row, copy);
    }

    template <bool scaled>
    void read(int i, const char* row, T* copy) const {
        T top = -infinity<T>;
        double total = 0.0;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            const std::int64_t full = padded(count), each = job.probabilities.class_stride;
            Ahead ahead;
            if (each == size_of(job.probabilities.dtype)) ahead = {row + (start + block) * each, int(each)};
            const T* const t = read_logits(row, start, count, copy);
            const T most = largest_of(largest_lanes(t, full));
            if (most > top) {
                if (total != 0.0) total *= exp_between(transform, double(top), double(most), sizeof(T) == 8);
                top = most;
            }
            const T m = top == -infinity<T> ? T(0) : top;
            const auto exponential = scale.template exponential<scaled>(m);
            T* const to = keeps ? exponentials + i * pitch + start : copy;
            if (keeps) references[i * blocks + start / block] = m;
            total += sum_of(sum_lanes<T>(full, ahead, [&](std::int64_t c) POLYCE_INLINE_LAMBDA {
                const Pack<T> e = each_part(exponential, load(t + c));
                store(to + c, e);
                return e;
            }));
        }
        lane.teacher_top[i] = top == -infinity<T> ? T(0) : top;
        lane.teacher_sum[i] = total;
    }

    // Exponentials that were kept, of a block, and what makes probabilities of them.
    const T* kept(int i, std::int64_t start) const { return exponentials + i * pitch + start; }
    T factor(int i, std::int64_t start) const {
        const double own = double(references[i * blocks + start / block]);
        return T(exp_between(transform, own, double(lane.teacher_top[i]), sizeof(T) == 8) / lane.teacher_sum[i]);
    }

    // The probabilities from class `start` on.
    POLYCE_APART void softmax(int i, const char* row, std::int64_t start, int count, T* to) const {
        const T top = lane.teacher_top[i];
        if (keeps) {
            const T each = factor(i, start);
            map_run(kept(i, start), count, to, [&](auto e) POLYCE_INLINE_LAMBDA { return e * splat<decltype(e)>(each); });
            return;
        }
        const T each = T(1.0 / lane.teacher_sum[i]);
        with_exponential(top, [&](auto exponential) {
            map_run(read_logits(row, start, count, to), count, to, [&](auto t) POLYCE_INLINE_LAMBDA {
                return exponential(t) * splat<decltype(t)>(each);
            });
        });
    }

    // Calls f with what makes exponentials of logits.
    template <class F>
    void with_exponential(T top, F f) const {
        scale.is_one() ? f(scale.template exponential<false>(top)) : f(scale.template exponential<true>(top));
    }
};

}  // namespace polyce::POLYCE_ISA
