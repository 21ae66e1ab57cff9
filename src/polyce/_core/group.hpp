// A group of rows side by side: what their targets say, and what is found out about each.
#pragma once

#include "rows.hpp"

namespace polyce::POLYCE_ISA {

constexpr int step = 16;

// What is known of each row. Bools are numbers, so that all loops have one width.
template <class T>
struct Lanes {
    alignas(64) T rest_max[width], pivot_logit[width], m[width], top[width], decay[width];
    alignas(64) T once[width], softmax[width], last[width], at_pivot[width], kept[width];
    alignas(64) T place[width], found[width];  // of classes in the tile
    alignas(64) double rest_sum[width], pivot_coefficient[width], rest_coefficient[width];
    alignas(64) double rest_excess[width], rest_entropy[width];
    // What rounding took from these sums, in float64.
    alignas(64) double lost_sum[width], lost_coefficient[width], lost_excess[width], lost_entropy[width];
    alignas(64) double weight[width], label_weight[width], counted[width], factor[width], loss[width];
    alignas(64) std::int64_t pivot[width], first[width], number[width];
    // Where the pivot is the largest class: the label, and its logit.
    alignas(64) std::int64_t label[width];
    alignas(64) T label_logit[width];
    // Where lse or entropy have cotangents: those of each row, and what they multiply exp(t) and
    // exp(t)·(-t) by.
    alignas(64) double grad_lse[width], grad_entropy[width];
    alignas(64) T more[width], by_gap[width];
    // For the Brier score: of labels the sum of the exponentials' squares, of probabilities that of
    // the differences to them, and what these are made of. For the rank: the larger logits so far.
    alignas(64) double squares[width], lost_squares[width], pivot_target[width];
    alignas(64) T to_probability[width];
    alignas(64) std::int64_t rank[width];
    // A teacher's largest logit, and the sum of its exponentials.
    alignas(64) T teacher_top[width];
    alignas(64) double teacher_sum[width];
};

template <class T>
struct Group {
    const Job& job;
    Lanes<T>& lane;
    std::int64_t first_row = 0;
    int rows = 0, used = 0;
    bool by_labels;
    // Scratch for the entries of so many rows (entries.hpp).
    char* entries_scratch;
    std::int64_t most_rows;

    Group(const Job& job, char* scratch, std::int64_t most_rows)
        : job(job), lane(*reinterpret_cast<Lanes<T>*>(scratch)), by_labels(has_labels(job)),
          entries_scratch(scratch + sizeof(Lanes<T>)), most_rows(most_rows) {}

    // What a group takes of the scratch memory, before what others take.
    static std::int64_t bytes(const Job& job, std::int64_t most_rows) {
        const std::int64_t each = 2 * sizeof(double) + sizeof(T);
        return std::int64_t(sizeof(Lanes<T>)) + (most_rows * job.entries * each + 63) / 64 * 64;
    }

    void begin(std::int64_t first, int count) {
        first_row = first;
        rows = count;
        used = (rows + step - 1) / step * step;
        if (!job.in_order) row_offsets(job, job.number_stride, first, count, lane.number);
    }

    std::int64_t number(int i) const { return job.in_order ? first_row + i : lane.number[i]; }

    // Calls f for each row and, so that registers are full, for some that are not there.
    template <class F>
    POLYCE_INLINE void each_lane(F f) const {
        const int end = used;
        for (int start = 0; start < end; start += step) {
            POLYCE_SIMD
            for (int i = start; i < start + step; ++i) f(i);
        }
    }

    bool is_counted(int i) const { return lane.counted[i] != 0.0; }

