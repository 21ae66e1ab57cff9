// Sixteen numbers at once, in as many registers as the instruction set needs for them. What is
// computed so has the same bits on all of them, since every sum has these sixteen lanes.
#pragma once

#include <cstring>
#include <utility>

#include "arithmetic.hpp"

namespace polyce::POLYCE_ISA {

constexpr int pack_size = 16;

// The count rounded up to whole packs.
POLYCE_INLINE constexpr std::int64_t padded(std::int64_t count) { return (count + pack_size - 1) / pack_size * pack_size; }

template <class T>
struct Pack {
    static constexpr int parts = pack_size * int(sizeof(T)) / int(sizeof(Register<T>));
    Register<T> part[parts];
};

template <class T>
POLYCE_INLINE Pack<T> load(const T* from) {
    Pack<T> p;
    for (int k = 0; k < p.parts; ++k) std::memcpy(&p.part[k], from + k * (pack_size / p.parts), sizeof p.part[k]);
    return p;
}

template <class T>
POLYCE_INLINE void store(T* to, const Pack<T>& p) {
    for (int k = 0; k < p.parts; ++k) std::memcpy(to + k * (pack_size / p.parts), &p.part[k], sizeof p.part[k]);
}

template <class T>
POLYCE_INLINE Pack<T> filled(T value) {
    Pack<T> p;
    for (int k = 0; k < p.parts; ++k) p.part[k] = splat<Register<T>>(value);
    return p;
}

// f of the registers that packs are made of, one after the other.
template <class T, class F, class... Others>
POLYCE_INLINE Pack<T> each_part(F f, Pack<T> p, const Others&... others) {
    for (int k = 0; k < p.parts; ++k) p.part[k] = f(p.part[k], others.part[k]...);
    return p;
}

template <class T>
POLYCE_INLINE Pack<T> operator*(const Pack<T>& a, const Pack<T>& b) {
    return each_part([](auto x, auto y) POLYCE_INLINE_LAMBDA { return x * y; }, a, b);
}

template <class T>
POLYCE_INLINE Pack<T> operator-(const Pack<T>& a, const Pack<T>& b) {
    return each_part([](auto x, auto y) POLYCE_INLINE_LAMBDA { return x - y; }, a, b);
}

template <class T>
POLYCE_INLINE Pack<T> operator+(const Pack<T>& a, const Pack<T>& b) {
    return each_part([](auto x, auto y) POLYCE_INLINE_LAMBDA { return x + y; }, a, b);
}

POLYCE_INLINE Pack<double> widened(const Pack<double>& p) { return p; }

POLYCE_INLINE Pack<double> widened(const Pack<float>& p) {
#if defined(__AVX512F__) && defined(__GNUC__)
    return {_mm512_cvtps_pd(_mm512_castps512_ps256(p.part[0])), _mm512_cvtps_pd(_mm512_extractf32x8_ps(p.part[0], 1))};
#else
    alignas(64) float lane[pack_size];
    store(lane, p);
    Pack<double> wide;
    for (int k = 0; k < wide.parts; ++k) {
#if defined(__GNUC__)
        float part __attribute__((vector_size(register_bytes / 2)));
        std::memcpy(&part, lane + k * (pack_size / wide.parts), sizeof part);
        wide.part[k] = __builtin_convertvector(part, Register<double>);
#else
        wide.part[k] = double(lane[k]);
#endif
    }
    return wide;
#endif
}

// May pass over a nan in `a`.
template <class T>
POLYCE_INLINE Pack<T> larger(const Pack<T>& a, const Pack<T>& b) {
    return each_part([](auto x, auto y) POLYCE_INLINE_LAMBDA { return x > y ? x : y; }, a, b);
}

// `then` where a and b are equal, else `other`.
template <class T>
POLYCE_INLINE Pack<T> chosen(const Pack<T>& a, const Pack<T>& b, const Pack<T>& then, const Pack<T>& other) {
    return each_part([](auto x, auto y, auto t, auto o) POLYCE_INLINE_LAMBDA { return x == y ? t : o; }, a, b, then, other);
}

// to[i] = f(from[i]), which may be the same place: the last sixteen, which reach back into those
// before them, are computed before anything is written.
template <class T, class F>
POLYCE_INLINE void map_run(const T* from, std::int64_t count, T* to, F f) {
    const auto mapped = [&](const T* at) POLYCE_INLINE_LAMBDA { return each_part(f, load(at)); };
    if (count < pack_size) {
        alignas(64) T few[pack_size] = {};
        std::memcpy(few, from, std::size_t(count) * sizeof(T));
        store(few, mapped(few));
        std::memcpy(to, few, std::size_t(count) * sizeof(T));
        return;
    }
    const Pack<T> last = mapped(from + count - pack_size);
    for (std::int64_t i = 0; i + pack_size < count; i += pack_size) store(to + i, mapped(from + i));
    store(to + count - pack_size, last);
}

// Copies at least sixteen.
template <class T>
POLYCE_INLINE void copy_run(const T* from, std::int64_t count, T* to) {
    const Pack<T> last = load(from + count - pack_size);
    std::int64_t i = 0;
    for (; i + 4 * pack_size <= count; i += 4 * pack_size) {
        const Pack<T> a = load(from + i), b = load(from + i + pack_size);
        const Pack<T> c = load(from + i + 2 * pack_size), d = load(from + i + 3 * pack_size);
        store(to + i, a), store(to + i + pack_size, b);
        store(to + i + 2 * pack_size, c), store(to + i + 3 * pack_size, d);
    }
    for (; i + pack_size < count; i += pack_size) store(to + i, load(from + i));
    store(to + count - pack_size, last);
}

// What f makes of all values, of which it takes the halves together.
template <int count, class T, class F>
POLYCE_INLINE T folded(const T (&value)[count], F f) {
    if constexpr (count == 1) {
        return value[0];
    } else {
        alignas(64) T half[count / 2];
        for (int i = 0; i < count / 2; ++i) half[i] = f(value[i], value[i + count / 2]);
        return folded(half, f);
    }
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define POLYCE_HALVES
// The halves of a register in registers of half the size.
template <class V, class F, std::size_t... i>
POLYCE_INLINE auto half_folded(V v, F f, std::index_sequence<i...>) {
    return f(__builtin_shufflevector(v, v, int(i)...), __builtin_shufflevector(v, v, int(i + sizeof...(i))...));
}
#endif
#endif

template <class T, class V, class F>
POLYCE_INLINE T folded(V v, F f) {
    constexpr int count = int(sizeof(V) / sizeof(T));
#if defined(POLYCE_HALVES)
    if constexpr (sizeof(V) > 16) return folded<T>(half_folded(v, f, std::make_index_sequence<count / 2>()), f);
#endif
    T lane[count];
    std::memcpy(lane, &v, sizeof lane);
    return folded(lane, f);
}

template <class T, class F>
POLYCE_INLINE T folded(const Pack<T>& p, F f) {
    return folded<T>(folded(p.part, f), f);
}

// `count` is a multiple of `pack_size` from here on.

// The largest of each lane. May pass over a nan, which the sums do not.
template <class T>
POLYCE_INLINE Pack<T> largest_lanes(const T* x, std::int64_t count) {
    Pack<T> a = load(x), b = a;
    std::int64_t i = 0;
    for (; i + 4 * pack_size <= count; i += 4 * pack_size) {
        a = larger(larger(load(x + i), load(x + i + pack_size)), a);
        b = larger(larger(load(x + i + 2 * pack_size), load(x + i + 3 * pack_size)), b);
    }
    if (i + 2 * pack_size <= count) a = larger(larger(load(x + i), load(x + i + pack_size)), a), i += 2 * pack_size;
    if (i < count) b = larger(load(x + i), b);
    return larger(a, b);
}

template <class T>
POLYCE_INLINE T largest_of(const Pack<T>& p) {
    return folded(p, [](auto x, auto y) POLYCE_INLINE_LAMBDA { return x > y ? x : y; });
}

POLYCE_INLINE double sum_of(const Pack<double>& p) {
    return folded(p, [](auto x, auto y) POLYCE_INLINE_LAMBDA { return x + y; });
}

// Sums have sixteen lanes, of at most sixteen terms added pairwise before they become double.
constexpr int run_size = pack_size * pack_size;

// What a sum asks the memory for meanwhile: as many numbers as it adds, of so many bytes each; none
// by default. Into the first cache what is needed next, into the second what is further on.
struct Ahead {
    const char* place = nullptr;
    int bytes_each = 0;

    POLYCE_INLINE void fetch(std::int64_t from) const {
        constexpr int far_ahead = 32768;
        if (!place) return;
        for (int at = 0; at < run_size * bytes_each; at += 64) {
            POLYCE_FETCH(place + from * bytes_each + at, 3);
            POLYCE_FETCH(place + from * bytes_each + at + far_ahead, 1);
        }
    }
};

struct AheadOfTwo {
    Ahead first, second;

    POLYCE_INLINE void fetch(std::int64_t from) const { first.fetch(from), second.fetch(from); }
};

// Two sums that are taken together.
template <class T>
struct Pair {
    Pack<T> first, second;
};

template <class T>
POLYCE_INLINE Pair<T> operator+(const Pair<T>& a, const Pair<T>& b) {
    return {a.first + b.first, a.second + b.second};
}

template <class T>
POLYCE_INLINE Pair<double> widened(const Pair<T>& p) {
    return {widened(p.first), widened(p.second)};
}

// And three.
template <class T>
struct Triple {
    Pack<T> first, second, third;
};

template <class T>
POLYCE_INLINE Triple<T> operator+(const Triple<T>& a, const Triple<T>& b) {
    return {a.first + b.first, a.second + b.second, a.third + b.third};
}

template <class T>
POLYCE_INLINE Triple<double> widened(const Triple<T>& p) {
    return {widened(p.first), widened(p.second), widened(p.third)};
}

// Σ term(i) for packs, or two or three packs together, of terms from i on, in each lane. `at_once`
// packs are gone through together, 4 or 8, which does not change the order of the sum: with few
// instructions to a term 8 are faster, with many they only take longer to compile.
template <class T, int at_once = 4, class Term, class Next = Ahead>
POLYCE_INLINE auto sum_lanes(std::int64_t count, Next ahead, Term term) {
    using Terms = decltype(term(std::int64_t(0)));
    const auto four = [&](std::int64_t i) POLYCE_INLINE_LAMBDA {
        return (term(i) + term(i + pack_size)) + (term(i + 2 * pack_size) + term(i + 3 * pack_size));
    };
    auto sums = widened(Terms{});
    for (std::int64_t i = 0; i < count;) {
        const std::int64_t end = i + run_size < count ? i + run_size : count;
        if (end == i + run_size) ahead.fetch(i);
        Terms a{}, b{}, rest{};
        if constexpr (at_once == 8) {
            for (; i + 8 * pack_size <= end; i += 8 * pack_size) {
                a = a + four(i);
                b = b + four(i + 4 * pack_size);
            }
            // Not loops, so that what the terms need stays in registers.
            if (i + 4 * pack_size <= end) a = a + four(i), i += 4 * pack_size;
            if (i + 2 * pack_size <= end) rest = term(i) + term(i + pack_size), i += 2 * pack_size;
            if (i < end) rest = rest + term(i), i += pack_size;
        } else {
            const bool is_odd = (end - i) / (4 * pack_size) % 2;
            for (; i + 4 * pack_size <= end; i += 4 * pack_size) {
                const Terms more = a + four(i);
                a = b, b = more;
            }
            if (is_odd) std::swap(a, b);
            for (; i < end; i += pack_size) rest = rest + term(i);
        }
        sums = sums + widened(a + (b + rest));
    }
    return sums;
}

}  // namespace polyce::POLYCE_ISA
