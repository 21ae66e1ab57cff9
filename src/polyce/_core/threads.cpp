#include "threads.hpp"

#include <atomic>
#include <new>
#include <thread>

#include "account.hpp"
#include "pool.hpp"
#include "processor.hpp"
#include "torch_team.hpp"

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

// One call's tiles, while threads take them.
class Share {
public:
    Share(std::int64_t tiles, int threads, std::int64_t scratch_bytes, Task task, void* context)
        : tiles_(tiles), scratch_bytes_(scratch_bytes), task_(task), context_(context),
          places_(threads - 1), scratch_(scratch_bytes) {
        if (!scratch_.memory) throw std::bad_alloc();
    }

    void work_alone() { own_tiles_ = work(scratch_.memory); }

    // For each thread that comes, the caller among them.
    static void come(void* share) {
        Share& self = *static_cast<Share*>(share);
        if (std::this_thread::get_id() == self.caller_) {
            self.begun = now();
            const Nanoseconds before = time_on_processor();
            self.work_alone();
            self.computed = time_on_processor() - before;
            self.ended = now();
        } else if (self.places_.fetch_sub(1, std::memory_order_relaxed) > 0) {
            self.help();
        }
    }

    std::int64_t tiles() const { return tiles_; }
    std::int64_t own_tiles() const { return own_tiles_; }

    Nanoseconds begun = 0, ended = 0, computed = 0;  // the caller's work

private:
    std::int64_t work(char* scratch) {
        for (std::int64_t done = 0;; ++done) {
            const std::int64_t tile = next_.fetch_add(1, std::memory_order_relaxed);
            if (tile >= tiles_) return done;
            task_(context_, tile, scratch);
        }
    }

    // Another thread has the same bits if it rounds as the caller does. One that finds no memory
    // leaves the tiles to the others.
    void help() {
        const Scratch scratch(scratch_bytes_);
        if (!scratch.memory) return;
        const FloatMode own = FloatMode::current();
        mode_.set();
        work(scratch.memory);
        own.set();
    }

    const std::int64_t tiles_, scratch_bytes_;
    const Task task_;
    void* const context_;
    const FloatMode mode_ = FloatMode::current();
    const std::thread::id caller_ = std::this_thread::get_id();
    std::atomic<std::int64_t> next_{0};
    std::atomic<int> places_;
    const Scratch scratch_;
    std::int64_t own_tiles_ = 0;
};

std::atomic<int> threads{0};

Account pool_account, torch_account;

// Books what others have saved the caller, and the time it waited for them.
void book(Account& account, const Share& share, Nanoseconds start) {
    const Nanoseconds waited = share.begun - start + now() - share.ended;
    const std::int64_t own = share.own_tiles(), others = share.tiles() - own;
    const double saved = own ? double(share.computed) * double(others) / double(own) : 0.0;
    account.book(Nanoseconds(saved) - waited);
}

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
    std::int64_t tiles, int count, bool with_torch, std::int64_t scratch_bytes, Task task, void* context
) {
    if (count > tiles) count = int(tiles);
    // Before the work is shared: from then on, nothing may leave this frame but in good order.
    Share share(tiles, count, scratch_bytes, task, context);
    if (count <= 1) {
        share.work_alone();
        return;
    }
    Account& account = with_torch ? torch_account : pool_account;
    const Nanoseconds start = now();
    if (!account.allows_help()) {
        share.work_alone();
        account.book_alone(now() - start);
        return;
    }
    if (!with_torch || !run_with_torch(count, Share::come, &share)) run_with_pool(count - 1, Share::come, &share);
    book(account, share, start);
}

}  // namespace polyce
