// From rows that hold a number for each class to classes that hold one for each row, and back.
#pragma once

#include "formats.hpp"

#if defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace polyce::POLYCE_ISA {

// Numbers in a register of 128 bits, which all processors transpose in.
template <class T>
inline constexpr int side = 16 / int(sizeof(T));

// A square of `side` lines of `side` numbers.
POLYCE_INLINE void transpose_square(
    const char* from, std::int64_t from_stride, char* to, std::int64_t to_stride, float
) {
#if defined(__x86_64__) || defined(_M_X64)
    const auto load = [&](int line) POLYCE_INLINE_LAMBDA {
        return _mm_loadu_ps(reinterpret_cast<const float*>(from + line * from_stride));
    };
    const auto store = [&](int line, __m128 value) POLYCE_INLINE_LAMBDA {
        _mm_storeu_ps(reinterpret_cast<float*>(to + line * to_stride), value);
    };
    __m128 a = load(0), b = load(1), c = load(2), d = load(3);
    _MM_TRANSPOSE4_PS(a, b, c, d);
    store(0, a), store(1, b), store(2, c), store(3, d);
#elif defined(__ARM_NEON) && defined(__aarch64__)
    const auto load = [&](int line) POLYCE_INLINE_LAMBDA {
        return vreinterpretq_f32_u8(vld1q_u8(reinterpret_cast<const std::uint8_t*>(from + line * from_stride)));
    };
    const auto store = [&](int line, float64x2_t value) POLYCE_INLINE_LAMBDA {
        vst1q_u8(reinterpret_cast<std::uint8_t*>(to + line * to_stride), vreinterpretq_u8_f64(value));
    };
    const float32x4_t a = load(0), b = load(1), c = load(2), d = load(3);
    const auto even_ab = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), odd_ab = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
    const auto even_cd = vreinterpretq_f64_f32(vtrn1q_f32(c, d)), odd_cd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
    store(0, vzip1q_f64(even_ab, even_cd)), store(1, vzip1q_f64(odd_ab, odd_cd));
    store(2, vzip2q_f64(even_ab, even_cd)), store(3, vzip2q_f64(odd_ab, odd_cd));
#else
    for (int i = 0; i < 4; ++i) {
        for (int j = 0; j < 4; ++j) std::memcpy(to + j * to_stride + 4 * i, from + i * from_stride + 4 * j, 4);
    }
#endif
}

POLYCE_INLINE void transpose_square(
    const char* from, std::int64_t from_stride, char* to, std::int64_t to_stride, double
) {
#if defined(__x86_64__) || defined(_M_X64)
    const __m128d a = _mm_loadu_pd(reinterpret_cast<const double*>(from));
    const __m128d b = _mm_loadu_pd(reinterpret_cast<const double*>(from + from_stride));
    _mm_storeu_pd(reinterpret_cast<double*>(to), _mm_unpacklo_pd(a, b));
    _mm_storeu_pd(reinterpret_cast<double*>(to + to_stride), _mm_unpackhi_pd(a, b));
#else
    for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) std::memcpy(to + j * to_stride + 8 * i, from + i * from_stride + 8 * j, 8);
    }
#endif
}

// As many lines as a register holds numbers, of `side` numbers each; and back, from `side` lines of
// as many numbers. Each quarter of a register (half, with AVX2) is a square.
#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__AVX512F__)
using Strip = __m512;
#else
using Strip = __m256;
#endif
constexpr int strip = int(sizeof(Strip)) / 4;

POLYCE_INLINE void transpose_squares(Strip (&s)[4]) {
#if defined(__AVX512F__)
    const auto low = [](Strip a, Strip b) POLYCE_INLINE_LAMBDA { return _mm512_castps_pd(_mm512_unpacklo_ps(a, b)); };
    const auto high = [](Strip a, Strip b) POLYCE_INLINE_LAMBDA { return _mm512_castps_pd(_mm512_unpackhi_ps(a, b)); };
    const auto lows = [](__m512d a, __m512d b) POLYCE_INLINE_LAMBDA { return _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)); };
    const auto highs = [](__m512d a, __m512d b) POLYCE_INLINE_LAMBDA { return _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)); };
#else
    const auto low = [](Strip a, Strip b) POLYCE_INLINE_LAMBDA { return _mm256_castps_pd(_mm256_unpacklo_ps(a, b)); };
    const auto high = [](Strip a, Strip b) POLYCE_INLINE_LAMBDA { return _mm256_castps_pd(_mm256_unpackhi_ps(a, b)); };
    const auto lows = [](__m256d a, __m256d b) POLYCE_INLINE_LAMBDA { return _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)); };
    const auto highs = [](__m256d a, __m256d b) POLYCE_INLINE_LAMBDA { return _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)); };
#endif
    const auto a = low(s[0], s[1]), b = low(s[2], s[3]), c = high(s[0], s[1]), d = high(s[2], s[3]);
    s[0] = lows(a, b), s[1] = highs(a, b), s[2] = lows(c, d), s[3] = highs(c, d);
}

