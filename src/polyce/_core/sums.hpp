// The sums of rows along their classes, as in rowstate.py.
#pragma once

#include <algorithm>

#include "blocks.hpp"
#include "results.hpp"

namespace polyce::POLYCE_ISA {

// exp(scale (x - m)).
template <class T, bool scaled>
POLYCE_INLINE auto exponential(T m, T scale) {
    return [=](auto x) POLYCE_INLINE_LAMBDA {
        using V = decltype(x);
        const V gap = x - splat<V>(m);
        return exp_negative(scaled ? V(gap * splat<V>(scale)) : gap);
    };
}

template <class T, bool capped>
struct Sums : Blocks<T> {
    using Group<T>::job, Group<T>::lane, Group<T>::rows, Group<T>::is_counted;
    using Blocks<T>::block, Blocks<T>::copy, Blocks<T>::coefficients, Blocks<T>::grad_at;
    using Blocks<T>::direct, Blocks<T>::writes_direct, Blocks<T>::share, Blocks<T>::kept;
    using Blocks<T>::logits_of, Blocks<T>::probabilities_of, Blocks<T>::count_from, Blocks<T>::copy_logits;
    using Blocks<T>::read, Blocks<T>::without, Blocks<T>::read_one;
    using Blocks<T>::first_equal, Blocks<T>::largest, Blocks<T>::count_larger, Blocks<T>::read_probabilities;

    // Logits of so many short rows stay in the first cache together, beside those that come next.
    static constexpr std::int64_t held = 4096, most_held = 32;
    // Below this many numbers a group would not be worth fetching.
    static constexpr std::int64_t group_numbers = 8192;
    // So many exponentials of a row stay in the second cache.
    static constexpr std::int64_t most_kept = 1 << 18;

    Results<T, capped> results;
    // Scratch: what the exponents of a block are; rows, each `pitch` after the one before it; what the
    // exponentials of each block refer to, and the place of one that is not among them as its class
    // was the largest until another block, or -1.
    T *gaps, *numbers, *references, *missing;
    std::int64_t pitch, blocks;
    bool streams, keeps;
    T scale, cap, twice_over_cap;

    Sums(const Job& job, char* scratch)
        : Blocks<T>(job, scratch, rows_in_group(job)), results(*this), gaps(copy + Blocks<T>::numbers_in_blocks(job, rows_in_group(job))),
          numbers(gaps + block + pack_size), references(numbers + numbers_in_scratch(job)),
          missing(references + references_in_scratch(job)),
          pitch(padded(job.classes)), blocks(blocks_of(job)),
          streams(streams_rows(job)),
          keeps(keeps_exponentials(job)), scale(T(job.scale)), cap(T(job.cap)),
          twice_over_cap(T(capped ? 2.0 * job.scale / job.cap : 0.0)) {}

    // Where rows begin and end, lines are written in parts, which costs more past the caches: at 100
    // classes twice the time of the whole, at 1000 a tenth, at 2000 nothing.
    static bool streams_rows(const Job& job) {
        const std::int64_t size = size_of(job.grad.dtype);
        return job.streams && job.grad.class_stride == size && job.classes * size >= 4096;
    }

    static std::int64_t rows_in_group(const Job& job) {
        const std::int64_t rows = std::clamp<std::int64_t>(group_numbers / (job.classes + 1), 1, width);
        return rows > step ? rows / step * step : rows;
    }

    // Rows whose logits fit in scratch memory beside one another.
    static int rows_held(const Job& job) {
        const std::int64_t most = std::min(rows_in_group(job), most_held);
        return int(std::clamp<std::int64_t>(held / (padded(job.classes) + pack_size), 1, most));
    }

    static bool is_short(const Job& job) { return job.classes <= block; }

    // Nothing but exponentials makes up the sums.
    static bool is_simple(const Job& job) { return !capped && !has_coefficients(job) && !needs_exponentials(job); }

    // More is made of each of them than their sum.
    static bool needs_exponentials(const Job& job) {
        return needs_entropy(job) || needs_squares(job) || (job.stats.brier && job.sparse);
    }

    // Where a gradient's entries are made of them, they are kept, not computed again.
    static bool keeps_exponentials(const Job& job) {
        const bool combines = has_coefficients(job) && (job.grad_lse || job.grad_entropy);
        const bool reads = !has_saved(job) && !job.part.rows;
        return job.grad.data && reads && !capped && !combines && job.classes <= most_kept;
    }

    static std::int64_t blocks_of(const Job& job) { return (job.classes + block - 1) / block; }

    static std::int64_t numbers_in_scratch(const Job& job) {
        const std::int64_t in_group = keeps_exponentials(job) ? rows_in_group(job) : 0;
        const std::int64_t together = is_short(job) ? rows_held(job) : 0;
        return (in_group > together ? in_group : together) * padded(job.classes) + pack_size;
    }

