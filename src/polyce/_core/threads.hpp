// The threads that share a call's tiles.
#pragma once

#include <cstdint>

namespace polyce {

// Threads that a large call uses, the caller's own among them.
int thread_count();
void set_thread_count(int count);

// Runs task(context, tile, scratch) for every tile below `tiles`, on at most `threads` threads,
// each with scratch memory of its own and in the caller's floating-point mode. Which thread takes
// which tile is not fixed. Throws std::bad_alloc before the first task, or not at all; a task must
// not throw.
void share_tiles(
    std::int64_t tiles, int threads, std::int64_t scratch_bytes,
    void (*task)(void* context, std::int64_t tile, char* scratch), void* context
);

}  // namespace polyce