POLYCE_INLINE void strip_of_lines(const char* from, std::int64_t from_stride, char* to, std::int64_t to_stride) {
    const auto part = [&](int line) POLYCE_INLINE_LAMBDA {
        return _mm_loadu_ps(reinterpret_cast<const float*>(from + line * from_stride));
    };
    Strip s[4];
    for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
        s[j] = _mm512_insertf32x4(_mm512_castps128_ps512(part(j)), part(j + 4), 1);
        s[j] = _mm512_insertf32x4(_mm512_insertf32x4(s[j], part(j + 8), 2), part(j + 12), 3);
#else
        s[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(part(j)), part(j + 4), 1);
#endif
    }
    transpose_squares(s);
    for (int j = 0; j < 4; ++j) std::memcpy(to + j * to_stride, &s[j], sizeof s[j]);
}

POLYCE_INLINE void lines_of_strip(const char* from, std::int64_t from_stride, char* to, std::int64_t to_stride) {
    Strip s[4];
    for (int j = 0; j < 4; ++j) std::memcpy(&s[j], from + j * from_stride, sizeof s[j]);
    transpose_squares(s);
    const auto put = [&](int line, __m128 part) POLYCE_INLINE_LAMBDA {
        _mm_storeu_ps(reinterpret_cast<float*>(to + line * to_stride), part);
    };
    for (int j = 0; j < 4; ++j) {
#if defined(__AVX512F__)
        put(j, _mm512_castps512_ps128(s[j])), put(j + 4, _mm512_extractf32x4_ps(s[j], 1));
        put(j + 8, _mm512_extractf32x4_ps(s[j], 2)), put(j + 12, _mm512_extractf32x4_ps(s[j], 3));
#else
        put(j, _mm256_castps256_ps128(s[j])), put(j + 4, _mm256_extractf128_ps(s[j], 1));
#endif
    }
}
#endif

// Calls f(line, place in it) for squares, or strips, of `height` times `length`, with which lines
// are covered; the last reach back into those before them.
template <class F>
POLYCE_INLINE void each_block(int lines, int length, int height, int wide, F f) {
    for (int i = 0; i < lines; i += height) {
        const int line = i + height <= lines ? i : lines - height;
        for (int j = 0; j < length; j += wide) f(line, j + wide <= length ? j : length - wide);
    }
}

// Lines of so few numbers, one after the other, that compilers know how to take them apart.
template <class T, int length>
void take_apart(const char* from, int lines, char* to, std::int64_t to_stride) {
    POLYCE_SIMD
    for (int i = 0; i < lines; ++i) {
        for (int j = 0; j < length; ++j) {
            const T value = fetch<T>(from + (i * length + j) * int(sizeof(T)));
            std::memcpy(to + j * to_stride + i * int(sizeof(T)), &value, sizeof value);
        }
    }
}

template <class T, int lines>
void put_together(const char* from, std::int64_t from_stride, int length, char* to) {
    POLYCE_SIMD
    for (int i = 0; i < length; ++i) {
        for (int j = 0; j < lines; ++j) {
            const T value = fetch<T>(from + j * from_stride + i * int(sizeof(T)));
            std::memcpy(to + (i * lines + j) * int(sizeof(T)), &value, sizeof value);
        }
    }
}

// `lines` lines of `length` numbers become `length` lines. Between the lines' starts lie as many
// bytes as the strides say.
template <class T>
void transpose(
    const char* from, std::int64_t from_stride, int lines, int length, char* to, std::int64_t to_stride
) {
    constexpr int size = int(sizeof(T));
    if (length == 2 && from_stride == 2 * size) return take_apart<T, 2>(from, lines, to, to_stride);
    if (length == 3 && from_stride == 3 * size) return take_apart<T, 3>(from, lines, to, to_stride);
    if (lines == 2 && to_stride == 2 * size) return put_together<T, 2>(from, from_stride, length, to);
    if (lines == 3 && to_stride == 3 * size) return put_together<T, 3>(from, from_stride, length, to);
    if (lines < side<T> || length < side<T>) {
        for (int i = 0; i < lines; ++i) {
            for (int j = 0; j < length; ++j) {
                std::memcpy(to + j * to_stride + i * size, from + i * from_stride + j * size, size);
            }
        }
        return;
    }
#if defined(__AVX512F__) || defined(__AVX2__)
    if constexpr (size == 4) {
        if (lines >= strip) {
            return each_block(lines, length, strip, 4, [&](int line, int at) POLYCE_INLINE_LAMBDA {
                strip_of_lines(from + line * from_stride + at * size, from_stride, to + at * to_stride + line * size, to_stride);
            });
        }
        if (length >= strip) {
            return each_block(lines, length, 4, strip, [&](int line, int at) POLYCE_INLINE_LAMBDA {
                lines_of_strip(from + line * from_stride + at * size, from_stride, to + at * to_stride + line * size, to_stride);
            });
        }
    }
#endif
    each_block(lines, length, side<T>, side<T>, [&](int line, int at) POLYCE_INLINE_LAMBDA {
        const char* square = from + line * from_stride + at * size;
        transpose_square(square, from_stride, to + at * to_stride + line * size, to_stride, T());
    });
}

}  // namespace polyce::POLYCE_ISA
