// Between how numbers are stored and how they are computed with.
#pragma once

#include <cstring>
#include <type_traits>

#include "arithmetic.hpp"
#include "job.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace polyce::POLYCE_ISA {

// Stored numbers may lie at any address, so each is copied out of it.
template <class S>
POLYCE_INLINE S fetch(const char* place) {
    S value;
    std::memcpy(&value, place, sizeof value);
    return value;
}

struct Half {
    std::uint16_t raw;
};
struct Brain {
    std::uint16_t raw;
};

POLYCE_INLINE float widen(Half h) {
    // The exponent is moved by a product, which makes subnormal numbers normal on the way.
    const std::uint32_t magnitude = std::uint32_t(h.raw & 0x7fffu) << 13;
    const float value = bits<float>(magnitude) * 0x1p112f;
    const std::uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    const std::uint32_t sign = std::uint32_t(h.raw & 0x8000u) << 16;
    return bits<float>(bits<std::uint32_t>(value) | special | sign);
}

POLYCE_INLINE float widen(Brain b) { return bits<float>(std::uint32_t(b.raw) << 16); }
POLYCE_INLINE float widen(float value) { return value; }
POLYCE_INLINE double widen(double value) { return value; }

template <class S>
POLYCE_INLINE S narrow(float value);

template <>
POLYCE_INLINE Half narrow<Half>(float value) {
    const std::uint32_t all = bits<std::uint32_t>(value), magnitude = all & 0x7fffffffu;
    const std::uint32_t sign = (all >> 16) & 0x8000u;
    // Adding 1/2 brings a result that is subnormal, in steps of 2^-24, to the low bits.
    const std::uint32_t subnormal = bits<std::uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    std::uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
    result = magnitude >= 0x477ff000u ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return {std::uint16_t(result | sign)};
}

template <>
POLYCE_INLINE Brain narrow<Brain>(float value) {
    const std::uint32_t all = bits<std::uint32_t>(value);
    const std::uint32_t rounded = (all + 0x7fffu + ((all >> 16) & 1u)) >> 16;
    const bool is_nan = (all & 0x7fffffffu) > 0x7f800000u;
    return {std::uint16_t(is_nan ? 0x7fc0u | (all >> 16 & 0x8000u) : rounded)};
}

template <>
POLYCE_INLINE float narrow<float>(float value) {
    return value;
}

template <>
POLYCE_INLINE double narrow<double>(float value) {
    return double(value);
}

// A double on its way to 16 bits goes through a float rounded to odd: the second rounding then
// sees on which side of a tie the double lay.
POLYCE_INLINE float to_odd(double value) {
    const float near = float(value);
    const std::uint32_t all = bits<std::uint32_t>(near);
    const double size = value < 0.0 ? -value : value, near_size = near < 0.0f ? -near : near;
    const std::uint32_t toward_zero = near_size > size ? all - 1u : all;
    const bool inexact = near_size != size && value == value;
    return bits<float>(inexact ? toward_zero | 1u : all);
}

template <class S>
POLYCE_INLINE S narrow(double value) {
    if constexpr (std::is_same_v<S, double>) {
        return value;
    } else if constexpr (std::is_same_v<S, float>) {
        return float(value);
    } else {
        return narrow<S>(to_odd(value));
    }
}

// Calls f with a number of the C++ type that a dtype is stored in.
template <class F>
POLYCE_INLINE decltype(auto) with_type(Float dtype, F&& f) {
    switch (dtype) {
        case Float::f16: return f(Half{});
        case Float::bf16: return f(Brain{});
        case Float::f32: return f(float{});
        default: return f(double{});
    }
}

template <class F>
POLYCE_INLINE decltype(auto) with_type(Integer dtype, F&& f) {
    switch (dtype) {
        case Integer::i8: return f(std::int8_t{});
        case Integer::i16: return f(std::int16_t{});
        case Integer::i32: return f(std::int32_t{});
        case Integer::i64: return f(std::int64_t{});
        case Integer::u8: return f(std::uint8_t{});
        case Integer::u16: return f(std::uint16_t{});
        case Integer::u32: return f(std::uint32_t{});
        default: return f(std::uint64_t{});
    }
}

