"""The benchmarks of polyce, run from the root of a checkout.

python -m benchmarks.cpu            logits on a CPU, against torch and jax, eager and compiled
python -m benchmarks.cpu.reference  the reference on NumPy, and dask
python -m benchmarks.cpu.accuracy   errors of the row losses and of the label's gradient
python -m benchmarks.linear         the loss of a linear head
python -m benchmarks.gpu            logits on a GPU, with torch or CuPy
python -m benchmarks.gpu.cupy_host  the host's part of a call on CuPy arrays
"""
