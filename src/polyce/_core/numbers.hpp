// What formulas are written for: a number, or as many as a register holds.
//
// Everything here is compiled once for each instruction set, inside a namespace of that name, so
// that the linker never takes code made for one of them for another.
#pragma once

#include <cstdint>
#include <limits>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

// nan and infinity are values here, and every sum has its order.
#if defined(__FAST_MATH__) || defined(_M_FP_FAST) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "polyce's kernels must be compiled without -ffast-math and -ffinite-math-only: take them out of CXXFLAGS"
#endif

#ifndef POLYCE_ISA
#error "POLYCE_ISA must name the instruction set that this file is compiled for"
#endif

#if defined(_MSC_VER) && !defined(__clang__)
#define POLYCE_PRAGMA(...) __pragma(__VA_ARGS__)
#define POLYCE_INLINE __forceinline
#define POLYCE_APART __declspec(noinline)
#define POLYCE_INLINE_LAMBDA
#define POLYCE_FETCH(place, nearness) ((void)(place))
#define POLYCE_FETCH_TO_WRITE(place) ((void)(place))
#else
#define POLYCE_PRAGMA(...) _Pragma(#__VA_ARGS__)
#define POLYCE_INLINE inline __attribute__((always_inline))
#define POLYCE_APART __attribute__((noinline))
#define POLYCE_INLINE_LAMBDA __attribute__((always_inline))
#define POLYCE_FETCH(place, nearness) __builtin_prefetch(place, 0, nearness)
#define POLYCE_FETCH_TO_WRITE(place) __builtin_prefetch(place, 1, 3)
#endif
#define POLYCE_SIMD POLYCE_PRAGMA(omp simd)
#define POLYCE_SIMD_SUM(...) POLYCE_PRAGMA(omp simd reduction(+ : __VA_ARGS__))

namespace polyce::POLYCE_ISA {

template <class T>
inline constexpr T infinity = std::numeric_limits<T>::infinity();

template <class To, class From>
POLYCE_INLINE To bits(From value) {
    return __builtin_bit_cast(To, value);
}

// Contraction is off for everything else, so that every compiler rounds in the same places.
POLYCE_INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

POLYCE_INLINE double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// The numbers in a V, and the bits of it as integers.
template <class V>
struct Number;

template <>
struct Number<float> {
    using Element = float;
    using Bits = std::uint32_t;
};
template <>
struct Number<double> {
    using Element = double;
    using Bits = std::uint64_t;
};

#if defined(__GNUC__)
#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif
template <class T>
struct RegisterOf {
    typedef T type __attribute__((vector_size(register_bytes)));
};
template <class T>
using Register = typename RegisterOf<T>::type;

template <>
struct Number<Register<float>> {
    using Element = float;
    using Bits = Register<std::uint32_t>;
};
template <>
struct Number<Register<double>> {
    using Element = double;
    using Bits = Register<std::uint64_t>;
};

#if defined(__AVX512F__)
POLYCE_INLINE Register<float> fma(Register<float> a, Register<float> b, Register<float> c) {
    return _mm512_fmadd_ps(a, b, c);
}
POLYCE_INLINE Register<double> fma(Register<double> a, Register<double> b, Register<double> c) {
    return _mm512_fmadd_pd(a, b, c);
}
#elif defined(__FMA__)
POLYCE_INLINE Register<float> fma(Register<float> a, Register<float> b, Register<float> c) {
    return _mm256_fmadd_ps(a, b, c);
}
POLYCE_INLINE Register<double> fma(Register<double> a, Register<double> b, Register<double> c) {
    return _mm256_fmadd_pd(a, b, c);
}
#else
template <class V>
POLYCE_INLINE V fma(V a, V b, V c) {
#if defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < int(sizeof(V) / sizeof(a[0])); ++i) a[i] = fma(a[i], b[i], c[i]);
    return a;
#else
    return a * b + c;
#endif
}
#endif
#else
// Without types for them, compilers make registers of the loops over a pack's parts as they can.
template <class T>
using Register = T;
#endif

template <class V>
POLYCE_INLINE V splat(typename Number<V>::Element value) {
    return value - V{};
}

}  // namespace polyce::POLYCE_ISA
