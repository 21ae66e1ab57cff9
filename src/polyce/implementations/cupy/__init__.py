"""cupy: CUDA kernels for CuPy arrays, compiled by CuPy when they are first called."""
