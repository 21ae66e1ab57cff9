// A group of rows side by side in scratch memory: the way there and back, and sums over classes.
#pragma once

#include "group.hpp"
#include "transpose.hpp"
#include "vector.hpp"

namespace polyce::POLYCE_ISA {

constexpr int chunk = 64;

// Scratch memory has room for some classes of each row, in which a class's rows lie together.
template <class T>
struct Tile : Group<T> {
    using Group<T>::job, Group<T>::lane, Group<T>::first_row, Group<T>::rows, Group<T>::used;
    using Group<T>::each_lane;

    T *logits, *gaps, *coefficients, *packed;

    // From one class to the next. An odd number of cache lines, so that the classes of a row do not
    // all want the same place in the cache.
    static constexpr int pitch = width + 64 / int(sizeof(T));
    static constexpr std::int64_t tile_size = std::int64_t(chunk) * pitch;

    static std::int64_t scratch_bytes(const Job& job) {
        return Group<T>::bytes(job, width) + 4 * tile_size * std::int64_t(sizeof(T));
    }

    Tile(const Job& job, char* scratch)
        : Group<T>(job, scratch, width), logits(reinterpret_cast<T*>(scratch + Group<T>::bytes(job, width))),
          gaps(logits + tile_size), coefficients(gaps + tile_size), packed(coefficients + tile_size) {}

    // Adds Σ term(first of some rows, place in the tile) to a sum of each row: four terms pairwise,
    // then in double. Of a chunk's float64 terms the sum is taken first, and what adding it on loses
    // is kept.
    template <class Term>
    POLYCE_INLINE void add(int count, double* sums, double* lost, Term term) const {
        for (int i = 0; i < used; i += pack_size) {
            const Pack<double> before = load(sums + i);
            Pack<double> sum = sizeof(T) == 8 ? filled(0.0) : before;
            int at = i;
            for (const int end = i + count / 4 * 4 * pitch; at < end; at += 4 * pitch) {
                const Pack<T> two = term(i, at) + term(i, at + pitch);
                sum = sum + widened(two + (term(i, at + 2 * pitch) + term(i, at + 3 * pitch)));
            }
            if (const int end = i + count * pitch; at < end) {
                Pack<T> rest = term(i, at);
                while ((at += pitch) < end) rest = rest + term(i, at);
                sum = sum + widened(rest);
            }
            if constexpr (sizeof(T) == 8) {
                const Pack<double> part = sum, added = (sum = before + part) - before;
                const Pack<double> error = (before - (sum - added)) + (part - added);
                const Pack<double> nothing = filled(0.0);
                store(lost + i, load(lost + i) + chosen(error - error, nothing, error, nothing));
            }
            store(sums + i, sum);
        }
    }

    // Calls f(place in the tile, number of rows, address) for rows that lie evenly.
    template <class F>
    void each_run(const Matrix& m, F f) const {
        // Axes that this array steps through evenly are one.
        std::int64_t size[max_axes], stride[max_axes], index[max_axes], left = first_row;
        int last = -1;
        for (int a = 0; a < job.axes; ++a) {
            const bool joins = last >= 0 && stride[last] == job.axis_size[a] * m.row_stride[a];
            last = joins ? last : last + 1;
            size[last] = joins ? size[last] * job.axis_size[a] : job.axis_size[a];
            stride[last] = m.row_stride[a];
        }
        char* at = m.data;
        for (int a = last; a >= 0; --a) {
            index[a] = left % size[a];
            left /= size[a];
            at += index[a] * stride[a];
        }
        for (int done = 0; done < rows;) {
            const int count = int(std::min<std::int64_t>(size[last] - index[last], rows - done));
            f(done, count, at);
            done += count;
            index[last] += count;
            at += count * stride[last];
            for (int a = last; a > 0 && index[a] == size[a]; --a) {
                at += stride[a - 1] - index[a] * stride[a];
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

    // Whether numbers need no conversion.
    static bool is_own(const Matrix& m) { return m.dtype == (sizeof(T) == 8 ? Float::f64 : Float::f32); }

    // Whether all rows of the tile lie evenly, as numbers that need no conversion.
    bool is_ready(const Matrix& m) const {
        int runs = 0;
        if (is_own(m)) each_run(m, [&](int, int, const char*) { ++runs; });
        return runs == 1;
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
            transpose<T>(from, stride, rows, count, reinterpret_cast<char*>(to), pitch * sizeof(T));
        } else {
            each_run(m, [&](int at, int n, const char* row) {
                with_type(m.dtype, [&](auto type) {
                    for (int c = 0; c < count; ++c) {
                        widen_run<decltype(type)>(row + skipped + c * m.class_stride, between, n, to + c * pitch + at);
                    }
                });
            });
        }
        for (int c = 0; c < count && rows < used; ++c) {
            for (int i = rows; i < used; ++i) to[c * pitch + i] = T(0);
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
            const bool streams = job.streams && between == size_of(m.dtype);
            each_run(m, [&](int at, int n, char* row) {
                if (!streams) {
                    return with_type(m.dtype, [&](auto type) {
                        for (int c = 0; c < count; ++c) {
                            narrow_run<decltype(type)>(gaps + c * pitch + at, n, row + skipped + c * m.class_stride, between);
                        }
                    });
                }
                for (int c = 0; c < count; ++c) {
                    const T* values = gaps + c * pitch + at;
                    char* const place = row + skipped + c * m.class_stride;
                    if (is_own(m)) {
                        stream(place, reinterpret_cast<const char*>(values), n * size_of(m.dtype));
                    } else {
                        narrow_run(m.dtype, values, n, reinterpret_cast<char*>(packed), size_of(m.dtype));
                        stream(place, reinterpret_cast<const char*>(packed), n * size_of(m.dtype));
                    }
                }
            });
            if (streams) end_streaming();
        } else if (is_ready(m) && !job.streams) {
            each_run(m, [&](int, int, char* row) {
                transpose<T>(from, pitch * sizeof(T), count, rows, row + skipped, between);
            });
        } else {
            transpose<T>(from, pitch * sizeof(T), count, rows, reinterpret_cast<char*>(packed), count * sizeof(T));
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
};

}  // namespace polyce::POLYCE_ISA
