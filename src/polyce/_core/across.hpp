// Many rows side by side, vectorised across them: for few classes, or where rows lie closer
// together than classes do.
//
// A tile of 128 rows is brought, some classes at a time, into scratch memory in which a class's
// row lies together; the rows' few numbers are computed side by side as well.
#pragma once

#include "rows.hpp"

namespace polyce::POLYCE_ISA {

constexpr int width = 128, chunk = 64, step = 16;

// What is known of each row of a tile. Bools are doubles, so that all loops have one width.
template <class T>
struct Lanes {
    alignas(64) T m[width], top[width], once[width], softmax[width], last[width], keep[width];
    alignas(64) T at_pivot[width], decay[width];
    alignas(64) double rest_max[width], rest_sum[width], pivot_logit[width], pivot_coefficient[width];
    alignas(64) double rest_coefficient[width], rest_excess[width], rest_entropy[width];
    alignas(64) double weight[width], label_weight[width], counted[width], scale[width], loss[width];
    alignas(64) std::int64_t pivot[width], first[width], label[width];
    alignas(64) std::int64_t logits[width], probabilities[width], grad[width];
};

template <class T, bool capped>
struct Across {
    const Job& job;
    Transform<capped> transform;
    T *tile, *gaps, *coefficients, *line;
    Lanes<T>& lane;
    T scale, cap, twice_over_cap, share, kept;
    int rows = 0, used = 0;

    static constexpr std::int64_t tile_size = std::int64_t(chunk) * width;

    static std::int64_t scratch_bytes() {
        return std::int64_t(sizeof(Lanes<T>)) + (3 * tile_size + width) * std::int64_t(sizeof(T));
    }

    Across(const Job& job, char* scratch)
        : job(job), transform{job.scale, job.cap},
          tile(reinterpret_cast<T*>(scratch + sizeof(Lanes<T>))), gaps(tile + tile_size),
          coefficients(gaps + tile_size), line(coefficients + tile_size),
          lane(*reinterpret_cast<Lanes<T>*>(scratch)), scale(T(job.scale)), cap(T(job.cap)),
          twice_over_cap(T(capped ? 2.0 * job.scale / job.cap : 0.0)),
          share(T(smoothing_share(job))), kept(T(1.0 - job.smoothing)) {}

    // The distance between a tile's rows where it is the same for all, as it mostly is.
    bool evenly(const std::int64_t* offsets, std::int64_t& stride) const {
        stride = rows > 1 ? offsets[1] - offsets[0] : 0;
        for (int i = 2; i < rows; ++i) {
            if (offsets[i] - offsets[i - 1] != stride) return false;
        }
        return true;
    }

    void fill(const Matrix& m, const std::int64_t* offsets, std::int64_t start, int count, T* to) const {
        std::int64_t stride;
        const bool even = evenly(offsets, stride);
        with_type(m.dtype, [&](auto type) {
            using S = decltype(type);
            for (int c = 0; c < count; ++c) {
                const char* from = m.data + (start + c) * m.class_stride;
                T* lanes = to + c * width;
                if (even) {
                    widen_run<S>(from + offsets[0], stride, rows, lanes);
                } else {
                    for (int i = 0; i < rows; ++i) lanes[i] = T(widen(fetch<S>(from + offsets[i])));
                }
                for (int i = rows; i < used; ++i) lanes[i] = T(0);
            }
        });
    }

    void empty(const Matrix& m, const std::int64_t* offsets, std::int64_t start, int count, const T* from) const {
        std::int64_t stride;
        const bool even = evenly(offsets, stride);
        with_type(m.dtype, [&](auto type) {
            using S = decltype(type);
            for (int c = 0; c < count; ++c) {
                char* to = m.data + (start + c) * m.class_stride;
                const T* lanes = from + c * width;
                if (even) {
                    narrow_run<S>(lanes, rows, to + offsets[0], stride);
                } else {
                    for (int i = 0; i < rows; ++i) narrow_run<S>(lanes + i, 1, to + offsets[i], 0);
                }
            }
        });
    }

