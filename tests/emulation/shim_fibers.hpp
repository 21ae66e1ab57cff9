// One fiber for each CUDA thread of a block, block after block, on the thread that asked for it. For
// Linux on x86-64.
#pragma once

#include <pmmintrin.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <ucontext.h>

namespace shim {

constexpr unsigned MOST_THREADS = 1024;
constexpr size_t STACK = 64 * 1024;
// Working memory of a launch; it belongs to the caller, who lends it to every launch.
constexpr size_t SCRATCH = SharedMemory::BYTES + MOST_THREADS * STACK;
// Written at the far end of every stack.
constexpr uint64_t UNTOUCHED = 0x5AFE5AFE5AFE5AFE;

enum State : unsigned char { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, FINISHED };

struct Fiber {
  void *top;
  State state;
  const char *place;  // of the barrier it waits at
  Index index;
};

inline Fiber fibers[MOST_THREADS];
inline unsigned turns[MOST_THREADS];
inline unsigned threads, current;
inline bool inside;  // a kernel is running, not the code around it
inline void *outside;
inline SharedMemory block_memory;
inline unsigned char *stacks;
inline void (*kernel)(void *);
inline void *kernel_arguments;

// Saves the registers that a function call preserves, and continues where the other fiber stopped.
extern "C" void shim_switch(void **from, void *to);
__asm__(R"(
  .text
  .globl shim_switch
  .hidden shim_switch
  .type shim_switch, @function
shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size shim_switch, .-shim_switch
)");

inline void leave(State state, const char *place) {
  Fiber &fiber = fibers[current];
  fiber.state = state;
  fiber.place = place;
  inside = false;
  shim_switch(&fiber.top, outside);
}

inline void sync_block(const char *place) { leave(AT_BLOCK_BARRIER, place); }
inline void sync_warp(const char *place) { leave(AT_WARP_BARRIER, place); }

inline void note(const char *format, va_list values) {
  if (failure[0]) return;
  char what[512];
  vsnprintf(what, sizeof what, format, values);
  const Index &b = blockIdx, &t = threadIdx;
  snprintf(failure, sizeof failure, "block (%u, %u, %u)", b.x, b.y, b.z);
  if (inside) {
    const size_t end = strlen(failure);
    snprintf(failure + end, sizeof failure - end, ", thread (%u, %u, %u)", t.x, t.y, t.z);
  }
  const size_t end = strlen(failure);
  snprintf(failure + end, sizeof failure - end, ": %s", what);
}

inline void fail(const char *format, ...) {
  va_list values;
  va_start(values, format);
  note(format, values);
  va_end(values);
  leave(FINISHED, "");
  abort();
}

// The same from outside a kernel, where there is no fiber to switch to.
__attribute__((format(printf, 1, 2))) inline void refuse(const char *format, ...) {
  va_list values;
  va_start(values, format);
  note(format, values);
  va_end(values);
}

[[noreturn]] inline void enter() {
  kernel(kernel_arguments);
  leave(FINISHED, "");
  abort();
}

inline void resume(unsigned thread) {
  current = thread;
  threadIdx = fibers[thread].index;
  inside = true;
  shim_switch(&outside, fibers[thread].top);
}

class Random {
 public:
  explicit Random(unsigned seed) : state(seed * 0x9E3779B97F4A7C15ull + 0x1234567ull) {}
  unsigned below(unsigned limit) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<unsigned>((state >> 32) * limit >> 32);
  }

 private:
  uint64_t state;
};

inline void set_up(unsigned thread) {
  unsigned char *stack = stacks + thread * STACK;
  memcpy(stack, &UNTOUCHED, sizeof UNTOUCHED);
  void **top = reinterpret_cast<void **>(stack + STACK);
  *--top = nullptr;  // the place of a return address: on entry stacks are odd multiples of 8
  *--top = reinterpret_cast<void *>(&enter);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  const Index &b = blockDim;
  fibers[thread].top = top;
  fibers[thread].state = READY;
  fibers[thread].index = {thread % b.x, thread / b.x % b.y, thread / (b.x * b.y)};
}

// Releases the warps whose threads all wait for each other.
inline bool release_warps() {
  bool released = false;
  for (unsigned first = 0; first < threads; first += 32) {
    const unsigned end = first + 32 < threads ? first + 32 : threads;
    unsigned waiting = 0, finished = 0;
    for (unsigned t = first; t < end; t++) {
      waiting += fibers[t].state == AT_WARP_BARRIER;
      finished += fibers[t].state == FINISHED;
    }
    if (!waiting || waiting + finished < end - first) continue;
    for (unsigned t = first; t < end; t++)
      if (fibers[t].state == AT_WARP_BARRIER) fibers[t].state = READY;
    released = true;
  }
  return released;
}

// Releases the block if it may go on; otherwise reports what it waits for.
inline void release_block() {
  unsigned waiting = 0, elsewhere = 0, in_warps = 0, finished = 0;
  const char *place = "", *other = "";
  for (unsigned t = 0; t < threads; t++) {
    const Fiber &fiber = fibers[t];
    if (fiber.state == AT_BLOCK_BARRIER) {
      if (!waiting) place = fiber.place;
      waiting++;
      if (strcmp(fiber.place, place)) elsewhere++, other = fiber.place;
    }
    in_warps += fiber.state == AT_WARP_BARRIER;
    finished += fiber.state == FINISHED;
  }
  if (waiting == threads && !elsewhere) {
    for (unsigned t = 0; t < threads; t++) fibers[t].state = READY;
    return;
  }
  if (elsewhere)
    refuse("divergent barrier: of %u threads %u wait at the __syncthreads of %s and %u at that of %s",
           threads, waiting - elsewhere, place, elsewhere, other);
  else
    refuse("divergent barrier: of %u threads %u wait at __syncthreads (%s), %u at __syncwarp and %u "
           "have finished",
           threads, waiting, place, in_warps, finished);
}