    // What the targets say of the rows before their logits are looked at. Rows that are not there
    // are not counted. Labels are counted from the first class that is here.
    void read_targets() {
        for (int i = 0; i < rows; ++i) lane.weight[i] = job.sample_weight ? job.sample_weight[number(i)] : 1.0;
        for (int i = rows; i < used; ++i) lane.weight[i] = 0.0;
        if (by_labels) {
            read_labels();
        } else {
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                const bool counted = lane.weight[i] != 0.0;
                lane.counted[i] = counted ? 1.0 : 0.0;
                lane.kept[i] = counted ? T(1) : T(0);
                lane.label_weight[i] = 1.0;
                lane.pivot[i] = 0;
            });
        }
        if (job.sparse && !job.check_labels) spoil_rows();
        if (job.part.teacher) read_teachers();
        if (job.grad.data) read_factors();
    }

private:
    // Rows with a class out of range are nan.
    void spoil_rows() {
        for (int i = 0; i < rows; ++i) {
            if (!is_counted(i) || first_bad_label(job, number(i) * job.entries, job.entries) < 0) continue;
            lane.weight[i] = std::numeric_limits<double>::quiet_NaN();
        }
    }

    // What the softmax of each row's teacher is made of, whose parts have been joined.
    void read_teachers() {
        const double *const tops = job.part.teacher, *const sums = tops + job.rows;
        for (int i = 0; i < used; ++i) {
            const double top = i < rows ? tops[number(i)] : 0.0;
            lane.teacher_top[i] = T(top == -infinity<double> ? 0.0 : top);
            lane.teacher_sum[i] = i < rows ? sums[number(i)] : 1.0;
        }
    }

    void read_labels() {
        with_type(job.label_dtype, [&](auto type) {
            using L = decltype(type);
            const char* labels = static_cast<const char*>(job.labels);
            const auto read = [&](int i, std::int64_t number) POLYCE_INLINE_LAMBDA {
                lane.pivot[i] = std::int64_t(fetch<L>(labels + number * std::int64_t(sizeof(L))));
            };
            if (job.in_order) {
                POLYCE_SIMD
                for (int i = 0; i < rows; ++i) read(i, first_row + i);
            } else {
                for (int i = 0; i < rows; ++i) read(i, lane.number[i]);
            }
        });
        for (int i = rows; i < used; ++i) lane.pivot[i] = 0;
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const std::int64_t ignored = job.ignored, classes = all_classes(job);
        const bool has_ignored = job.has_ignored;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const std::int64_t label = lane.pivot[i];
            const double weight = lane.weight[i];
            const bool counted = (weight != 0.0) & !(has_ignored & (label == ignored));
            const bool bad = out_of_range(label, classes);
            lane.counted[i] = counted ? 1.0 : 0.0;
            lane.kept[i] = counted ? T(1) : T(0);
            lane.weight[i] = bad & counted ? nan : weight;
            lane.label_weight[i] = 1.0;
            lane.pivot[i] = bad ? 0 : label;
        });
        if (job.class_weight && classes) read_label_weights();
        if (const std::int64_t start = job.part.start) each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.pivot[i] -= start; });
    }

    void read_label_weights() {
        const T* weights = static_cast<const T*>(job.class_weight);
        for (int i = 0; i < rows; ++i) {
            const bool valid = is_counted(i) && lane.weight[i] == lane.weight[i];
            if (valid) lane.label_weight[i] = weights[lane.pivot[i]];
        }
    }

    void read_factors() {
        const double same = job.cotangent;
        for (int i = 0; i < rows; ++i) lane.factor[i] = job.cotangents ? job.cotangents[number(i)] : same;
        for (int i = rows; i < used; ++i) lane.factor[i] = 0.0;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.factor[i] = lane.counted[i] == 0.0 ? 0.0 : lane.weight[i] * lane.factor[i];
        });
        if (!job.grad_lse && !job.grad_entropy) return;
        for (int i = 0; i < used; ++i) {
            const bool counted = is_counted(i);
            lane.grad_lse[i] = counted && job.grad_lse ? job.grad_lse[number(i)] : 0.0;
            lane.grad_entropy[i] = counted && job.grad_entropy ? job.grad_entropy[number(i)] : 0.0;
        }
    }
};

}  // namespace polyce::POLYCE_ISA
