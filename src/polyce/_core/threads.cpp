#include "threads.hpp"

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace polyce {
namespace {

constexpr std::size_t alignment = 64;

// Memory for one thread's tiles; null where there is none to be had.
class Scratch {
public:
    explicit Scratch(std::int64_t bytes)
        : memory(static_cast<char*>(
              ::operator new(std::size_t(bytes), std::align_val_t(alignment), std::nothrow))) {}
    ~Scratch() { ::operator delete(memory, std::align_val_t(alignment)); }
    Scratch(const Scratch&) = delete;
    char* const memory;
};

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

// One call's tiles, while threads take them.
struct Share {
    std::int64_t tiles, scratch_bytes;
    void (*task)(void*, std::int64_t, char*);
    void* context;
    const FloatMode mode = FloatMode::current();
    std::atomic<std::int64_t> next{0};

    void work(char* scratch) {
        for (;;) {
            const std::int64_t tile = next.fetch_add(1, std::memory_order_relaxed);
            if (tile >= tiles) return;
            task(context, tile, scratch);
        }
    }

    // Another thread has the same bits if it rounds as the caller does. One that finds no memory
    // leaves the tiles to the others.
    void help() {
        const Scratch scratch(scratch_bytes);
        if (!scratch.memory) return;
        mode.set();
        work(scratch.memory);
    }
};

constexpr int patience = 2000;  // looks, of up to 0.1 µs each

void pause() {
#if defined(__x86_64__) || defined(_M_X64)
    _mm_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    asm volatile("yield");
#endif
}

// Helpers sleep until a call wants some of them. One call at a time has them: a second caller,
// meanwhile, does its work alone, which a machine that is busy anyway would hardly notice.
class Pool {
public:
    void share(Share& share, int helpers, char* scratch) {
        std::unique_lock<std::mutex> only(owner_, std::try_to_lock);
        if (!only.owns_lock()) {
            share.work(scratch);
            return;
        }
        {
            std::lock_guard<std::mutex> guard(mutex_);
            while (started_ < helpers && start()) ++started_;
            share_ = &share;
            wanted_ = helpers < started_ ? helpers : started_;
        }
        wake_.notify_all();
        share.work(scratch);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            wanted_ = 0;  // who has not come by now is not needed
            share_ = nullptr;
        }
        // The others are at their last tiles: to fall asleep would take longer than most of them.
        for (int i = 0; i < patience && busy_.load(std::memory_order_acquire) > 0; ++i) pause();
        std::unique_lock<std::mutex> guard(mutex_);
        done_.wait(guard, [this] { return busy_ == 0; });
    }

private:
    // Fewer helpers do as well: a system that has no thread to give may have one at the next call.
    bool start() {
        try {
            std::thread([this] { help(); }).detach();
        } catch (const std::system_error&) {
            return false;
        } catch (const std::bad_alloc&) {
            return false;
        }
        return true;
    }

    void help() {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            wake_.wait(guard, [this] { return wanted_ > 0; });
            --wanted_;
            ++busy_;
            Share& share = *share_;
            guard.unlock();
            share.help();
            guard.lock();
            if (--busy_ == 0) done_.notify_one();
        }
    }

    std::mutex owner_, mutex_;
    std::condition_variable wake_, done_;
    Share* share_ = nullptr;
    int started_ = 0, wanted_ = 0;
    std::atomic<int> busy_{0};
};

// Never destroyed: at exit its threads may still be asleep in it. A forked child, which has none of
// the threads, makes itself a new one.
std::atomic<Pool*> pool{nullptr};

#if !defined(_WIN32)
// When the library is loaded, so that no thread is doing this while another one forks.
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
#endif

Pool& current_pool() {
    Pool* found = pool.load();
    if (!found) {
        Pool* fresh = new Pool;
        if (pool.compare_exchange_strong(found, fresh)) return *fresh;
        delete fresh;
    }
    return *found;
}

// The processors that this process may use.
int usable_processors() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count ? int(count) : 1;
}

std::atomic<int> threads{0};

}  // namespace

int thread_count() {
    int count = threads.load(std::memory_order_relaxed);
    if (count == 0) {
        count = usable_processors();
        threads.store(count, std::memory_order_relaxed);
    }
    return count;
}

void set_thread_count(int count) { threads.store(count, std::memory_order_relaxed); }

void share_tiles(
    std::int64_t tiles, int count, std::int64_t scratch_bytes,
    void (*task)(void*, std::int64_t, char*), void* context
) {
    Share share{tiles, scratch_bytes, task, context};
    // Before the work is shared: from then on, nothing may leave this frame but in good order.
    const Scratch scratch(scratch_bytes);
    if (!scratch.memory) throw std::bad_alloc();
    if (count > tiles) count = int(tiles);
    if (count <= 1) {
        share.work(scratch.memory);
    } else {
        current_pool().share(share, count - 1, scratch.memory);
    }
}

}  // namespace polyce