inline void run_block(int order, Random &random) {
  for (unsigned t = 0; t < threads; t++) {
    set_up(t);
    turns[t] = order == 1 ? threads - 1 - t : t;
  }
  for (;;) {
    for (unsigned i = threads; order == 2 && i > 1; i--) {
      const unsigned j = random.below(i), swapped = turns[i - 1];
      turns[i - 1] = turns[j];
      turns[j] = swapped;
    }
    unsigned finished = 0;
    for (unsigned i = 0; i < threads; i++) {
      if (fibers[turns[i]].state == READY) resume(turns[i]);
      if (failure[0]) return;
      finished += fibers[turns[i]].state == FINISHED;
    }
    if (finished == threads) break;
    if (!release_warps()) release_block();
    if (failure[0]) return;
  }
  for (unsigned t = 0; t < threads; t++)
    if (memcmp(stacks + t * STACK, &UNTOUCHED, sizeof UNTOUCHED))
      refuse("a thread needs more than %zu bytes of stack", STACK);
  if (const char *wrong = block_memory.finish()) refuse("%s", wrong);
}

constexpr int FAULTS[] = {SIGSEGV, SIGBUS, SIGFPE};
inline int fault;
inline void *fault_address;
[[noreturn]] inline void after_fault() {
  if (fault == SIGFPE) fail("it divides an integer by 0");
  fail("it reads or writes %p, where nothing is", fault_address);
}

// A kernel that accesses unmapped memory is an error of its launch, not the end of the process.
inline void on_fault(int number, siginfo_t *info, void *context) {
  if (!inside) {
    signal(number, SIG_DFL);
    return;
  }
  fault = number;
  fault_address = info->si_addr;
  greg_t *registers = static_cast<ucontext_t *>(context)->uc_mcontext.gregs;
  registers[REG_RSP] = ((registers[REG_RSP] - 1024) & ~15ll) - 8;
  registers[REG_RIP] = reinterpret_cast<greg_t>(&after_fault);
}

// The blocks of a grid, each once: forward, backward, or in leaps coprime to their number.
class Blocks {
 public:
  Blocks(unsigned long long count, int order, Random &random) : count(count) {
    if (order == 1) place = count - 1, leap = count - 1;
    if (order != 2) return;
    place = random.below(count < 0xFFFFFFFFull ? static_cast<unsigned>(count) : 0xFFFFFFFFu);
    leap = count * 5 / 8 | 1;
    while (divisor(leap, count) != 1) leap += 2;
  }
  unsigned long long next() {
    const unsigned long long now = place;
    place = static_cast<unsigned long long>((static_cast<__uint128_t>(place) + leap) % count);
    return now;
  }

 private:
  static unsigned long long divisor(unsigned long long a, unsigned long long b) {
    return b ? divisor(b, a % b) : a;
  }
  unsigned long long count, place = 0, leap = 1;
};

// If asked to, treats subnormal numbers as 0 for its lifetime, as CuPy's compiled kernels do.
class Flushing {
 public:
  explicit Flushing(bool wanted) : before(_mm_getcsr()) {
    if (wanted) _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
  }
  ~Flushing() { _mm_setcsr(before); }

 private:
  const unsigned before;
};

inline void run(void (*body)(void *), void *arguments, Index grid, Index block, const How &how) {
  const int order = how.order;
  void *const scratch = how.scratch;
  const Flushing flushing(how.flushes);
  kernel = body;
  kernel_arguments = arguments;
  gridDim = grid;
  blockDim = block;
  threads = block.x * block.y * block.z;
  failure[0] = 0;
  block_memory.lay_out(static_cast<unsigned char *>(scratch));
  shared_memory = &block_memory;
  stacks = static_cast<unsigned char *>(scratch) + SharedMemory::BYTES;

  struct sigaction ours = {}, was[3];
  ours.sa_sigaction = on_fault;
  ours.sa_flags = SA_SIGINFO | SA_NODEFER;
  for (int i = 0; i < 3; i++) sigaction(FAULTS[i], &ours, &was[i]);

  Random random(how.seed);
  const unsigned long long count = 1ull * grid.x * grid.y * grid.z;
  Blocks blocks(count, order, random);
  for (unsigned long long i = 0; i < count && !failure[0]; i++) {
    const unsigned long long b = blocks.next();
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block(order, random);
  }
  for (int i = 0; i < 3; i++) sigaction(FAULTS[i], &was[i], nullptr);
}

}  // namespace shim

inline void __threadfence() {}

inline unsigned atomicAdd(unsigned *address, unsigned value) {
  const unsigned old = *address;
  *address = old + value;
  return old;
}

inline unsigned atomicInc(unsigned *address, unsigned limit) {
  const unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

#ifdef SHIM_ALIGNMENT
// Called by -fsanitize=alignment. The sanitizer's own library could only end the process.
struct shim_Mismatch {
  const char *file;
  unsigned line, column;
  const void *type;
  unsigned char alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(shim_Mismatch *data, void *address) {
  shim::fail("misaligned access at %s:%u: %p is no multiple of %llu", data->file, data->line,
             address, 1ull << data->alignment);
}
#endif
