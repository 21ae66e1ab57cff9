// Rows one after the other, vectorised along their classes: for many classes that lie close by.
//
// A row goes by blocks that stay in the first cache. Sums have 32 fixed lanes, of at most 16 terms
// added pairwise, before they become double; so they have the same bits for every vector width.
#pragma once

#include "rows.hpp"

namespace polyce::POLYCE_ISA {

constexpr int lanes = 32, group = 4 * lanes, sixteen = 4 * group, block = 4 * sixteen;

// So many exponentials of a row stay in the second cache.
constexpr std::int64_t most_kept = 1 << 18;

POLYCE_INLINE double fold(double (&sums)[lanes]) {
    for (int width = lanes / 2; width; width /= 2) {
        POLYCE_SIMD
        for (int l = 0; l < width; ++l) sums[l] += sums[l + width];
    }
    return sums[0];
}

// Arithmetic leaves the memory idle unless what comes next is asked for meanwhile: into the first
// cache what is needed next, into the second what is so many bytes further on.
constexpr int far_ahead = 32768;

POLYCE_INLINE void fetch_ahead(const char* place, int bytes) {
    for (int at = 0; at < bytes; at += 64) {
        POLYCE_FETCH(place + at, 3);
        POLYCE_FETCH(place + at + far_ahead, 1);
    }
}

// What a sum fetches meanwhile: as many numbers as it adds, of so many bytes each; none by default.
struct Ahead {
    const char* place = nullptr;
    int bytes_each = 0;
};

// Σ term(i) for i below `count`, a multiple of `group`.
template <class T, class Term>
POLYCE_INLINE double lane_sum(int count, Ahead ahead, Term term) {
    const auto four = [&](int i) POLYCE_INLINE_LAMBDA {
        return (term(i) + term(i + lanes)) + (term(i + 2 * lanes) + term(i + 3 * lanes));
    };
    alignas(64) double sums[lanes];
    for (int l = 0; l < lanes; ++l) sums[l] = 0.0;
    int i = 0;
    for (; i + sixteen <= count; i += sixteen) {
        if (ahead.place) fetch_ahead(ahead.place + i * ahead.bytes_each, sixteen * ahead.bytes_each);
        POLYCE_SIMD
        for (int l = 0; l < lanes; ++l) {
            const T sum = (four(i + l) + four(i + l + group)) +
                          (four(i + l + 2 * group) + four(i + l + 3 * group));
            sums[l] += double(sum);
        }
    }
    for (; i < count; i += group) {
        POLYCE_SIMD
        for (int l = 0; l < lanes; ++l) sums[l] += double(four(i + l));
    }
    return fold(sums);
}

// May pass over a nan, which the sums do not.
template <class T>
POLYCE_INLINE T block_max(const T* x, int count) {
    T a = -infinity<T>, b = a, c = a, d = a;
    const int quarter = count / 4;
    POLYCE_SIMD_MAX(a, b, c, d)
    for (int i = 0; i < quarter; ++i) {
        a = x[i] > a ? x[i] : a;
        b = x[i + quarter] > b ? x[i + quarter] : b;
        c = x[i + 2 * quarter] > c ? x[i + 2 * quarter] : c;
        d = x[i + 3 * quarter] > d ? x[i + 3 * quarter] : d;
    }
    a = b > a ? b : a;
    c = d > c ? d : c;
    return c > a ? c : a;
}

template <class T, bool capped>
struct Along {
    const Job& job;
    Transform<capped> transform;
    // Scratch: the logits of a block, what their exponents are, the coefficients.
    T *copy, *gaps, *coefficients;
    // The exponentials of a row, which its gradient is made of, and what each block's refer to.
    T *exponentials, *references;
    bool direct, keeps;
    T scale, cap, twice_over_cap, share, kept;

    Along(const Job& job, char* scratch)
        : job(job), transform{job.scale, job.cap}, copy(reinterpret_cast<T*>(scratch)),
          gaps(copy + block), coefficients(gaps + block), scale(T(job.scale)), cap(T(job.cap)),
          twice_over_cap(T(capped ? 2.0 * job.scale / job.cap : 0.0)),
          share(T(smoothing_share(job))), kept(T(1.0 - job.smoothing)) {
        direct = is_direct(job.logits);
        keeps = keeps_exponentials(job);
        exponentials = coefficients + block;
        references = exponentials + (job.classes + block - 1) / block * block;
    }

    // Where nothing but the exponentials makes a gradient, they are kept, not computed again.
    static bool keeps_exponentials(const Job& job) {
        return job.grad.data && !job.backward_only && !capped && !has_coefficients(job) &&
               !job.stats.entropy && job.classes <= most_kept;
    }

