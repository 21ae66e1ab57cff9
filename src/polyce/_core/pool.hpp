// polyce's own helpers: threads that sleep until a call wants some of them.
#pragma once

namespace polyce {

// Runs work(context) on the calling thread and on up to `helpers` others, on each at most once, and
// returns when none of them is at it. One that has not begun when the caller is done never does.
void run_with_pool(int helpers, void (*work)(void* context), void* context);

}  // namespace polyce
