"""triton: kernels for torch tensors on CUDA and ROCm."""
