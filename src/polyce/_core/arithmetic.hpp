// exp, expm1, log1p and tanh that compilers vectorise: no branches, no tables, no library calls.
#pragma once

#include "numbers.hpp"

namespace polyce::POLYCE_ISA {

// exp(t) = 2^n exp(f) with f in ±ln(2)/2. `magic` rounds t/ln 2 to the integer n and leaves
// n + bias in the low bits of the sum, where a shift makes the floating number 2^n of it.
template <class T>
struct Exp;

template <>
struct Exp<float> {
    static constexpr int shift = 23;
    static constexpr float lowest = -88.0f;  // gives n = -127, which as an exponent is 0
    static constexpr float magic = 12582912.0f + 127.0f;
    static constexpr float log2e = 1.44269504f;
    static constexpr float ln2_high = 0.693359375f;
    static constexpr float ln2_low = -2.12194440e-4f;
    // Of (exp(f) - 1) / f, highest power first, minimax: 1.02 ulp of exp in all.
    static constexpr float series[] = {
        0x1.6ae72ep-10f, 0x1.126784p-7f, 0x1.555822p-5f, 0x1.55541ap-3f, 0x1.fffffcp-2f, 1.0f};
};

template <>
struct Exp<double> {
    static constexpr int shift = 52;
    static constexpr double lowest = -709.0;
    static constexpr double magic = 0x1.8p52 + 1023.0;
    static constexpr double log2e = 0x1.71547652b82fep0;
    static constexpr double ln2_high = 0x1.62e42fefa3800p-1;  // its product with n is exact
    static constexpr double ln2_low = 0x1.ef35793c76730p-45;
    // By Taylor: what it leaves out is below 1e-17.
    static constexpr double series[] = {
        1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
        1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0};
};

template <class V>
using ExpOf = Exp<typename Number<V>::Element>;

template <class V>
struct Reduced {
    V f, z, n;
};

template <class V>
POLYCE_INLINE Reduced<V> reduce_exponent(V t) {
    using E = ExpOf<V>;
    const V z = fma(t, splat<V>(E::log2e), splat<V>(E::magic));
    const V n = z - splat<V>(E::magic);
    return {fma(n, splat<V>(-E::ln2_low), fma(n, splat<V>(-E::ln2_high), t)), z, n};
}

template <class V>
POLYCE_INLINE V power_of_two(V z) {
    using Bits = typename Number<V>::Bits;
    return bits<V>(Bits(bits<Bits>(z) << ExpOf<V>::shift));
}

// (exp(f) - 1) / f by Horner's rule, of which the part up to coefficient `next` is done.
template <int next = 1, class V>
POLYCE_INLINE V exp_series(V f, V done = splat<V>(ExpOf<V>::series[0])) {
    constexpr auto& series = ExpOf<V>::series;
    if constexpr (next == int(sizeof series / sizeof *series)) {
        return done;
    } else {
        return exp_series<next + 1>(f, fma(f, done, splat<V>(series[next])));
    }
}

// No less than Exp::lowest, but nan where t is: as the processors' maximum has it of its second operand.
template <class V>
POLYCE_INLINE V bounded(V t) {
    const V lowest = splat<V>(ExpOf<V>::lowest);
    return lowest > t ? lowest : t;
}

// exp(t) for t <= 0 or nan. 0 where it would be below the smallest normal number. The product is
// written so that a nan passes it.
template <class V>
POLYCE_INLINE V exp_negative(V t) {
    const auto [f, z, n] = reduce_exponent(bounded(t));
    return fma(f, exp_series(f), splat<V>(1)) * power_of_two(z);
}

// What rounding took from a - b, of which `gap` is left (Knuth's two-sum).
template <class V>
POLYCE_INLINE V lost_by_difference(V a, V b, V gap) {
    const V b_part = a - gap, a_part = gap + b_part;
    return (a - a_part) + (b_part - b);
}

// What rounding took from a·b, of which `product` is left: by Dekker's splitting where no
// multiplication is fused.
template <class V>
POLYCE_INLINE V lost_by_product(V a, V b, V product) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return fma(a, b, -product);
#else
    using T = typename Number<V>::Element;
    const V splitter = splat<V>(sizeof(T) == 8 ? T(134217729.0) : T(4097.0));
    const V split_a = a * splitter, high_a = split_a - (split_a - a), low_a = a - high_a;
    const V split_b = b * splitter, high_b = split_b - (split_b - b), low_b = b - high_b;
    return ((high_a * high_b - product) + high_a * low_b + low_a * high_b) + low_a * low_b;
#endif
}