    static std::int64_t references_in_scratch(const Job& job) {
        return keeps_exponentials(job) ? rows_in_group(job) * blocks_of(job) : 0;
    }

    static std::int64_t scratch_bytes(const Job& job) {
        const std::int64_t count = Blocks<T>::numbers_in_blocks(job, rows_in_group(job)) + block + pack_size + numbers_in_scratch(job) +
                                   2 * references_in_scratch(job);
        return Group<T>::bytes(job, rows_in_group(job)) + count * std::int64_t(sizeof(T));
    }

    // x(logit) - x(m) of a block, into `gaps`.
    POLYCE_APART void read_gaps(const T* x, std::int64_t count, T m) const {
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
    POLYCE_APART void raise(RowState& s, double top) const {
        const double reference = top == -infinity<double> ? 0.0 : top;
        const double own = s.rest_max == -infinity<double> ? 0.0 : s.rest_max;
        const double risen = difference(transform(), reference, own);
        if (s.rest_sum != 0.0) {
            const double decay = exp_negative_full(difference(transform(), s.rest_max, reference));
            s.rest_entropy = (s.rest_entropy + s.rest_sum * risen) * decay;
            s.rest_sum *= decay;
            s.rest_squares *= decay * decay;
        }
        if (s.rest_coefficient != 0.0) s.rest_excess += s.rest_coefficient * risen;
        s.rest_max = top;
    }

    const Transform<capped>& transform() const { return results.transform; }

    // Σ exp(x_c - m), of which each is left in `to`.
    template <bool keep, bool scaled>
    static POLYCE_INLINE Pack<double> sum_exponentials(const T* x, std::int64_t count, T m, T scale, T* to, Ahead ahead) {
        return sum_lanes<T, 8>(count, ahead, [&](std::int64_t i) POLYCE_INLINE_LAMBDA {
            const Pack<T> e = each_part(exponential<T, scaled>(m, scale), load(x + i));
            if (keep) store(to + i, e);
            return e;
        });
    }

    // Calls f with whether there is a scale.
    template <class F>
    POLYCE_INLINE void with_scale(F f) const {
        scale == T(1) ? f(std::false_type{}) : f(std::true_type{});
    }

    // Calls f with whether exponentials are kept, too.
    template <class F>
    POLYCE_INLINE void with_choices(F f) const {
        with_scale([&](auto scaled) { keeps ? f(std::true_type{}, scaled) : f(std::false_type{}, scaled); });
    }

    static T reference(T m) { return m == -infinity<T> ? T(0) : m; }

    // Short rows, some at a time: so that what is written to a row is long there when it is read, and
    // one row's lanes become one number while others are on their way.
    void sum_short() {
        alignas(64) T tops[most_held * pack_size];
        alignas(64) double sums[most_held * pack_size];
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
            each([&](int i, T* x) POLYCE_INLINE_LAMBDA { store(tops + (i - begin) * pack_size, largest_lanes(x, full)); });
            each([&](int i, T*) POLYCE_INLINE_LAMBDA { lane.rest_max[i] = largest_of(load(tops + (i - begin) * pack_size)); });
            if (needs_first(job)) {
                each([&](int i, T* x) POLYCE_INLINE_LAMBDA { lane.first[i] = first_equal(x, count, lane.rest_max[i]); });
            }
            if (job.stats.rank) {
                each([&](int i, T* x) POLYCE_INLINE_LAMBDA { lane.rank[i] = count_larger(x, full, lane.label_logit[i]); });
            }
            // Each in a loop of its own, of which processors keep more on their way.
            const auto exponentials = [&](auto scaled) POLYCE_INLINE_LAMBDA {
                const T scale = this->scale;
                each([&](int i, T* x) POLYCE_INLINE_LAMBDA {
                    const T m = reference(lane.rest_max[i]);
                    for (std::int64_t c = 0; c < full; c += pack_size) {
                        store(x + c, each_part(exponential<T, scaled>(m, scale), load(x + c)));
                    }
                });
            };
            with_scale(exponentials);
            each([&](int i, T* x) POLYCE_INLINE_LAMBDA {
                if (keeps && writes_direct) fetch_gradient(i);
                store(sums + (i - begin) * pack_size, sum_lanes<T, 8>(full, Ahead{}, [&](std::int64_t c) POLYCE_INLINE_LAMBDA {
                    return load(x + c);
                }));
            });
            each([&](int i, T*) POLYCE_INLINE_LAMBDA { lane.rest_sum[i] = sum_of(load(sums + (i - begin) * pack_size)); });
        }
    }

