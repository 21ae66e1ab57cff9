#include "pool.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "processor.hpp"

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace polyce {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int patience = 2000;  // looks, of up to 0.1 µs each
constexpr int looks_between_yields = 20;
// About what lies between two calls in a row; to fall asleep and be woken takes as long.
constexpr auto stays_awake = std::chrono::microseconds(50);
// A thread that comes back from giving way later than this has given way to another.
constexpr auto undisturbed = std::chrono::microseconds(5);

// One call at a time has the helpers: a second caller, meanwhile, does its work alone, which a
// machine that is busy anyway would hardly notice.
class Pool {
public:
    void run(int helpers, void (*work)(void*), void* context) {
        std::unique_lock<std::mutex> only(owner_, std::try_to_lock);
        if (!only.owns_lock()) {
            work(context);
            return;
        }
        {
            std::lock_guard<std::mutex> guard(mutex_);
            while (started_ < helpers && start()) ++started_;
            work_ = work;
            context_ = context;
            wanted_ = helpers < started_ ? helpers : started_;
        }
        wake_.notify_all();
        work(context);
        {
            std::lock_guard<std::mutex> guard(mutex_);
            wanted_ = 0;  // who has not come by now is not needed
        }
        // The others are at their last tiles: to fall asleep would take longer than most of them.
        for (int i = 0; i < patience && busy_.load(std::memory_order_acquire) > 0; ++i) pause();
        std::unique_lock<std::mutex> guard(mutex_);
        done_.wait(guard, [this] { return busy_ == 0; });
    }

private:
    // Fewer helpers do as well: a system that has no thread to give may have one at the next call.
    bool start() {
        const bool has_processor = started_ + 1 < usable_processors();
        try {
            std::thread([this, has_processor] { help(has_processor); }).detach();
        } catch (const std::system_error&) {
            return false;
        } catch (const std::bad_alloc&) {
            return false;
        }
        return true;
    }

    void help(bool has_processor) {
        std::unique_lock<std::mutex> guard(mutex_);
        for (;;) {
            wake_.wait(guard, [this] { return wanted_ > 0; });
            --wanted_;
            ++busy_;
            void (*const work)(void*) = work_;
            void* const context = context_;
            guard.unlock();
            work(context);
            guard.lock();
            if (--busy_ == 0) done_.notify_one();
            if (!has_processor) continue;
            guard.unlock();
            wait_awake();
            guard.lock();
        }
    }

    // For the next call, while nobody else wants the processor.
    void wait_awake() {
        const Clock::time_point end = Clock::now() + stays_awake;
        for (;;) {
            for (int i = 0; i < looks_between_yields; ++i) {
                if (wanted_.load(std::memory_order_relaxed) > 0) return;
                pause();
            }
            const Clock::time_point before = Clock::now();
            if (before >= end) return;
            std::this_thread::yield();
            if (Clock::now() - before > undisturbed) return;
        }
    }

    std::mutex owner_, mutex_;
    std::condition_variable wake_, done_;
    void (*work_)(void*) = nullptr;
    void* context_ = nullptr;
    int started_ = 0;
    std::atomic<int> wanted_{0}, busy_{0};
};

// Never destroyed: at exit its threads may still be asleep in it. A forked child, which has none of
// the threads, makes itself a new one.
std::atomic<Pool*> pool{nullptr};

#if !defined(_WIN32)
// When the library is loaded, so that no thread is doing this while another one forks.
[[maybe_unused]] const int pool_forgotten_in_forks = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
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

}  // namespace

void run_with_pool(int helpers, void (*work)(void*), void* context) {
    current_pool().run(helpers, work, context);
}

}  // namespace polyce
