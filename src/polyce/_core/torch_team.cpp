#include "torch_team.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <ctime>
#include <fstream>
#include <sstream>
#include <string>

#include "clocks.hpp"
#include "processor.hpp"
#endif

namespace polyce {

#if defined(__linux__)
namespace {

// GCC's OpenMP, or LLVM's, which has the same functions for what GCC has compiled.
struct OpenMP {
    int (*threads)() = nullptr;
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
};

OpenMP find() {
    OpenMP found;
    // Only what is loaded already; what libtorch_cpu itself calls is found through it.
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return found;
    found.threads = reinterpret_cast<int (*)()>(dlsym(torch, "_ZN2at15get_num_threadsEv"));
    found.parallel = reinterpret_cast<decltype(found.parallel)>(dlsym(torch, "GOMP_parallel"));
    if (!found.threads) found.parallel = nullptr;
    return found;
}

// Whether this process was forked before this library was loaded, and has run no other program since.
bool is_forked() {
    constexpr unsigned long forked_without_exec = 0x40;  // PF_FORKNOEXEC, for all processes since Linux 2.6
    std::ifstream file("/proc/self/stat");
    std::string text;
    std::getline(file, text);
    // The name, in parentheses, may hold anything; after it come the state and five numbers.
    std::istringstream fields(text.substr(text.rfind(')') + 1));
    std::string skipped;
    for (int i = 0; i < 6; ++i) fields >> skipped;
    unsigned long flags = 0;
    return !(fields >> flags) || (flags & forked_without_exec);
}

// A forked child has no team and would wait for it without end.
std::atomic<bool> forked{is_forked()};
[[maybe_unused]] const int forks_noticed = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Some of the threads that came to the calling thread's last call, by their clocks. OpenMP waits for
// all of its threads, and where one has no processor, that takes milliseconds.
class Team {
public:
    void run(const OpenMP& openmp, void (*work)(void*), void* context) {
        Call call{*this, pthread_self(), work, context};
        known_ = 0;
        // As many as torch itself has: a team of another size would end some of its threads.
        openmp.parallel(
            [](void* context) {
                Call& call = *static_cast<Call*>(context);
                if (!pthread_equal(pthread_self(), call.caller)) call.team.remember_this_thread();
                call.work(call.context);
            },
            &call, 0, 0);
    }

    // Whether they have processors now, as they have while they spin. Of a team that is not known, be
    // it that some of it have ended, that is assumed.
    bool is_running() const {
        const int known = std::min(known_.load(), most);
        if (known == 0) return true;
        Nanoseconds before[most], after[most];
        for (int i = 0; i < known; ++i) before[i] = time_of(clocks_[i]);
        for (const Nanoseconds start = now(); now() - start < glance;) pause();
        for (int i = 0; i < known; ++i) after[i] = time_of(clocks_[i]);
        bool all = true;
        for (int i = 0; i < known; ++i) {
            if (after[i] < 0) return true;
            all = all && after[i] - before[i] >= glance / 2;
        }
        return all;
    }

private:
    struct Call {
        Team& team;
        const pthread_t caller;
        void (*const work)(void*);
        void* const context;
    };

    // A large team is judged by a few.
    static constexpr int most = 4;
    static constexpr Nanoseconds glance = 500;

    void remember_this_thread() {
        const int at = known_++;
        if (at < most && pthread_getcpuclockid(pthread_self(), &clocks_[at]) != 0) clocks_[at] = -1;
    }

    // Negative for a thread that has ended.
    static Nanoseconds time_of(clockid_t clock) {
        timespec found;
        return clock_gettime(clock, &found) == 0 ? nanoseconds(found) : -1;
    }

    std::atomic<int> known_{0};
    clockid_t clocks_[most];
};

thread_local Team team;

}  // namespace

bool run_with_torch(int threads, void (*work)(void*), void* context) {
    static const OpenMP openmp = find();
    if (!openmp.parallel || forked.load(std::memory_order_relaxed)) return false;
    if (openmp.threads() < threads || !team.is_running()) return false;
    team.run(openmp, work, context);
    return true;
}
#else
bool run_with_torch(int, void (*)(void*), void*) { return false; }
#endif

}  // namespace polyce
