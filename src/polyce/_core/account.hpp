// Whether it pays to ask other threads for help.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <ctime>

namespace polyce {

using Nanoseconds = std::int64_t;

inline Nanoseconds now() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(
               std::chrono::steady_clock::now().time_since_epoch()).count();
}

// How long the calling thread has had a processor, where the system tells.
inline Nanoseconds time_on_processor() {
#if defined(CLOCK_THREAD_CPUTIME_ID)
    timespec found;
    if (clock_gettime(CLOCK_THREAD_CPUTIME_ID, &found) == 0) {
        return Nanoseconds(found.tv_sec) * 1'000'000'000 + found.tv_nsec;
    }
#endif
    return now();
}

// On a machine with other work to do, a thread that has begun on a tile may be kept from its
// processor for milliseconds, and the caller waits for it. So after calls that lost more by others
// than others gained, calls go alone until a twentieth of their time makes up for it.
class Account {
public:
    bool allows_help() const { return balance_.load(std::memory_order_relaxed) >= 0; }

    // What others have spared the caller; negative if they have cost it more.
    void book(Nanoseconds gain) {
        // Callers at once may undo each other's bookings, which are estimates anyway.
        const Nanoseconds balance = balance_.load(std::memory_order_relaxed) + std::max(gain, -most_lost);
        balance_.store(std::min(balance, most_saved), std::memory_order_relaxed);
    }

    void book_alone(Nanoseconds duration) { book(duration / 20); }

private:
    // However long a process was stopped in a call, and however long all went well.
    static constexpr Nanoseconds most_lost = 50'000'000, most_saved = 10'000'000;
    // Enough for the first call, which starts the threads.
    std::atomic<Nanoseconds> balance_{1'000'000};
};

}  // namespace polyce
