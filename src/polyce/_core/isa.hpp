// Which instruction set's kernels run.
#pragma once

#include "job.hpp"

namespace polyce {

const Kernels& current_kernels();

}  // namespace polyce
