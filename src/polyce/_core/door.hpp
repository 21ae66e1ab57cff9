// The door: a call like one before is answered here, before Python describes it again.
#pragma once

#include <nanobind/nanobind.h>

namespace polyce {

void declare_door(nanobind::module_& module);

}  // namespace polyce
