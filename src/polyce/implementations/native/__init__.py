"""native: the compiled kernels, for NumPy arrays and torch tensors on a CPU."""
