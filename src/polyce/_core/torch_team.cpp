#include "torch_team.hpp"

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#endif

namespace polyce {

#if defined(__linux__)
namespace {

// GCC's OpenMP, or LLVM's, which has the same functions for what GCC has compiled.
struct Team {
    int (*threads)() = nullptr;
    void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
};

Team find() {
    Team team;
    // Only what is loaded already; what libtorch_cpu itself calls is found through it.
    void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (!torch) return team;
    team.threads = reinterpret_cast<int (*)()>(dlsym(torch, "_ZN2at15get_num_threadsEv"));
    team.parallel = reinterpret_cast<decltype(team.parallel)>(dlsym(torch, "GOMP_parallel"));
    if (!team.threads) team.parallel = nullptr;
    return team;
}

// A forked child has no team and would wait for it without end.
std::atomic<bool> forked{false};
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

bool run_with_torch(int threads, void (*work)(void*), void* context) {
    static const Team team = find();
    if (!team.parallel || forked.load(std::memory_order_relaxed) || team.threads() < threads) return false;
    // As many as torch itself has: a team of another size would end some of its threads.
    team.parallel(work, context, 0, 0);
    return true;
}
#else
bool run_with_torch(int, void (*)(void*), void*) { return false; }
#endif

}  // namespace polyce
