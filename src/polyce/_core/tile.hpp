// A tile of rows side by side: where its numbers lie, and what its targets say.
#pragma once

#include "rows.hpp"
#include "transpose.hpp"

namespace polyce::POLYCE_ISA {

constexpr int width = 128, chunk = 64, step = 16;

// What is known of each row of a tile. Bools are numbers, so that all loops have one width.
template <class T>
struct Lanes {
    using Place = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
    alignas(64) T rest_max[width], pivot_logit[width], m[width], top[width], decay[width];
    alignas(64) T once[width], softmax[width], last[width], at_pivot[width], kept[width];
    alignas(64) Place place[width], found[width];  // of classes in the tile
    alignas(64) double rest_sum[width], pivot_coefficient[width], rest_coefficient[width];
    alignas(64) double rest_excess[width], rest_entropy[width];
    // What rounding took from these sums, in float64.
    alignas(64) double lost_sum[width], lost_coefficient[width], lost_excess[width], lost_entropy[width];
    alignas(64) double weight[width], label_weight[width], counted[width], factor[width], loss[width];
    alignas(64) std::int64_t pivot[width], first[width];
    // Where the pivot is the largest class: the label, and its logit.
    alignas(64) std::int64_t label[width];
    alignas(64) T label_logit[width];
};

// Scratch memory has room for some classes of each row, in which a class's rows lie together.
template <class T>
struct Tile {
    const Job& job;
    Lanes<T>& lane;
    T *logits, *gaps, *coefficients, *packed;
    std::int64_t first_row = 0;
    int rows = 0, used = 0;
    bool by_labels;

    static constexpr std::int64_t tile_size = std::int64_t(chunk) * width;

    static std::int64_t scratch_bytes() {
        return std::int64_t(sizeof(Lanes<T>)) + 4 * tile_size * std::int64_t(sizeof(T));
    }

    Tile(const Job& job, char* scratch)
        : job(job), lane(*reinterpret_cast<Lanes<T>*>(scratch)),
          logits(reinterpret_cast<T*>(scratch + sizeof(Lanes<T>))), gaps(logits + tile_size),
          coefficients(gaps + tile_size), packed(coefficients + tile_size),
          by_labels(!job.probabilities.data) {}

    void begin(std::int64_t first, int count) {
        first_row = first;
        rows = count;
        used = (rows + step - 1) / step * step;
    }

    // Calls f for each row and, so that registers are full, for some that are not there.
    template <class F>
    POLYCE_INLINE void each_lane(F f) const {
        const int end = used;
        for (int start = 0; start < end; start += step) {
            POLYCE_SIMD
            for (int i = start; i < start + step; ++i) f(i);
        }
    }