// Halves that a processor converts many at a time. The last reach back into those before them.
#if defined(__AVX512F__)
constexpr int halves_at_once = 16;
POLYCE_INLINE void widen_halves(const char* from, float* to) {
    _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
POLYCE_INLINE void narrow_halves(const float* from, char* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(_mm512_loadu_ps(from), 0));
}
#elif defined(__F16C__)
constexpr int halves_at_once = 8;
POLYCE_INLINE void widen_halves(const char* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
POLYCE_INLINE void narrow_halves(const float* from, char* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(_mm256_loadu_ps(from), 0));
}
#else
constexpr int halves_at_once = 0;
inline void widen_halves(const char*, float*) {}
inline void narrow_halves(const float*, char*) {}
#endif

// Calls f(first) for as many halves at once as there are; false where there are too few.
template <class S, class T, class F>
POLYCE_INLINE bool each_halves(std::int64_t count, F f) {
    if constexpr (halves_at_once && std::is_same_v<S, Half> && std::is_same_v<T, float>) {
        if (count < halves_at_once) return false;
        for (std::int64_t i = 0; i + halves_at_once < count; i += halves_at_once) f(i);
        f(count - halves_at_once);
        return true;
    }
    return false;
}

// Widens `count` numbers that lie `stride` bytes apart.
template <class S, class T>
void widen_run(const char* from, std::int64_t stride, std::int64_t count, T* to) {
    if (stride != std::int64_t(sizeof(S))) {
        for (std::int64_t i = 0; i < count; ++i) to[i] = T(widen(fetch<S>(from + i * stride)));
        return;
    }
    if constexpr (std::is_same_v<T, float>) {
        if (each_halves<S, T>(count, [&](std::int64_t i) POLYCE_INLINE_LAMBDA { widen_halves(from + 2 * i, to + i); })) return;
    }
    POLYCE_SIMD
    for (std::int64_t i = 0; i < count; ++i) to[i] = T(widen(fetch<S>(from + i * std::int64_t(sizeof(S)))));
}

// Rounds `count` numbers into places that lie `stride` bytes apart.
template <class S, class T>
void narrow_run(const T* from, std::int64_t count, char* to, std::int64_t stride) {
    if (stride != std::int64_t(sizeof(S))) {
        for (std::int64_t i = 0; i < count; ++i) {
            const S value = narrow<S>(from[i]);
            std::memcpy(to + i * stride, &value, sizeof value);
        }
        return;
    }
    if constexpr (std::is_same_v<T, float>) {
        if (each_halves<S, T>(count, [&](std::int64_t i) POLYCE_INLINE_LAMBDA { narrow_halves(from + i, to + 2 * i); })) return;
    }
    POLYCE_SIMD
    for (std::int64_t i = 0; i < count; ++i) {
        const S value = narrow<S>(from[i]);
        std::memcpy(to + i * std::int64_t(sizeof(S)), &value, sizeof value);
    }
}

// Copies past the caches: a line that is written whole need not be read first.
POLYCE_INLINE void stream(char* to, const char* from, std::int64_t bytes) {
#if defined(__x86_64__) || defined(_M_X64)
    std::int64_t at = -std::int64_t(reinterpret_cast<std::uintptr_t>(to)) & 63;
    at = at < bytes ? at : bytes;
    std::memcpy(to, from, std::size_t(at));
    for (; at + 64 <= bytes; at += 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
#elif defined(__AVX2__)
        for (int i = 0; i < 64; i += 32) {
            const auto part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at + i));
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + i), part);
        }
#else
        for (int i = 0; i < 64; i += 16) {
            const auto part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at + i));
            _mm_stream_si128(reinterpret_cast<__m128i*>(to + at + i), part);
        }
#endif
    }
    std::memcpy(to + at, from + at, std::size_t(bytes - at));
#else
    std::memcpy(to, from, std::size_t(bytes));
#endif
}

// Makes what was streamed visible to other threads.
inline void end_streaming() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_sfence();
#endif
}

template <class T>
void widen_run(Float dtype, const char* from, std::int64_t stride, std::int64_t count, T* to) {
    with_type(dtype, [&](auto type) { widen_run<decltype(type)>(from, stride, count, to); });
}

template <class T>
void narrow_run(Float dtype, const T* from, std::int64_t count, char* to, std::int64_t stride) {
    with_type(dtype, [&](auto type) { narrow_run<decltype(type)>(from, count, to, stride); });
}

}  // namespace polyce::POLYCE_ISA
