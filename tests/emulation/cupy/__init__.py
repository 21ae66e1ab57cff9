"""A stand-in for CuPy without a GPU: arrays in ordinary memory, kernels compiled as C++.

Put it on `sys.path` before CuPy. It has what polyce asks of CuPy, as CuPy 14.2 does it. What CuPy
accepts silently but a GPU would fail at raises `emulation.EmulationError`. `emulation` records what
was done and sets how kernels run.

What it imitates, as read in CuPy's source, 14.2.0 unless another version is named (`_arguments`
says how kernels' arguments are passed):

- `RawModule` compiles when a function is first asked for (`_core/raw.pyx`). A name that the text
  lacks is a CUDADriverError: CUDA_ERROR_NOT_FOUND.
- An extent of 0 in a grid or block becomes 1 (`cuda/function.pyx`); an error here.
- `-ftz=true` is added to all options (`cuda/compiler.py`): see `emulation.flushes`.
- Arrays start at multiples of 512 in CuPy's pool, at multiples of 256 here. An array of no bytes
  has address 0 (`cuda/memory.pyx`).
- Host arrays are copied in C order, or in Fortran order if they are only in that, whatever their
  strides (`_core/core.pyx` `_array_default`), and in the machine's byte order. `empty` and `astype`
  raise ValueError for the other byte order (`_core/_dtype.pyx`), while `view` takes it; 13.2 takes
  it everywhere.
- Results of elementwise functions are in C order; `astype` and `empty_like` keep the order of the
  strides (`_core/internal.pyx` `_get_strides_for_order_K`).
- Reductions over all axes return 0-d arrays. There is no `__index__`.
- NumPy arrays are refused as operands: TypeError, "Unsupported type" (`_core/_scalar.pyx`).
- An operand on another device is a ValueError in CuPy's own kernels if the devices cannot reach
  each other (`_core/_kernel.pyx` `_check_peer_access`); the devices here never can.
- An operand that shares memory with `out`, but is another object, is copied (`_core/_kernel.pyx`
  `_copy_in_args_if_needed`).
- `where` has no kernel for bfloat16 and gives float32 (`_sorting/search.py`).
- `get`, and everything else that hands Python a value, waits for the device; so do `nonzero` and a
  mask as an index, for their result's size (`_core/_routines_indexing.pyx`).

`_products` describes matrix products.
"""

from . import _functions, cuda, emulation, fft, linalg
from ._functions import (
    arange,
    array,
    asarray,
    ascontiguousarray,
    asnumpy,
    broadcast_to,
    clip,
    copy,
    copyto,
    empty,
    empty_like,
    eye,
    full,
    full_like,
    get_array_module,
    linspace,
    may_share_memory,
    ones,
    ones_like,
    result_type,
    where,
    zeros,
    zeros_like,
)
from ._ndarray import ndarray
from ._products import matmul
from ._raw import RawKernel, RawModule

__version__ = "14.2.0+emulated"

_functions.add_methods()
globals().update(_functions.names())

__all__ = [  # noqa: PLE0604
    "RawKernel",
    "RawModule",
    "arange",
    "array",
    "asarray",
    "ascontiguousarray",
    "asnumpy",
    "broadcast_to",
    "clip",
    "copy",
    "copyto",
    "cuda",
    "empty",
    "empty_like",
    "emulation",
    "eye",
    "fft",
    "full",
    "full_like",
    "get_array_module",
    "linalg",
    "linspace",
    "matmul",
    "may_share_memory",
    "ndarray",
    "ones",
    "ones_like",
    "result_type",
    "where",
    "zeros",
    "zeros_like",
    *_functions.names(),
]
