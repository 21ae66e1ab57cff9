// What numbers are stored as, what is computed with, and the way from one to the other.
//
// These files are one text, in the order of `polyce.implementations.cupy.plan.FILES`. It includes
// no header, so that no compiler needs a path to one, and is specialised by macros:
//
//   KERNEL   the one kernel that is compiled: FORWARD, JOIN, REDUCE, WEIGH, FORWARD_BACKWARD or
//            BACKWARD; or, for a part of the classes, STATE_OF_PART or GRADIENT_OF_PART
//   LOGITS   what logits and gradient are stored as: FLOAT16, BFLOAT16, FLOAT32 or FLOAT64
//   REAL     what is computed with: FLOAT32 or FLOAT64
//   TARGET   what the target is stored as: one of these for probabilities, INT8, ... for labels
//   SPREAD   1 if other classes than the pivot have coefficients: all but labels without smoothing
//   SOFTCAP  1 for logits under a softcap
//   SPARSE   1 if the target is some classes of each row, in TARGET, with a probability each
//   TEACHER  1 if the target is the softmax of a teacher's logits, stored as TARGET
//   SMOOTHED 1 if there is smoothing, where these two have to know
//   STATS    1 if something besides the loss is wanted of each row; for a part, if the entropy is
//   BESIDE   1 if the largest probability, the Brier score or the rank are among that; for a part of
//            labels' rows, if the Brier score is
//   FIRST    1 if of a part's classes besides the label the first with the largest logit is wanted
//   VALUED   1 if the gradient is also that of lse or entropy, which take STATS but for a part's lse
//   WIDTH    how many logits are loaded at once: more than 1 only where classes are contiguous
//   BLOCK    how many threads a block has, a power of two

#define FORWARD 1
#define JOIN 2
#define REDUCE 3
#define WEIGH 4
#define FORWARD_BACKWARD 5
#define BACKWARD 6
#define STATE_OF_PART 7
#define GRADIENT_OF_PART 8

#define FLOAT16 1
#define BFLOAT16 2
#define FLOAT32 3
#define FLOAT64 4
#define INT8 5
#define INT16 6
#define INT32 7
#define INT64 8
#define UINT8 9
#define UINT16 10
#define UINT32 11
#define UINT64 12

#define PROBABILITY (TARGET <= FLOAT64)
#define LABELS (!PROBABILITY && !SPARSE)
#define PART (KERNEL == STATE_OF_PART || KERNEL == GRADIENT_OF_PART)
#ifndef FIRST
#define FIRST 0
#endif
#define DEVICE __device__ __forceinline__
// The few float64 functions of a float32 kernel would take its registers.
#if REAL == FLOAT64
#define OUTLINE DEVICE
#else
#define OUTLINE __device__ __noinline__
#endif

// An emulator has shared memory of its own.
#ifndef SHARED
#define SHARED(type, name, count) __shared__ type name[count]
#endif

typedef long long i64;
typedef unsigned long long u64;

// CUDA has no such type without a header; other compilers have one.
#ifdef __CUDA_ARCH__
DEVICE float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
DEVICE unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#else
union Half { unsigned short bits; _Float16 value; };
DEVICE float half_to_float(unsigned short bits) {
  Half half;
  half.bits = bits;
  return half.value;
}
DEVICE unsigned short float_to_half(float value) {
  Half half;
  half.value = (_Float16)value;
  return half.bits;
}
#endif