// exp(scale (a - b)) for a <= b or nan, with the scale in two parts. What rounding takes from the
// exponent, half a unit of its last digit for each step, is multiplied back.
template <bool scaled, class V>
POLYCE_INLINE V exp_of_difference(V a, V b, V scale, V scale_low) {
    const V gap = a - b;
    V t = gap, error = lost_by_difference(a, b, gap);
    if constexpr (scaled) {
        t = gap * scale;
        error = fma(error, scale, fma(gap, scale_low, lost_by_product(gap, scale, t)));
    }
    const V e = exp_negative(t);
    // Of an infinite exponent the error is nan.
    return error - error == V{} ? fma(e, error, e) : e;
}

// exp(t) for t <= 0 or nan down to the smallest subnormal number, which is reached by one rounding.
POLYCE_INLINE double exp_negative_full(double t) {
    t = -760.0 > t ? -760.0 : t;
    const auto [f, z, n] = reduce_exponent(t);
    const bool far = n < -1000.0;
    const double near = power_of_two(z + (far ? 200.0 : 0.0));
    return fma(f, exp_series(f), 1.0) * near * (far ? 0x1p-200 : 1.0);
}

// exp(t) - 1 for t <= 0 or nan, accurate near 0.
template <class T>
POLYCE_INLINE T expm1_negative(T t) {
    const auto [f, z, n] = reduce_exponent(bounded(t));
    const T scale = power_of_two(z);
    return fma(scale, f * exp_series(f), scale - T(1));
}

template <class T>
POLYCE_INLINE T tanh(T v) {
    const T twice = v < T(0) ? v + v : -(v + v);
    const T e = expm1_negative(twice);
    const T size = -e / (e + T(2));
    return v < T(0) ? -size : size;
}

// log(1 + x) for x >= 0 or nan: 1 + x = 2^k (1 + f) with 1 + f in sqrt(1/2) to sqrt(2), and
// log(1 + f) = 2 atanh(f / (2 + f)) by its series, of which what is left out is below 1e-17.
POLYCE_INLINE double log1p_positive(double x) {
    constexpr std::uint64_t below_sqrt = 0x3ff0000000000000u - 0x3fe6a09e667f3bcdu;
    constexpr std::uint64_t mantissa = 0x000fffffffffffffu;
    const double u = 1.0 + x;
    const std::uint64_t raised = bits<std::uint64_t>(u) + below_sqrt;
    // An integer in the low bits of 2^52 is that number more.
    const double k = bits<double>((raised >> 52) | 0x4330000000000000u) - (0x1p52 + 1023.0);
    const double reduced = bits<double>((raised & mantissa) + 0x3fe6a09e667f3bcdu) - 1.0;
    const bool small = k == 0.0;
    const double f = small ? x : reduced;
    // What rounding took from 1 + x.
    const double lost = small ? 0.0 : (u > 2.0 ? 1.0 - (u - x) : x - (u - 1.0)) / u;
    const double s = f / (2.0 + f);
    const double w = s * s;
    double p = 1.0 / 23.0;
    p = fma(w, p, 1.0 / 21.0);
    p = fma(w, p, 1.0 / 19.0);
    p = fma(w, p, 1.0 / 17.0);
    p = fma(w, p, 1.0 / 15.0);
    p = fma(w, p, 1.0 / 13.0);
    p = fma(w, p, 1.0 / 11.0);
    p = fma(w, p, 1.0 / 9.0);
    p = fma(w, p, 1.0 / 7.0);
    p = fma(w, p, 1.0 / 5.0);
    p = fma(w, p, 1.0 / 3.0);
    // 2 atanh(s) = f - s (f - 2 w p), in which the small part is subtracted from f itself.
    const double log = f - s * (f - 2.0 * (w * p));
    const double result = fma(k, 0x1.62e42fefa3800p-1, log + (lost + k * 0x1.ef35793c76730p-45));
    return x - x == 0.0 ? result : x;
}

}  // namespace polyce::POLYCE_ISA