    void fetch_gradient(int i) const {
        char* const place = job.grad.data + grad_at[i];
        for (std::int64_t at = 0; at < job.classes * std::int64_t(sizeof(T)); at += 64) POLYCE_FETCH_TO_WRITE(place + at);
    }

    void sum_row(int i) {
        const char* const row = logits_of(i);
        const bool finds = results.at_top;
        if (job.teacher && !job.part.teacher) this->teacher.read(i, probabilities_of(i), copy);
        std::int64_t pivot = lane.pivot[i];
        RowState s{-infinity<double>, 0, 0, 0, 0, 0, 0};
        const bool coefficients_too = results.spread;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            const std::int64_t full = padded(count);
            const Ahead ahead = this->ahead_of_logits(i, start + block);
            const T* x = read(row, start, count);
            if (job.stats.rank) lane.rank[i] += count_larger(x, full, lane.label_logit[i]);
            if (!finds && start <= pivot && pivot < start + count) x = without(pivot, x, row, start, count);
            T most = largest_of(largest_lanes(x, full));
            if (finds && (start == 0 || double(most) > s.pivot_logit)) {
                const RowState before = s;
                if (start && keeps) missing[i * blocks + pivot / block] = T(pivot % block);
                s.pivot_logit = double(most);
                pivot = start + (most > -infinity<T> ? first_equal(x, count, most) : 0);
                x = without(pivot, x, row, start, count);
                most = largest_of(largest_lanes(x, full));
                raise(s, std::max(double(most), start ? before.pivot_logit : s.rest_max));
                if (start) add_class(s, before.pivot_logit, before.pivot_coefficient);
            } else if (double(most) > s.rest_max) {
                raise(s, double(most));
                if (needs_first(job)) lane.first[i] = start + first_equal(x, count, most);
            }
            const T m = reference(T(s.rest_max));
            if (keeps) references[i * blocks + start / block] = m, missing[i * blocks + start / block] = T(-1);
            if constexpr (!capped) {
                if (is_simple(job)) {
                    T* const to = numbers + i * pitch + start;
                    with_choices([&](auto keep, auto scaled) {
                        s.rest_sum += sum_of(sum_exponentials<keep, scaled>(x, full, m, scale, to, ahead));
                    });
                    continue;
                }
            }
            typename Blocks<T>::Run r{};
            if (coefficients_too) {
                r = this->coefficients_of(i, start, count);
                if (start <= pivot && pivot < start + count) {
                    s.pivot_coefficient = double(r.numbers[pivot - start] * r.factor);
                    r = without(pivot, r, start, count);
                }
            }
            // Where exponentials are not kept, they take the place of the logits' copy, which is done with.
            T* const to = keeps ? numbers + i * pitch + start : copy;
            if (capped || (coefficients_too && needs_exponentials(job))) read_gaps(x, full, m);
            if (!needs_exponentials(job)) {
                if (coefficients_too) {
                    // A teacher's are in the caches.
                    const AheadOfTwo both{ahead, job.teacher ? Ahead{} : this->ahead_of_probabilities(i, start + block)};
                    if constexpr (capped) {
                        sum_with_coefficients<false>(s, x, full, m, r, to, both);
                    } else {
                        with_scale([&](auto scaled) { sum_with_coefficients<scaled>(s, x, full, m, r, to, both); });
                    }
                } else if constexpr (capped) {
                    s.rest_sum += sum_of(sum_exponentials<false, false>(gaps, full, T(0), T(1), nullptr, ahead));
                }
                continue;
            }
            sum_with_entropy(s, x, full, m, to, ahead);
            if (results.squares) s.rest_squares += sum_squares(to, full);
            if (coefficients_too) add_coefficients(s, full, r);
        }
        if (finds) lane.pivot[i] = pivot, lane.first[i] = job.classes;
        if (!out_of_range(pivot, job.classes)) lane.pivot_logit[i] = read_one(job.logits, row, pivot);
        set_state(i, s);
    }

    // Adds a class that is no longer the largest to the others.
    POLYCE_APART void add_class(RowState& s, double logit, double coefficient) const {
        const double gap = difference(transform(), logit, s.rest_max == -infinity<double> ? 0.0 : s.rest_max);
        const double e = exp_negative_full(gap);
        s.rest_sum += e, s.rest_squares += e * e, s.rest_entropy += weighted_gap(e, gap);
        s.rest_coefficient += coefficient, s.rest_excess += excess_of(coefficient, gap);
    }

    void set_state(int i, const RowState& s) const {
        lane.rest_max[i] = T(s.rest_max), lane.rest_sum[i] = s.rest_sum;
        lane.pivot_coefficient[i] = s.pivot_coefficient, lane.rest_coefficient[i] = s.rest_coefficient;
        lane.rest_excess[i] = s.rest_excess, lane.rest_entropy[i] = s.rest_entropy;
        if (results.squares) lane.squares[i] = s.rest_squares;
    }

