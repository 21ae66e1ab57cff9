// A whole call: labels first, then the rows, then the sum.
#pragma once

#include "job.hpp"

namespace polyce {

// Reads all labels; sets bad_label, or the denominator and what follows from it. Nothing is written.
void read_target(Job& job);
// Reads the logits, writes what the job has places for, and sets total.
void run(Job& job);
void log_softmax(Job job);
// Writes the loss of the whole, rounded once, if there is a reduction and a place for it.
void store_reduced(const Job& job);

// The instruction set in use, the one to use from now on (false for one that is not here), and
// those that are here, best first, ending with null.
const char* isa_name();
bool use_isa(const char* name);
const char* const* isa_names();

}  // namespace polyce