    // Adds Σ term(row, place in the tile) to a sum of each row: four terms pairwise, then in double.
    // Of a chunk's float64 terms the sum is taken first, and what adding it on loses is kept.
    template <class Term>
    POLYCE_INLINE void add(int count, double* sums, double* lost, Term term) const {
        if constexpr (sizeof(T) == 8) {
            alignas(64) double part[width];
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { part[i] = 0.0; });
            add_up(count, part, term);
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                const double sum = sums[i] + part[i], added = sum - sums[i];
                const double error = (sums[i] - (sum - added)) + (part[i] - added);
                lost[i] += error - error == 0.0 ? error : 0.0;
                sums[i] = sum;
            });
        } else {
            add_up(count, sums, term);
        }
    }

    template <class Term>
    POLYCE_INLINE void add_up(int count, double* sums, Term term) const {
        int c = 0;
        for (; c + 4 <= count; c += 4) {
            const int at = c * width;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                const T one = term(i, at + i) + term(i, at + width + i);
                const T two = term(i, at + 2 * width + i) + term(i, at + 3 * width + i);
                sums[i] += double(one + two);
            });
        }
        for (; c < count; ++c) {
            const int at = c * width;
            each_lane([&](int i) POLYCE_INLINE_LAMBDA { sums[i] += double(term(i, at + i)); });
        }
    }

    // Calls f(place in the tile, number of rows, address) for rows that lie evenly.
    template <class F>
    void each_run(const Matrix& m, F f) const {
        const int last = job.axes - 1;
        std::int64_t index[max_axes], left = first_row;
        char* at = m.data;
        for (int a = last; a >= 0; --a) {
            index[a] = left % job.axis_size[a];
            left /= job.axis_size[a];
            at += index[a] * m.row_stride[a];
        }
        for (int done = 0; done < rows;) {
            const std::int64_t until_end = job.axis_size[last] - index[last];
            const int count = int(until_end < rows - done ? until_end : rows - done);
            f(done, count, at);
            done += count;
            index[last] += count;
            at += count * m.row_stride[last];
            for (int a = last; a > 0 && index[a] == job.axis_size[a]; --a) {
                at += m.row_stride[a - 1] - index[a] * m.row_stride[a];
                index[a] = 0;
                ++index[a - 1];
            }
        }
    }

    // Whether the classes of a row lie together, unlike those of the tile.
    static bool is_row_by_row(const Matrix& m, int count) {
        return m.class_stride == size_of(m.dtype) && count > 1;
    }

    bool is_dense(const Matrix& m, int count) const {
        return m.row_stride[job.axes - 1] == count * std::int64_t(size_of(m.dtype));
    }

    // Whether all rows of the tile lie evenly, as numbers that need no conversion.
    bool is_ready(const Matrix& m) const {
        const int last = job.axes - 1;
        const Float own = sizeof(T) == 8 ? Float::f64 : Float::f32;
        return m.dtype == own && first_row % job.axis_size[last] + rows <= job.axis_size[last];
    }

    void fill(const Matrix& m, std::int64_t start, int count, T* to) const {
        const std::int64_t skipped = start * m.class_stride, between = m.row_stride[job.axes - 1];
        if (is_row_by_row(m, count)) {
            const char* from = reinterpret_cast<const char*>(packed);
            std::int64_t stride = count * std::int64_t(sizeof(T));
            if (is_ready(m)) {
                stride = between;
                each_run(m, [&](int, int, const char* row) { from = row + skipped; });
            } else {
                pack(m, skipped, count);
            }
            transpose<T>(from, stride, rows, count, reinterpret_cast<char*>(to), width * sizeof(T));
        } else {
            each_run(m, [&](int at, int n, const char* row) {
                for (int c = 0; c < count; ++c) {
                    widen_run(m.dtype, row + skipped + c * m.class_stride, between, n, to + c * width + at);
                }
            });
        }
        for (int c = 0; c < count && rows < used; ++c) {
            for (int i = rows; i < used; ++i) to[c * width + i] = T(0);
        }
    }

    void pack(const Matrix& m, std::int64_t skipped, int count) const {
        const std::int64_t between = m.row_stride[job.axes - 1];
        each_run(m, [&](int at, int n, const char* row) {
            T* to = packed + at * count;
            if (is_dense(m, count)) {
                widen_run(m.dtype, row + skipped, m.class_stride, n * count, to);
            } else {
                for (int i = 0; i < n; ++i) {
                    widen_run(m.dtype, row + skipped + i * between, m.class_stride, count, to + i * count);
                }
            }
        });
    }

    // Writes what `gaps` holds to the gradient's place.
    void empty(std::int64_t start, int count) const {
        const Matrix& m = job.grad;
        const std::int64_t skipped = start * m.class_stride, between = m.row_stride[job.axes - 1];
        const char* const from = reinterpret_cast<const char*>(gaps);
        if (!is_row_by_row(m, count)) {
            each_run(m, [&](int at, int n, char* row) {
                for (int c = 0; c < count; ++c) {
                    narrow_run(m.dtype, gaps + c * width + at, n, row + skipped + c * m.class_stride, between);
                }
            });
        } else if (is_ready(m) && !job.streams) {
            each_run(m, [&](int, int, char* row) {
                transpose<T>(from, width * sizeof(T), count, rows, row + skipped, between);
            });
        } else {
            transpose<T>(from, width * sizeof(T), count, rows, reinterpret_cast<char*>(packed), count * sizeof(T));
            unpack(m, skipped, count);
        }
    }

    void unpack(const Matrix& m, std::int64_t skipped, int count) const {
        const std::int64_t between = m.row_stride[job.axes - 1];
        each_run(m, [&](int at, int n, char* row) {
            const T* from = packed + at * count;
            if (is_dense(m, count) && job.streams) {
                const int size = size_of(m.dtype);
                char* narrow = reinterpret_cast<char*>(logits);
                narrow_run(m.dtype, from, n * count, narrow, size);
                stream(row, narrow, n * count * size);
            } else if (is_dense(m, count)) {
                narrow_run(m.dtype, from, n * count, row, m.class_stride);
            } else {
                for (int i = 0; i < n; ++i) {
                    narrow_run(m.dtype, from + i * count, count, row + skipped + i * between, m.class_stride);
                }
            }
        });
        if (job.streams) end_streaming();
    }

    // What the targets say of the rows before their logits are looked at. Rows that are not there
    // are not counted.
    void read_targets() {
        for (int i = 0; i < rows; ++i) lane.weight[i] = job.sample_weight ? job.sample_weight[first_row + i] : 1.0;
        for (int i = rows; i < used; ++i) lane.weight[i] = 0.0;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.counted[i] = lane.weight[i] != 0.0 ? 1.0 : 0.0;
            lane.label_weight[i] = 1.0;
        });
        if (by_labels) read_labels();
        each_lane([&](int i) POLYCE_INLINE_LAMBDA { lane.kept[i] = T(lane.counted[i]); });
    }

    void read_labels() {
        with_type(job.label_dtype, [&](auto type) {
            using L = decltype(type);
            const char* labels = static_cast<const char*>(job.labels) + first_row * std::int64_t(sizeof(L));
            POLYCE_SIMD
            for (int i = 0; i < rows; ++i) {
                lane.pivot[i] = std::int64_t(fetch<L>(labels + i * std::int64_t(sizeof(L))));
            }
        });
        for (int i = rows; i < used; ++i) lane.pivot[i] = 0;
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const std::int64_t ignored = job.ignored, classes = job.classes;
        if (job.has_ignored) {
            each_lane([&](int i) POLYCE_INLINE_LAMBDA {
                lane.counted[i] = lane.pivot[i] == ignored ? 0.0 : lane.counted[i];
            });
        }
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            const bool bad = out_of_range(lane.pivot[i], classes);
            const double weight = lane.counted[i] == 0.0 ? lane.weight[i] : nan;
            lane.weight[i] = bad ? weight : lane.weight[i];
            lane.pivot[i] = bad ? 0 : lane.pivot[i];
        });
        if (!job.class_weight || !job.classes) return;
        const T* weights = static_cast<const T*>(job.class_weight);
        for (int i = 0; i < rows; ++i) {
            const bool valid = lane.counted[i] != 0.0 && lane.weight[i] == lane.weight[i];
            if (valid) lane.label_weight[i] = weights[lane.pivot[i]];
        }
    }

    void read_factors() {
        const double* cotangents = job.cotangents ? job.cotangents + first_row : nullptr;
        const double same = job.cotangent;
        for (int i = 0; i < rows; ++i) lane.factor[i] = cotangents ? cotangents[i] : same;
        for (int i = rows; i < used; ++i) lane.factor[i] = 0.0;
        each_lane([&](int i) POLYCE_INLINE_LAMBDA {
            lane.factor[i] = lane.counted[i] == 0.0 ? 0.0 : lane.weight[i] * lane.factor[i];
        });
    }
};

}  // namespace polyce::POLYCE_ISA