    POLYCE_APART static double sum_squares(const T* values, std::int64_t count) {
        return sum_of(sum_lanes<T>(count, Ahead{}, [&](std::int64_t i) POLYCE_INLINE_LAMBDA {
            const Pack<T> value = load(values + i);
            return value * value;
        }));
    }

    // Adds the exponentials, of which each is left in `to`, and the entropy's terms.
    void sum_with_entropy(RowState& s, const T* x, std::int64_t count, T m, T* to, Ahead ahead) const {
        const T scale = this->scale;
        const T* const t = gaps;
        const Pair<double> sums = sum_lanes<T>(count, ahead, [&](std::int64_t i) POLYCE_INLINE_LAMBDA {
            const Pack<T> gap = capped ? load(t + i) : each_part([&](auto v) POLYCE_INLINE_LAMBDA {
                return decltype(v)((v - splat<decltype(v)>(m)) * splat<decltype(v)>(scale));
            }, load(x + i));
            const Pack<T> e = each_part([](auto v) POLYCE_INLINE_LAMBDA { return exp_negative(v); }, gap);
            store(to + i, e);
            return Pair<T>{e, each_part(weighted_gap, e, gap)};
        });
        s.rest_sum += sum_of(sums.first), s.rest_entropy += sum_of(sums.second);
    }

    // Adds the exponentials, of which each is left in `to`, the coefficients and the gaps times these.
    template <bool scaled>
    void sum_with_coefficients(
        RowState& s, const T* x, std::int64_t count, T m, typename Blocks<T>::Run r, T* to, AheadOfTwo ahead
    ) const {
        const T scale = this->scale;
        const T* const t = gaps;
        const Triple<double> sums = sum_lanes<T>(count, ahead, [&](std::int64_t i) POLYCE_INLINE_LAMBDA {
            const Pack<T> gap = capped ? load(t + i) : each_part([&](auto v) POLYCE_INLINE_LAMBDA {
                using V = decltype(v);
                const V gap = v - splat<V>(m);
                return scaled ? V(gap * splat<V>(scale)) : gap;
            }, load(x + i));
            const Pack<T> e = each_part([](auto v) POLYCE_INLINE_LAMBDA { return exp_negative(v); }, gap);
            store(to + i, e);
            const Pack<T> each = coefficients_at(r, i);
            return Triple<T>{e, each, each_part(excess_of, each, gap)};
        });
        s.rest_sum += sum_of(sums.first);
        s.rest_coefficient += sum_of(sums.second), s.rest_excess += sum_of(sums.third);
    }

    // Adds the coefficients, and the gaps times these.
    void add_coefficients(RowState& s, std::int64_t count, typename Blocks<T>::Run r) const {
        const T* const t = gaps;
        const Pair<double> sums = sum_lanes<T>(count, Ahead{}, [&](std::int64_t i) POLYCE_INLINE_LAMBDA {
            const Pack<T> each = coefficients_at(r, i);
            return Pair<T>{each, each_part(excess_of, each, load(t + i))};
        });
        s.rest_coefficient += sum_of(sums.first), s.rest_excess += sum_of(sums.second);
    }

    static POLYCE_INLINE Pack<T> coefficients_at(typename Blocks<T>::Run r, std::int64_t i) {
        return each_part([&](auto v) POLYCE_INLINE_LAMBDA { return v * splat<decltype(v)>(r.factor); }, load(r.numbers + i));
    }

    // Sums the squares of what the classes besides the pivot differ by from their probabilities.
    POLYCE_APART void sum_distances(int i) const {
        const char *const row = logits_of(i), *const probabilities = probabilities_of(i);
        const RowState s = results.state(i);
        const T m = reference(lane.rest_max[i]);
        const T factor = T(row_softmax(s, scalars(transform(), s, sizeof(T) == 8)).factor);
        const std::int64_t pivot = lane.pivot[i];
        double sum = 0.0;
        for (std::int64_t start = 0; start < job.classes; start += block) {
            const int count = count_from(start);
            const bool here = start <= pivot && pivot < start + count;
            const T* x = read(row, start, count);
            if (here) x = without(pivot, x, row, start, count);
            read_gaps(x, count, m);
            read_probabilities(probabilities, start, count);
            if (here) lane.pivot_target[i] = double(coefficients[pivot - start]), coefficients[pivot - start] = T(0);
            T* const t = gaps;
            const T* const r = coefficients;
            POLYCE_SIMD
            for (int c = 0; c < count; ++c) t[c] = exp_negative(t[c]) * factor - r[c];
            store(t + count, filled(T(0)));
            sum += sum_squares(t, padded(count));
        }
        lane.squares[i] = sum;
    }
};

}  // namespace polyce::POLYCE_ISA
