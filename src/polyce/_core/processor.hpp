// What is asked of the processor, and of the system about it.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#else
#include <cfenv>
#endif
#include <thread>

namespace polyce {

inline void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    asm volatile("yield");
#endif
}

// How a thread rounds, and whether it flushes subnormal numbers to zero.
class FloatMode {
public:
#if defined(__x86_64__) || defined(_M_X64)
    static FloatMode current() { return {_mm_getcsr()}; }
    void set() const { _mm_setcsr(mode); }
    unsigned mode;
#else
    static FloatMode current() {
        FloatMode found;
        std::fegetenv(&found.mode);
        return found;
    }
    void set() const { std::fesetenv(&mode); }
    std::fenv_t mode;
#endif
};

// The processors that this process may use.
inline int usable_processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? int(count) : 1;
}

}  // namespace polyce
