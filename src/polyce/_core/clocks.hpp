// The time, and how much of it a thread has had a processor.
#pragma once

#include <chrono>
#include <cstdint>
#include <ctime>

namespace polyce {

using Nanoseconds = std::int64_t;

inline Nanoseconds nanoseconds(const std::timespec& time) {
    return Nanoseconds(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

inline Nanoseconds now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch()).count();
}

// How long the calling thread has had a processor, where the system tells.
inline Nanoseconds time_on_processor() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec found;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &found) == 0) return nanoseconds(found);
#endif
    return now();
}

}  // namespace polyce
