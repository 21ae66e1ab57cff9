// What the emulated CuPy calls through ctypes. The table `shim_kernels` comes after the text.
#pragma once

#define SHIM_EXPORT extern "C" __attribute__((visibility("default")))

SHIM_EXPORT unsigned long long shim_scratch() { return shim::SCRATCH; }

SHIM_EXPORT const shim::Kernel *shim_kernel(const char *name) {
  for (const shim::Kernel &kernel : shim_kernels)
    if (!strcmp(kernel.name, name)) return &kernel;
  return nullptr;
}

SHIM_EXPORT const char *shim_launch(const shim::Kernel *kernel, void **arguments,
                                    const unsigned *grid, const unsigned *block,
                                    const shim::How *how) {
  kernel->launch(arguments, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, *how);
  return shim::failure[0] ? shim::failure : nullptr;
}
