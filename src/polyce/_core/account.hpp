// Whether it pays to ask other threads for help.
#pragma once

#include <algorithm>
#include <atomic>

#include "clocks.hpp"

namespace polyce {

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