// GPUs from sm_80 on round two numbers at once. Elsewhere they are rounded by hand, to the same bits.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
DEVICE unsigned floats_to_halves(float low, float high) {
  unsigned bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DEVICE unsigned floats_to_bfloat16s(float low, float high) {
  unsigned bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
DEVICE unsigned short float_to_bfloat16(float value) {
  unsigned short bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#else
DEVICE unsigned floats_to_halves(float low, float high) {
  return (unsigned)float_to_half(high) << 16 | float_to_half(low);
}
DEVICE unsigned short float_to_bfloat16(float value) {
  const unsigned bits = __float_as_uint(value);
  // To the nearest, ties to even; a nan is the one that GPUs give.
  const unsigned near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (unsigned short)(value != value ? 0x7fffu : near);
}
DEVICE unsigned floats_to_bfloat16s(float low, float high) {
  return (unsigned)float_to_bfloat16(high) << 16 | float_to_bfloat16(low);
}
#endif

// A float that any narrower format rounds as it would the double: not to the nearest but, where
// something is lost, to the neighbour with an odd last bit.
DEVICE float rounded_to_odd(double value) {
  const float near = (float)value;
  const double back = near;
  if (back == value || value != value) return near;
  const unsigned larger = (back < 0 ? -back : back) > (value < 0 ? -value : value);
  return __uint_as_float((__float_as_uint(near) - larger) | 1u);
}

// How a kind of number is stored, and what its bits stand for; `narrow` rounds once, and so does
// `narrow_pair`, two 16-bit numbers to the halves of a word.
template <int KIND> struct Stored;

template <> struct Stored<FLOAT16> {
  typedef unsigned short type;
  static DEVICE float widen(type number) { return half_to_float(number); }
  static DEVICE type narrow(float value) { return float_to_half(value); }
  static DEVICE type narrow(double value) { return narrow(rounded_to_odd(value)); }
  static DEVICE unsigned narrow_pair(float low, float high) { return floats_to_halves(low, high); }
  static DEVICE unsigned narrow_pair(double low, double high) {
    return narrow_pair(rounded_to_odd(low), rounded_to_odd(high));
  }
  static DEVICE float from_bits(u64 bits) { return widen((type)bits); }
  static DEVICE u64 to_bits(type number) { return number; }
};
template <> struct Stored<BFLOAT16> {
  typedef unsigned short type;
  static DEVICE float widen(type number) { return __uint_as_float((unsigned)number << 16); }
  static DEVICE type narrow(float value) { return float_to_bfloat16(value); }
  static DEVICE type narrow(double value) { return narrow(rounded_to_odd(value)); }
  static DEVICE unsigned narrow_pair(float low, float high) { return floats_to_bfloat16s(low, high); }
  static DEVICE unsigned narrow_pair(double low, double high) {
    return narrow_pair(rounded_to_odd(low), rounded_to_odd(high));
  }
  static DEVICE float from_bits(u64 bits) { return widen((type)bits); }
  static DEVICE u64 to_bits(type number) { return number; }
};
template <> struct Stored<FLOAT32> {
  typedef float type;
  static DEVICE float widen(type number) { return number; }
  static DEVICE type narrow(double value) { return (float)value; }
  static DEVICE float from_bits(u64 bits) { return __uint_as_float((unsigned)bits); }
  static DEVICE u64 to_bits(type number) { return __float_as_uint(number); }
};
template <> struct Stored<FLOAT64> {
  typedef double type;
  static DEVICE double widen(type number) { return number; }
  static DEVICE type narrow(double value) { return value; }
  static DEVICE double from_bits(u64 bits) { return __longlong_as_double((i64)bits); }
  static DEVICE u64 to_bits(type number) { return (u64)__double_as_longlong(number); }
};
template <> struct Stored<INT8> { typedef signed char type; };
template <> struct Stored<INT16> { typedef short type; };
template <> struct Stored<INT32> { typedef int type; };
template <> struct Stored<INT64> { typedef long long type; };
template <> struct Stored<UINT8> { typedef unsigned char type; };
template <> struct Stored<UINT16> { typedef unsigned short type; };
template <> struct Stored<UINT32> { typedef unsigned type; };
// From 2^63 on they turn negative, which no label is, and ignore_index turns with them.
template <> struct Stored<UINT64> { typedef long long type; };

typedef Stored<REAL>::type real;
typedef Stored<LOGITS>::type logit;
typedef Stored<TARGET>::type target;

DEVICE real infinity() { return (real)__longlong_as_double(0x7ff0000000000000LL); }
DEVICE real not_a_number() { return (real)__longlong_as_double(0x7ff8000000000000LL); }

// Numbers of which a row has one: their kind is known at run time.
DEVICE double load_number(const void* array, i64 place, i64 kind) {
  if (kind == FLOAT64) return ((const double*)array)[place];
  if (kind == FLOAT32) return ((const float*)array)[place];
  const unsigned short bits = ((const unsigned short*)array)[place];
  return kind == FLOAT16 ? Stored<FLOAT16>::widen(bits) : Stored<BFLOAT16>::widen(bits);
}

DEVICE void store_number(void* array, i64 place, i64 kind, double value) {
  if (kind == FLOAT64) {
    ((double*)array)[place] = value;
  } else if (kind == FLOAT32) {
    ((float*)array)[place] = Stored<FLOAT32>::narrow(value);
  } else {
    ((unsigned short*)array)[place] =
        kind == FLOAT16 ? Stored<FLOAT16>::narrow(value) : Stored<BFLOAT16>::narrow(value);
  }
}

DEVICE float exp_of(float x) { return expf(x); }
OUTLINE double exp_of(double x) { return exp(x); }
DEVICE float expm1_of(float x) { return expm1f(x); }
OUTLINE double expm1_of(double x) { return expm1(x); }
DEVICE float log1p_of(float x) { return log1pf(x); }
OUTLINE double log1p_of(double x) { return log1p(x); }
DEVICE float tanh_of(float x) { return tanhf(x); }
OUTLINE double tanh_of(double x) { return tanh(x); }
template <class T> DEVICE T size_of(T x) { return x < 0 ? -x : x; }
// The larger of two numbers; of a nan and a number, the number.
DEVICE float larger_of(float a, float b) { return fmaxf(a, b); }
DEVICE double larger_of(double a, double b) { return a > b ? a : b; }
