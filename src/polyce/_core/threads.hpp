// The threads that share a call's tiles.
#pragma once

#include <cstdint>

namespace polyce {

// Threads that a large call uses, the caller's own among them.
int thread_count();
void set_thread_count(int count);

using Task = void (*)(void* context, std::int64_t tile, char* scratch);

// Runs task(context, tile, scratch) for every tile below `tiles`, on at most `threads` threads,
// each with scratch memory of its own and in the caller's floating-point mode. Which thread takes
// which tile is not fixed. `with_torch`: torch's threads may help. Throws std::bad_alloc before the
// first task, or not at all; a task must not throw.
void share_tiles(
    std::int64_t tiles, int threads, bool with_torch, std::int64_t scratch_bytes, Task task, void* context
);

}  // namespace polyce