    void fill_coefficients(std::int64_t start, int count) const {
        if (job.probabilities.data) fill(job.probabilities, lane.probabilities, start, count, coefficients);
        const T* weights = static_cast<const T*>(job.class_weight);
        for (int c = 0; c < count; ++c) {
            const T weight = weights ? weights[start + c] : T(1);
            T* r = coefficients + c * width;
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) r[i] = coefficient(job, r[i], weight, kept, share);
        }
    }

    void read_targets(std::int64_t first_row) {
        for (int i = 0; i < rows; ++i) {
            lane.weight[i] = job.sample_weight ? job.sample_weight[first_row + i] : 1.0;
        }
        for (int i = rows; i < used; ++i) lane.weight[i] = 0.0;
        POLYCE_SIMD
        for (int i = 0; i < used; ++i) {
            lane.counted[i] = lane.weight[i] != 0.0 ? 1.0 : 0.0;
            lane.label_weight[i] = 1.0;
            lane.label[i] = 0;
        }
        if (job.probabilities.data) return;
        with_type(job.label_dtype, [&](auto type) {
            using L = decltype(type);
            const char* labels = static_cast<const char*>(job.labels) + first_row * std::int64_t(sizeof(L));
            for (int i = 0; i < rows; ++i) lane.label[i] = std::int64_t(fetch<L>(labels + i * std::int64_t(sizeof(L))));
        });
        const double nan = std::numeric_limits<double>::quiet_NaN();
        for (int i = 0; i < rows; ++i) {
            const bool ignored = job.has_ignored && lane.label[i] == job.ignored;
            const bool bad = out_of_range(lane.label[i], job.classes);
            lane.counted[i] = ignored ? 0.0 : lane.counted[i];
            lane.weight[i] = bad && lane.counted[i] != 0.0 ? nan : lane.weight[i];
            lane.label[i] = ignored || bad ? 0 : lane.label[i];
        }
        if (job.class_weight) {
            const T* weights = static_cast<const T*>(job.class_weight);
            for (int i = 0; i < rows; ++i) {
                const bool valid = lane.counted[i] != 0.0 && lane.weight[i] == lane.weight[i];
                if (valid && job.classes) lane.label_weight[i] = weights[lane.label[i]];
            }
        }
    }

    // The first class with the largest logit, as each row's pivot.
    void find_largest() {
        for (int i = 0; i < used; ++i) lane.top[i] = -infinity<T>, lane.pivot[i] = 0;
        for (std::int64_t start = 0; start < job.classes; start += chunk) {
            const int count = int(job.classes - start < chunk ? job.classes - start : chunk);
            fill(job.logits, lane.logits, start, count, tile);
            for (int c = 0; c < count; ++c) {
                const T* x = tile + c * width;
                for (int i = 0; i < used; ++i) {
                    const bool more = x[i] > lane.top[i];
                    lane.top[i] = more ? x[i] : lane.top[i];
                    lane.pivot[i] = more ? start + c : lane.pivot[i];
                }
            }
        }
    }

    // Brings some classes into the tile, each pivot's logit into the state and -inf in its place.
    void fill_apart(std::int64_t start, int count) {
        fill(job.logits, lane.logits, start, count, tile);
        for (int i = 0; i < rows; ++i) {
            const std::int64_t c = lane.pivot[i] - start;
            if (c < 0 || c >= count) continue;
            T& x = tile[c * width + i];
            lane.pivot_logit[i] = double(x);
            x = -infinity<T>;
        }
    }