    static std::int64_t scratch_bytes(const Job& job) {
        const std::int64_t blocks = keeps_exponentials(job) ? (job.classes + block - 1) / block : 0;
        return (3 * block + blocks * (block + 1)) * std::int64_t(sizeof(T));
    }

    static bool is_direct(const Matrix& m) {
        const auto address = reinterpret_cast<std::uintptr_t>(m.data);
        bool aligned = address % alignof(T) == 0;
        for (std::int64_t stride : m.row_stride) aligned = aligned && stride % std::int64_t(alignof(T)) == 0;
        const Float own = sizeof(T) == 8 ? Float::f64 : Float::f32;
        return m.dtype == own && m.class_stride == std::int64_t(sizeof(T)) && aligned;
    }

    static int padded(std::int64_t count) { return int((count + group - 1) / group * group); }

    // The logits from class `start` on, with -inf for the pivot (none: -1) and after the last.
    const T* read(const char* row, std::int64_t start, int count, std::int64_t pivot) {
        const Matrix& m = job.logits;
        const bool holds_pivot = start <= pivot && pivot < start + count;
        const char* from = row + start * m.class_stride;
        if (direct && count == block && !holds_pivot) return reinterpret_cast<const T*>(from);
        widen_run(m.dtype, from, m.class_stride, count, copy);
        for (int i = count; i < padded(count); ++i) copy[i] = -infinity<T>;
        if (holds_pivot) copy[pivot - start] = -infinity<T>;
        return copy;
    }

    T read_one(const Matrix& m, const char* row, std::int64_t c) {
        T value;
        widen_run(m.dtype, row + c * m.class_stride, 0, 1, &value);
        return value;
    }

    // The coefficients from class `start` on, with 0 after the last.
    void read_coefficients(const char* probabilities, std::int64_t start, int count) {
        if (probabilities) {
            const Matrix& p = job.probabilities;
            widen_run(p.dtype, probabilities + start * p.class_stride, p.class_stride, count, coefficients);
        }
        const T* weights = static_cast<const T*>(job.class_weight);
        for (int i = 0; i < count; ++i) {
            const T weight = weights ? weights[start + i] : T(1);
            coefficients[i] = coefficient(job, probabilities ? coefficients[i] : T(0), weight, kept, share);
        }
        for (int i = count; i < padded(count); ++i) coefficients[i] = T(0);
    }

    // x(logit) - x(m) of a block, into `gaps`.
    void read_gaps(const T* x, int count, T m) {
        if constexpr (capped) {
            const T decay = decay_of(m, twice_over_cap);
            POLYCE_SIMD
            for (int i = 0; i < count; ++i) gaps[i] = capped_gap(x[i], m, decay, scale, cap);
        } else {
            POLYCE_SIMD
            for (int i = 0; i < count; ++i) gaps[i] = (x[i] - m) * scale;
        }
    }

    // Carries a part's sums over to a larger maximum.
    void raise(RowState& s, double top) const {
        const double reference = top == -infinity<double> ? 0.0 : top;
        const double own = s.rest_max == -infinity<double> ? 0.0 : s.rest_max;
        const double decay = exp_negative_full(difference(transform, s.rest_max, reference));
        const double risen = difference(transform, reference, own);
        if (s.rest_sum != 0.0) {
            s.rest_entropy = (s.rest_entropy + s.rest_sum * risen) * decay;
            s.rest_sum *= decay;
        }
        if (s.rest_coefficient != 0.0) s.rest_excess += s.rest_coefficient * risen;
        s.rest_max = top;
    }

    static std::int64_t first_equal(const T* x, int count, T value) {
        for (int i = 0; i < count; ++i) {
            if (x[i] == value) return i;
        }
        return 0;
    }

    // The first class with the largest logit.
    std::int64_t largest(const char* row) {
        T top = -infinity<T>;
        std::int64_t found = 0;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = int(job.classes - start < block ? job.classes - start : block);
            const T* x = read(row, start, count, -1);
            const T most = block_max(x, padded(count));
            if (most > top) top = most, found = start + first_equal(x, count, most);
        }
        return found;
    }

    double sum_exponentials(const T* x, int count, T m, std::int64_t start, Ahead ahead) {
        if (keeps) {
            T* to = exponentials + start;
            references[start / block] = m;
            return lane_sum<T>(count, ahead, [&](int i) POLYCE_INLINE_LAMBDA {
                return to[i] = exp_negative((x[i] - m) * scale);
            });
        }
        if (scale == T(1)) {
            return lane_sum<T>(count, ahead, [&](int i) POLYCE_INLINE_LAMBDA { return exp_negative(x[i] - m); });
        }
        return lane_sum<T>(count, ahead, [&](int i) POLYCE_INLINE_LAMBDA {
            return exp_negative((x[i] - m) * scale);
        });
    }

