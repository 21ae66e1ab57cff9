// The threads that torch has for the calling thread. They spin for milliseconds after each of its
// calls: so they are there at once, and no other thread gets the processors they are on.
#pragma once

namespace polyce {

// Runs work(context) on torch's threads, the calling one among them, and returns when all have done
// it. False, and nothing is run, if torch has fewer than `threads`, is not of a kind that is known, or
// if its threads have no processor now: asleep, or kept from it by others.
bool run_with_torch(int threads, void (*work)(void* context), void* context);

}  // namespace polyce