    void raise_to_top(std::int64_t start, int count) {
        for (int i = 0; i < used; ++i) lane.top[i] = -infinity<T>;
        for (int c = 0; c < count; ++c) {
            const T* x = tile + c * width;
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) lane.top[i] = x[i] > lane.top[i] ? x[i] : lane.top[i];
        }
        if (job.stats.prediction || job.stats.correct) {
            for (int i = 0; i < rows; ++i) {
                if (!(double(lane.top[i]) > lane.rest_max[i])) continue;
                int c = 0;
                while (c + 1 < count && tile[c * width + i] != lane.top[i]) ++c;
                lane.first[i] = start + c;
            }
        }
        if (start == 0) {
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) lane.rest_max[i] = double(lane.top[i]);
        } else {
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) {
                const double before = lane.rest_max[i], found = double(lane.top[i]);
                const double top = found > before ? found : before;
                const double reference = top == -infinity<double> ? 0.0 : top;
                const double own = before == -infinity<double> ? 0.0 : before;
                const double decay = exp_negative_full(difference(transform, before, reference));
                const double risen = difference(transform, reference, own);
                const double sum = lane.rest_sum[i];
                const double entropy = (lane.rest_entropy[i] + sum * risen) * decay;
                lane.rest_entropy[i] = sum == 0.0 ? lane.rest_entropy[i] : entropy;
                lane.rest_sum[i] = sum == 0.0 ? 0.0 : sum * decay;
                const double r = lane.rest_coefficient[i];
                lane.rest_excess[i] = lane.rest_excess[i] + (r == 0.0 ? 0.0 : r * risen);
                lane.rest_max[i] = top;
            }
        }
        set_references();
    }

    void set_references() {
        POLYCE_SIMD
        for (int i = 0; i < used; ++i) {
            lane.m[i] = lane.rest_max[i] == -infinity<double> ? T(0) : T(lane.rest_max[i]);
        }
        if constexpr (capped) {
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) lane.decay[i] = decay_of(lane.m[i], twice_over_cap);
        }
    }

    // x(logit) - x(m), from `tile` into `to`.
    void read_gaps(int count, T* to) const {
        for (int c = 0; c < count; ++c) {
            const T* x = tile + c * width;
            T* gap = to + c * width;
            if constexpr (capped) {
                POLYCE_SIMD
                for (int i = 0; i < used; ++i) gap[i] = capped_gap(x[i], lane.m[i], lane.decay[i], scale, cap);
            } else {
                POLYCE_SIMD
                for (int i = 0; i < used; ++i) gap[i] = (x[i] - lane.m[i]) * scale;
            }
        }
    }

    // Adds Σ term(place in the tile) to a sum of each row: four terms pairwise, then in double.
    template <class Term>
    POLYCE_INLINE void add(int count, double* sums, Term term) const {
        int c = 0;
        for (; c + 4 <= count; c += 4) {
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) {
                const int at = c * width + i;
                sums[i] += double((term(at) + term(at + width)) + (term(at + 2 * width) + term(at + 3 * width)));
            }
        }
        for (; c < count; ++c) {
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) sums[i] += double(term(c * width + i));
        }
    }

    void sum() {
        for (int i = 0; i < used; ++i) {
            lane.rest_max[i] = -infinity<double>;
            lane.rest_sum[i] = lane.rest_excess[i] = lane.rest_entropy[i] = 0.0;
            lane.rest_coefficient[i] = lane.pivot_logit[i] = 0.0;
            lane.first[i] = 0;
        }
        T* const t = gaps;
        const T* const r = coefficients;
        for (std::int64_t start = 0; start < job.classes; start += chunk) {
            const int count = int(job.classes - start < chunk ? job.classes - start : chunk);
            fill_apart(start, count);
            raise_to_top(start, count);
            read_gaps(count, t);
            if (job.stats.entropy) {
                add(count, lane.rest_entropy, [&](int at) POLYCE_INLINE_LAMBDA {
                    const T e = exp_negative(t[at]);
                    return e == T(0) ? T(0) : -t[at] * e;
                });
            }
            if (has_coefficients(job)) {
                fill_coefficients(start, count);
                for (int i = 0; i < rows; ++i) {
                    const std::int64_t c = lane.pivot[i] - start;
                    if (c < 0 || c >= count) continue;
                    lane.pivot_coefficient[i] = double(r[c * width + i]);
                    coefficients[c * width + i] = T(0);
                }
                add(count, lane.rest_coefficient, [&](int at) POLYCE_INLINE_LAMBDA { return r[at]; });
                add(count, lane.rest_excess, [&](int at) POLYCE_INLINE_LAMBDA {
                    // Only what is infinite is skipped: a nan has to stay.
                    return r[at] == T(0) && t[at] == -infinity<T> ? T(0) : r[at] * -t[at];
                });
            }
            exponentials(count);
            add(count, lane.rest_sum, [&](int at) POLYCE_INLINE_LAMBDA { return t[at]; });
        }
    }

    // exp of the gaps, in their place.
    void exponentials(int count) const {
        for (int c = 0; c < count; ++c) {
            T* t = gaps + c * width;
            POLYCE_SIMD
            for (int i = 0; i < used; ++i) t[i] = exp_negative(t[i]);
        }
    }

    RowState state(int i) const {
        return {lane.rest_max[i], lane.rest_sum[i], lane.pivot_logit[i], lane.pivot_coefficient[i],
                lane.rest_coefficient[i], lane.rest_excess[i], lane.rest_entropy[i]};
    }

    template <bool with_gradient>
    void finish() {
        const double slope_scale = capped ? 1.0 : job.scale;
        POLYCE_SIMD
        for (int i = 0; i < used; ++i) {
            const RowState s = state(i);
            const RowScalars found = scalars(transform, s, sizeof(T) == 8);
            const double penalty = job.z_loss * lane.label_weight[i];
            const double lse = log_sum_exp(transform, s, found);
            const double loss = row_loss(s, found, penalty, lse);
            lane.loss[i] = lane.counted[i] == 0.0 ? 0.0 : lane.weight[i] * loss;
            if (with_gradient) {
                const RowGradient g = row_gradient(s, found, penalty, lse);
                const double factor = lane.scale[i];
                lane.once[i] = T(factor * slope_scale * g.softmax);
                lane.softmax[i] = T(g.softmax);
                lane.last[i] = T(factor * slope_scale);
                lane.at_pivot[i] = T(g.at_pivot * factor * slope(transform, s.pivot_logit));
                lane.keep[i] = T(lane.counted[i]);
            }
        }
    }

    void write_gradient() {
        const bool alone = job.classes <= chunk, coefficients_too = has_coefficients(job);
        for (std::int64_t start = 0; start < job.classes; start += chunk) {
            const int count = int(job.classes - start < chunk ? job.classes - start : chunk);
            if (!alone) {
                // What the sums were made of has given way to the next classes.
                fill(job.logits, lane.logits, start, count, tile);
                read_gaps(count, gaps);
                exponentials(count);
                if (coefficients_too) fill_coefficients(start, count);
            }
            for (int c = 0; c < count; ++c) {
                T* t = gaps + c * width;
                const T *r = coefficients + c * width, *x = tile + c * width;
                if (coefficients_too) {
                    POLYCE_SIMD
                    for (int i = 0; i < used; ++i) {
                        const T entry = (t[i] * lane.softmax[i] - r[i]) * lane.last[i];
                        t[i] = lane.keep[i] == T(0) ? T(0) : entry;
                    }
                } else {
                    POLYCE_SIMD
                    for (int i = 0; i < used; ++i) t[i] = lane.keep[i] == T(0) ? T(0) : t[i] * lane.once[i];
                }
                if constexpr (capped) {
                    POLYCE_SIMD
                    for (int i = 0; i < used; ++i) {
                        const T slope = slope_of(decay_of(x[i], twice_over_cap), scale);
                        t[i] = lane.keep[i] == T(0) ? T(0) : t[i] * slope;
                    }
                }
            }
            for (int i = 0; i < rows; ++i) {
                const std::int64_t c = lane.pivot[i] - start;
                if (c < 0 || c >= count) continue;
                gaps[c * width + i] = lane.keep[i] == T(0) ? T(0) : lane.at_pivot[i];
            }
            empty(job.grad, lane.grad, start, count, gaps);
        }
    }

    // The sum of the losses of one tile of rows.
    double run(std::int64_t first_row, int count) {
        rows = count;
        used = (rows + step - 1) / step * step;
        row_offsets(job, job.logits.row_stride, first_row, rows, lane.logits);
        if (job.probabilities.data) {
            row_offsets(job, job.probabilities.row_stride, first_row, rows, lane.probabilities);
        }
        read_targets(first_row);
        const bool by_labels = !job.probabilities.data;
        if (by_labels) {
            for (int i = 0; i < used; ++i) {
                lane.pivot[i] = lane.label[i];
                lane.pivot_coefficient[i] = label_coefficient(job, lane.label_weight[i]);
            }
        } else {
            for (int i = 0; i < used; ++i) lane.pivot_coefficient[i] = 0.0;
            find_largest();
        }
        sum();
        if (by_labels && has_coefficients(job)) {
            for (int i = 0; i < used; ++i) {
                lane.pivot_coefficient[i] = label_coefficient(job, lane.label_weight[i]);
            }
        }
        if (job.grad.data) {
            row_offsets(job, job.grad.row_stride, first_row, rows, lane.grad);
            for (int i = 0; i < rows; ++i) {
                const double cotangent = job.cotangents ? job.cotangents[first_row + i] : job.cotangent;
                lane.scale[i] = lane.counted[i] == 0.0 ? 0.0 : lane.weight[i] * cotangent;
            }
            for (int i = rows; i < used; ++i) lane.scale[i] = 0.0;
            finish<true>();
            write_gradient();
        } else {
            finish<false>();
        }
        if (job.stats.valid) {
            for (int i = 0; i < rows; ++i) {
                const bool invalid = lane.weight[i] != lane.weight[i];
                const RowTarget target{lane.label[i], lane.counted[i] != 0.0, invalid, lane.weight[i],
                                       lane.label_weight[i]};
                const char* p = by_labels ? nullptr : job.probabilities.data + lane.probabilities[i];
                store_stats<T, capped>(job, transform, first_row + i, target, state(i), lane.pivot[i], lane.first[i], p);
            }
        }
        if (job.losses) {
            const int size = size_of(job.result_dtype);
            narrow_run(job.result_dtype, lane.loss, rows, static_cast<char*>(job.losses) + first_row * size, size);
        }
        double total = 0.0;
        for (int i = 0; i < rows; ++i) total += lane.loss[i];
        return total;
    }

    void log_softmax(std::int64_t first_row, int count) {
        rows = count;
        used = (rows + step - 1) / step * step;
        row_offsets(job, job.logits.row_stride, first_row, rows, lane.logits);
        row_offsets(job, job.grad.row_stride, first_row, rows, lane.grad);
        for (int i = 0; i < used; ++i) {
            lane.weight[i] = lane.label_weight[i] = lane.counted[i] = lane.pivot_coefficient[i] = 1.0;
        }
        find_largest();
        sum();
        finish<false>();
        for (int i = 0; i < used; ++i) lane.m[i] = T(lane.pivot_logit[i]);
        if constexpr (capped) {
            for (int i = 0; i < used; ++i) lane.decay[i] = decay_of(lane.m[i], twice_over_cap);
        }
        for (std::int64_t start = 0; start < job.classes; start += chunk) {
            const int here = int(job.classes - start < chunk ? job.classes - start : chunk);
            fill(job.logits, lane.logits, start, here, tile);
            read_gaps(here, gaps);
            for (int c = 0; c < here; ++c) {
                T* t = gaps + c * width;
                for (int i = 0; i < used; ++i) t[i] = t[i] - T(lane.loss[i]);
            }
            for (int i = 0; i < rows; ++i) {
                const std::int64_t c = lane.pivot[i] - start;
                if (c >= 0 && c < here) gaps[c * width + i] = -T(lane.loss[i]);
            }
            empty(job.grad, lane.grad, start, here, gaps);
        }
    }
};

}  // namespace polyce::POLYCE_ISA