    RowState sum(const char* row, const char* probabilities, std::int64_t pivot, std::int64_t& first) {
        RowState s{-infinity<double>, 0, 0, 0, 0, 0, 0};
        const bool coefficients_too = has_coefficients(job), entropy = job.stats.entropy;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = int(job.classes - start < block ? job.classes - start : block);
            const int full = padded(count);
            const std::int64_t each = job.logits.class_stride;
            Ahead ahead;
            if (each == size_of(job.logits.dtype)) ahead = {row + (start + block) * each, int(each)};
            const T* x = read(row, start, count, pivot);
            const T most = block_max(x, full);
            if (double(most) > s.rest_max) {
                raise(s, double(most));
                if (job.stats.prediction || job.stats.correct) first = start + first_equal(x, count, most);
            }
            const T m = s.rest_max == -infinity<double> ? T(0) : T(s.rest_max);
            if (!coefficients_too && !entropy && !capped) {
                s.rest_sum += sum_exponentials(x, full, m, start, ahead);
                continue;
            }
            read_gaps(x, full, m);
            s.rest_sum += lane_sum<T>(full, ahead, [&](int i) POLYCE_INLINE_LAMBDA { return exp_negative(gaps[i]); });
            if (entropy) {
                s.rest_entropy += lane_sum<T>(full, {}, [&](int i) POLYCE_INLINE_LAMBDA {
                    const T e = exp_negative(gaps[i]);
                    return e == T(0) ? T(0) : -gaps[i] * e;
                });
            }
            if (coefficients_too) {
                read_coefficients(probabilities, start, count);
                if (start <= pivot && pivot < start + count) {
                    s.pivot_coefficient = double(coefficients[pivot - start]);
                    coefficients[pivot - start] = T(0);
                }
                s.rest_coefficient += lane_sum<T>(full, {}, [&](int i) POLYCE_INLINE_LAMBDA { return coefficients[i]; });
                s.rest_excess += lane_sum<T>(full, {}, [&](int i) POLYCE_INLINE_LAMBDA {
                    // Only what is infinite is skipped: a nan has to stay.
                    return coefficients[i] == T(0) && gaps[i] == -infinity<T> ? T(0)
                                                                              : coefficients[i] * -gaps[i];
                });
            }
        }
        s.pivot_logit = double(read_one(job.logits, row, pivot));
        return s;
    }

    void write_gradient(
        const char* row, const char* probabilities, char* grad, const RowState& s,
        const RowTarget& target, std::int64_t pivot, double factor, const RowGradient& g
    ) {
        const Matrix& out = job.grad;
        const T m = s.rest_max == -infinity<double> ? T(0) : T(s.rest_max);
        const bool coefficients_too = has_coefficients(job), in_place = is_direct(out);
        const double own_scale = capped ? factor : factor * job.scale;
        const T once = T(own_scale * g.softmax), softmax = T(g.softmax), last = T(own_scale);
        // The pivot is read before it may be overwritten, in place.
        const double at_pivot = g.at_pivot * factor * slope(transform, s.pivot_logit);
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = int(job.classes - start < block ? job.classes - start : block);
            char* place = grad + start * out.class_stride;
            T* to = in_place && !job.streams ? reinterpret_cast<T*>(place) : gaps;
            if (!target.counted) {
                POLYCE_SIMD
                for (int i = 0; i < count; ++i) to[i] = T(0);
            } else if (keeps) {
                const T* from = exponentials + start;
                const double moved = difference(transform, double(references[start / block]), double(m));
                const T f = T(own_scale * g.softmax * exp_negative_full(moved));
                POLYCE_SIMD
                for (int i = 0; i < count; ++i) to[i] = from[i] * f;
            } else {
                const T* x = direct ? reinterpret_cast<const T*>(row + start * job.logits.class_stride)
                                    : read(row, start, count, -1);
                if (!coefficients_too && !capped) {
                    POLYCE_SIMD
                    for (int i = 0; i < count; ++i) to[i] = exp_negative((x[i] - m) * scale) * once;
                } else {
                    read_gaps(x, count, m);
                    if (coefficients_too) {
                        read_coefficients(probabilities, start, count);
                    } else {
                        for (int i = 0; i < count; ++i) coefficients[i] = T(0);
                    }
                    if constexpr (capped) {
                        POLYCE_SIMD
                        for (int i = 0; i < count; ++i) {
                            const T entry = exp_negative(gaps[i]) * softmax - coefficients[i];
                            to[i] = entry * last * slope_of(decay_of(x[i], twice_over_cap), scale);
                        }
                    } else {
                        POLYCE_SIMD
                        for (int i = 0; i < count; ++i) {
                            to[i] = (exp_negative(gaps[i]) * softmax - coefficients[i]) * last;
                        }
                    }
                }
            }
            if (job.streams) {
                char* packed = reinterpret_cast<char*>(copy);
                if (!in_place) narrow_run(out.dtype, to, count, packed, size_of(out.dtype));
                stream(place, in_place ? reinterpret_cast<const char*>(to) : packed, count * size_of(out.dtype));
            } else if (!in_place) {
                narrow_run(out.dtype, to, count, place, out.class_stride);
            }
        }
        write_one(grad, pivot, target.counted ? at_pivot : 0.0);
    }

    void write_one(char* grad, std::int64_t c, double entry) {
        const T value = T(entry);
        narrow_run(job.grad.dtype, &value, 1, grad + c * job.grad.class_stride, job.grad.class_stride);
    }

    // What a forward pass has left of a row; false where it left none. Autograd's hooks may have
    // had it in their hands: what does not fit is not used.
    bool take_saved(const SavedRow& saved, const char* row, const char* probabilities, RowState& s, std::int64_t& pivot) {
        if (saved.rest_sum != saved.rest_sum) return false;
        s.rest_max = saved.rest_max, s.rest_sum = saved.rest_sum, s.rest_coefficient = saved.rest_coefficient;
        if (probabilities) {
            const bool fits = saved.pivot >= 0.0 && saved.pivot < double(job.classes);
            pivot = fits ? std::int64_t(saved.pivot) : 0;
            if (!fits || double(read_one(job.logits, row, pivot)) < s.rest_max) pivot = largest(row);
            const T weight = job.class_weight ? static_cast<const T*>(job.class_weight)[pivot] : T(1);
            s.pivot_coefficient =
                double(coefficient(job, read_one(job.probabilities, probabilities, pivot), weight, kept, share));
        }
        s.pivot_logit = double(read_one(job.logits, row, pivot));
        return true;
    }

    // One row's loss; its gradient and statistics are written.
    double run(std::int64_t r, const char* row, const char* probabilities, char* grad) {
        const RowTarget target = read_target<T>(job, r);
        const bool at_top = pivots_on_largest(job);
        std::int64_t pivot = target.label, first = 0;
        RowState s{-infinity<double>, 0, 0, 0, 0, 0, 0};
        LabelApart apart;
        if (target.counted && job.classes) {
            const bool saved = job.backward_only && job.saved;
            if (!saved || !take_saved(job.saved[r], row, probabilities, s, pivot)) {
                if (at_top) pivot = largest(row);
                s = sum(row, probabilities, pivot, first);
            }
        }
        if (!probabilities) {
            if (pivot == target.label) {
                s.pivot_coefficient = label_coefficient(job, target.label_weight);
            } else {
                apart = count_label(job, transform, s, target, double(read_one(job.logits, row, target.label)));
            }
        }
        if (job.saved && !job.backward_only) job.saved[r] = saved_row(transform, s, apart, pivot);
        const RowScalars found = scalars(transform, s, job.wide);
        const double penalty = penalty_of(job, target.label_weight);
        const double lse = log_sum_exp(transform, s, found);
        if (grad && job.classes) {
            const RowGradient g = row_gradient(s, found, penalty, lse, at_top);
            const double factor = row_scale(job, target, r);
            write_gradient(row, probabilities, grad, s, target, pivot, factor, g);
            if (apart.exists) write_one(grad, target.label, apart.gradient(transform, s, g) * factor);
        }
        if (job.stats.valid) store_stats<T, capped>(job, transform, r, target, s, pivot, first, probabilities);
        if (job.backward_only) return 0.0;
        const double loss = weighted(target, job.classes ? row_loss(s, found, penalty, lse) : 0.0);
        store_loss(job, r, loss);
        return loss;
    }

    // log(softmax): what the likeliest class lacks to 0 is its loss.
    void log_softmax(const char* row, char* out) {
        std::int64_t first = 0;
        const std::int64_t pivot = largest(row);
        RowState s = sum(row, nullptr, pivot, first);
        s.pivot_coefficient = 1.0;
        const double loss = row_loss(s, scalars(transform, s, job.wide), 0.0, 0.0);
        const T top = T(s.pivot_logit), lost = T(loss);
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = int(job.classes - start < block ? job.classes - start : block);
            read_gaps(read(row, start, count, -1), count, top);
            POLYCE_SIMD
            for (int i = 0; i < count; ++i) gaps[i] = gaps[i] - lost;
            if (start <= pivot && pivot < start + count) gaps[pivot - start] = -lost;
            narrow_run(job.grad.dtype, gaps, count, out + start * job.grad.class_stride, job.grad.class_stride);
        }
    }
};

}  // namespace polyce::POLYCE_ISA
