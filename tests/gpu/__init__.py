"""Tests of the kernels on a GPU, or on what stands in for one on a CPU."""
