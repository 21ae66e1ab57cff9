// Lets a C++ compiler for CPUs compile the text of CUDA kernels unchanged.
//
// There are two ways to run it: each CUDA thread is a fiber (shim_fibers.hpp), which is quick and
// has a chosen order; or, with SHIM_THREADS, a thread of the operating system (shim_threads.hpp),
// for the sanitizers. A text must use only what is defined here, and SHARED(type, name, count) for
// its shared memory.
//
// What it cannot show: what CUDA's own compiler makes of the text, its registers and its rounding
// (products are never fused with sums here, and exp, log and tanh are a CPU's); warps, whose
// threads are independent here, without shuffles or votes; memory that a block sees late, except
// for what ThreadSanitizer finds; and timing.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <atomic>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) alignas(bytes)

#ifdef SHIM_THREADS
#define SHIM_OWN thread_local
#else
#define SHIM_OWN
#endif

namespace shim {

struct Index {
  unsigned x, y, z;
};

// How a launch is to be run; SHIM_THREADS ignores it.
struct How {
  int order;  // of threads and blocks: 0 forward, 1 reverse, 2 shuffled
  unsigned seed;
  bool flushes;  // subnormal numbers to 0
  void *scratch;
};

// The first error, for the caller of the launch.
inline char failure[1024];

// Ends the launch. Never returns to the kernel, which may be unable to go on.
[[noreturn]] void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace shim

inline SHIM_OWN shim::Index threadIdx, blockIdx;
inline shim::Index blockDim, gridDim;

namespace shim {

// The shared memory of one block: an array for each declaration in the text.
//
// It takes no lock, which to a sanitizer would order threads that no barrier of the kernel orders.
class SharedMemory {
 public:
  // What CUDA grants a block by default.
  static constexpr size_t LIMIT = 48 * 1024;
  static constexpr size_t GUARD = 256;
  static constexpr int ROOM = 12;
  static constexpr size_t BYTES = ROOM * (LIMIT + GUARD);
  static constexpr unsigned char POISON = 0xFF;  // a nan in every width

  void lay_out(unsigned char *memory) {
    memset(memory, POISON, BYTES);
    for (int i = 0; i < ROOM; i++) {
      entries[i].site.store(nullptr, std::memory_order_relaxed);
      entries[i].bytes.store(0, std::memory_order_relaxed);
      entries[i].memory = memory + i * (LIMIT + GUARD);
      unfence(entries[i]);
    }
  }

  void *of(const void *site, const char *name, size_t bytes) {
    for (Entry &entry : entries) {
      const void *there = entry.site.load(std::memory_order_relaxed);
      if (!there && entry.site.compare_exchange_strong(there, site, std::memory_order_relaxed))
        there = site;
      if (there != site) continue;
      if (bytes > LIMIT) fail("shared array %s takes %zu bytes of %zu", name, bytes, LIMIT);
      entry.bytes.store(bytes, std::memory_order_relaxed);
      fence(entry);
      return entry.memory;
    }
    fail("shared array %s is one more than the %d that the emulation has room for", name, ROOM);
  }

  // Reports what is wrong with the memory that a block leaves, and resets it for the next block.
  const char *finish() {
    const char *wrong = nullptr;
    size_t all = 0;
    for (Entry &entry : entries) {
      const size_t bytes = entry.bytes.load(std::memory_order_relaxed);
      if (!bytes) continue;
      all += (bytes + 15) / 16 * 16;
      unfence(entry);
      for (size_t i = 0; i < GUARD; i++)
        if (entry.memory[bytes + i] != POISON) wrong = "something wrote behind a shared array";
      memset(entry.memory, POISON, bytes + GUARD);
      entry.bytes.store(0, std::memory_order_relaxed);
      entry.site.store(nullptr, std::memory_order_relaxed);
    }
    return all > LIMIT ? "its shared arrays take more than 48 KiB in all" : wrong;
  }

 private:
  struct Entry {
    std::atomic<const void *> site{nullptr};
    std::atomic<size_t> bytes{0};
    unsigned char *memory = nullptr;
  };
  Entry entries[ROOM];

  // AddressSanitizer then sees accesses beyond an array through a plain pointer.
  static void fence(Entry &entry);
  static void unfence(Entry &entry);
};

#ifdef __SANITIZE_ADDRESS__
extern "C" void __asan_poison_memory_region(void const volatile *, size_t);
extern "C" void __asan_unpoison_memory_region(void const volatile *, size_t);
inline void SharedMemory::fence(Entry &entry) {
  const size_t bytes = entry.bytes.load(std::memory_order_relaxed);
  __asan_poison_memory_region(entry.memory + bytes, LIMIT + GUARD - bytes);
}
inline void SharedMemory::unfence(Entry &entry) {
  __asan_unpoison_memory_region(entry.memory, LIMIT + GUARD);
}
#else
inline void SharedMemory::fence(Entry &) {}
inline void SharedMemory::unfence(Entry &) {}
#endif

// The block of the calling thread.
inline SHIM_OWN SharedMemory *shared_memory;

// A shared array whose indices are checked.
template <class T>
class Shared {
 public:
  Shared(const void *site, const char *name, long long count)
      : first(static_cast<T *>(shared_memory->of(site, name, count * sizeof(T)))),
        name(name),
        count(count) {}

  // A template, so that no built-in operator on the pointer below is a better match for an index.
  template <class I>
  T &operator[](I index) const {
    const long long i = static_cast<long long>(index);
    if (i < 0 || i >= count) fail("shared array %s of %lld has no entry %lld", name, count, i);
    return first[i];
  }

  operator T *() const { return first; }

 private:
  T *first;
  const char *name;
  long long count;
};

}  // namespace shim

// The static's address identifies the declaration, and the instance of a template.
#define SHARED(type, name, count) \
  static char name##_site;        \
  const shim::Shared<type> name(&name##_site, #name, count)

template <class To, class From>
inline To shim_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "a value keeps its bits only in its own width");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline float __uint_as_float(unsigned bits) { return shim_bits<float>(bits); }
inline unsigned __float_as_uint(float value) { return shim_bits<unsigned>(value); }
inline float __int_as_float(int bits) { return shim_bits<float>(bits); }
inline int __float_as_int(float value) { return shim_bits<int>(value); }
inline double __longlong_as_double(long long bits) { return shim_bits<double>(bits); }
inline long long __double_as_longlong(double value) { return shim_bits<long long>(value); }

#ifdef SHIM_EXP_ERROR
// A GPU's exponential is off by a unit or two in the last place, in a direction that varies.
inline float shim_expf(float x) {
  const float exact = expf(x);
  if (x == 0.0f || !(exact > 0.0f) || exact > 3e38f) return exact;
  const unsigned spread = (__float_as_uint(x) * 2654435761u) >> 16;
  const int error = static_cast<int>(spread % (2 * (SHIM_EXP_ERROR) + 1)) - (SHIM_EXP_ERROR);
  const int bits = __float_as_int(exact) + error;
  return bits < 0 ? 0.0f : __int_as_float(bits);
}
#define expf shim_expf
#endif

#ifdef SHIM_THREADS
#include "shim_threads.hpp"
#else
#include "shim_fibers.hpp"
#endif

// The place identifies a barrier of the text.
#define SHIM_QUOTE_(line) #line
#define SHIM_QUOTE(line) SHIM_QUOTE_(line)
#define SHIM_PLACE __FILE__ ":" SHIM_QUOTE(__LINE__)
#define __syncthreads() shim::sync_block(SHIM_PLACE)
#define __syncwarp() shim::sync_warp(SHIM_PLACE)
