#include "threads.hpp"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
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

struct Scratch {
    explicit Scratch(std::int64_t bytes)
        : memory(static_cast<char*>(::operator new(std::size_t(bytes), std::align_val_t(alignment)))) {}
    ~Scratch() { ::operator delete(memory, std::align_val_t(alignment)); }
    Scratch(const Scratch&) = delete;
    char* memory;
};

// One call's tiles, while threads take them.
struct Share {
    std::int64_t tiles, scratch_bytes;
    void (*task)(void*, std::int64_t, char*);
    void* context;
    std::atomic<std::int64_t> next{0};

    void work() {
        const Scratch scratch(scratch_bytes);
        for (;;) {
            const std::int64_t tile = next.fetch_add(1, std::memory_order_relaxed);
            if (tile >= tiles) return;
            task(context, tile, scratch.memory);
        }
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
    void share(Share& share, int helpers) {
        std::unique_lock<std::mutex> only(owner_, std::try_to_lock);
        if (!only.owns_lock()) {
            share.work();
            return;
        }
        {
            std::lock_guard<std::mutex> guard(mutex_);
            while (started_ < helpers) {
                std::thread([this] { help(); }).detach();
                ++started_;
            }
            share_ = &share;
            wanted_ = helpers;
        }
        wake_.notify_all();
        share.work();
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
    void help() {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            wake_.wait(guard, [this] { return wanted_ > 0; });
            --wanted_;
            ++busy_;
            Share& share = *share_;
            guard.unlock();
            share.work();
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

void forget_pool() { pool.store(nullptr); }

Pool& current_pool() {
    static const bool watched = [] {
#if !defined(_WIN32)
        pthread_atfork(nullptr, nullptr, forget_pool);
#endif
        return true;
    }();
    (void)watched;
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
    if (count > tiles) count = int(tiles);
    if (count <= 1) {
        share.work();
    } else {
        current_pool().share(share, count - 1);
    }
}

}  // namespace polyce
