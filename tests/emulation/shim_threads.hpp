// One thread of the operating system for each CUDA thread, and several blocks at once, so that a
// sanitizer sees accesses as on a GPU: ordered only by the kernel's own barriers.
#pragma once

#include <stdarg.h>
#include <stdlib.h>

#include <algorithm>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

// How many blocks run at a time, always at least two.
#ifndef SHIM_BLOCKS
#define SHIM_BLOCKS 4
#endif
// With more threads than this, fewer blocks run at a time.
#ifndef SHIM_MOST_THREADS
#define SHIM_MOST_THREADS 512
#endif

namespace shim {

constexpr size_t SCRATCH = 0;

inline void fail(const char *format, ...) {
  const Index &b = blockIdx, &t = threadIdx;
  char what[512];
  va_list values;
  va_start(values, format);
  vsnprintf(what, sizeof what, format, values);
  va_end(values);
  fprintf(stderr, "shim: block (%u, %u, %u), thread (%u, %u, %u): %s\n", b.x, b.y, b.z, t.x, t.y,
          t.z, what);
  fflush(nullptr);
  // The other threads would wait for ever.
  _Exit(3);
}

// A barrier, which all threads must wait at on the same line of the text.
class Barrier {
 public:
  void expect(unsigned count) { size = count, waiting = gone = 0; }

  void wait(const char *at) {
    std::unique_lock<std::mutex> lock(mutex);
    if (waiting && strcmp(at, place))
      fail("divergent barrier: it waits at %s, others of its block at %s", at, place);
    place = at;
    waiting++;
    look();
    if (!waiting) return;
    const unsigned now = round;
    while (now == round) changed.wait(lock);
  }

  void leave() {
    std::lock_guard<std::mutex> lock(mutex);
    gone++;
    look();
  }

 private:
  void look() {
    if (waiting + gone < size || !waiting) return;
    if (gone)
      fail("divergent barrier: of %u threads %u wait at %s and %u have finished", size, waiting,
           place, gone);
    waiting = 0;
    round++;
    changed.notify_all();
  }

  std::mutex mutex;
  std::condition_variable changed;
  unsigned size = 0, waiting = 0, gone = 0, round = 0;
  const char *place = "";
};

// Threads that run one block after another. Nothing orders them relative to another team.
struct Team {
  Barrier block, between;
  std::vector<Barrier> warps;
  SharedMemory shared;
  std::vector<unsigned char> memory = std::vector<unsigned char>(SharedMemory::BYTES);

  explicit Team(unsigned threads) : warps((threads + 31) / 32) {
    shared.lay_out(memory.data());
    between.expect(threads);
    begin(threads);
  }

  void begin(unsigned threads) {
    block.expect(threads);
    for (unsigned w = 0; w < warps.size(); w++)
      warps[w].expect(threads - w * 32 < 32 ? threads - w * 32 : 32);
  }
};

// What a thread has done that orders it relative to others.
struct Order {
  bool fenced = false;
  std::atomic<unsigned> *last = nullptr;
};

inline thread_local Team *team;
inline thread_local unsigned number;
inline thread_local Order order;

inline void sync_block(const char *place) { team->block.wait(place); }
inline void sync_warp(const char *place) { team->warps[number / 32].wait(place); }

inline void run(void (*body)(void *), void *arguments, Index grid, Index block, const How &) {
  gridDim = grid;
  blockDim = block;
  const unsigned count = block.x * block.y * block.z;
  const unsigned long long blocks = 1ull * grid.x * grid.y * grid.z;
  const unsigned fitting = std::clamp(SHIM_MOST_THREADS / count, 2u, unsigned{SHIM_BLOCKS});
  const unsigned at_once = blocks < fitting ? static_cast<unsigned>(blocks) : fitting;
  std::vector<std::unique_ptr<Team>> teams;
  for (unsigned i = 0; i < at_once; i++) teams.push_back(std::make_unique<Team>(count));

  const auto live = [&](unsigned which, unsigned thread) {
    team = teams[which].get();
    number = thread;
    shared_memory = &team->shared;
    order = {};
    threadIdx = {thread % block.x, thread / block.x % block.y, thread / (block.x * block.y)};
    // A fixed share of the blocks, since taking them from a queue would order the teams.
    for (unsigned long long b = which; b < blocks; b += at_once) {
      blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                  static_cast<unsigned>(b / grid.x / grid.y)};
      body(arguments);
      team->block.leave();
      team->warps[number / 32].leave();
      team->between.wait("");
      if (thread == 0) {
        if (const char *wrong = team->shared.finish()) fail("%s", wrong);
        team->begin(count);
      }
      team->between.wait("");
    }
  };
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < at_once; i++)
    for (unsigned t = 0; t < count; t++) threads.emplace_back(live, i, t);
  for (std::thread &thread : threads) thread.join();
}

// A fence makes earlier writes visible to threads that see the atomic operation after it. GCC's
// ThreadSanitizer does not know fences, so that operation releases here. By the letter of CUDA's
// memory model a reader needs a fence too, after its own atomic operation; only SHIM_STRICT demands
// that, since the examples of CUDA's own guide do without.
template <class Change>
unsigned change(unsigned *address, Change changed) {
  auto *place = reinterpret_cast<std::atomic<unsigned> *>(address);
#ifdef SHIM_STRICT
  const std::memory_order fenced = std::memory_order_release;
#else
  const std::memory_order fenced = std::memory_order_acq_rel;
#endif
  const std::memory_order how = order.fenced ? fenced : std::memory_order_relaxed;
  order.fenced = false;
  order.last = place;
  unsigned old = place->load(std::memory_order_relaxed);
  while (!place->compare_exchange_weak(old, changed(old), how, std::memory_order_relaxed)) continue;
  return old;
}

}  // namespace shim

inline void __threadfence() {
  shim::order.fenced = true;
#ifdef SHIM_STRICT
  if (shim::order.last) (void)shim::order.last->load(std::memory_order_acquire);
#endif
}

inline unsigned atomicAdd(unsigned *address, unsigned value) {
  return shim::change(address, [=](unsigned old) { return old + value; });
}

inline unsigned atomicInc(unsigned *address, unsigned limit) {
  return shim::change(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
