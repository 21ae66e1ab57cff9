"""Count what Triton's kernels do, from their machine code for an H100, without a GPU.

python -m benchmarks.gpu.counts

For a call: its launches. For each kernel of rows: programs, registers of a thread, instructions for
each logit, and the bytes of logits that a multiprocessor has in flight when it is full.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..tables import show

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "4096 x 32768": ((4096, 32768), (32768, 1)),
    "131072 x 1000": ((131072, 1000), (1000, 1)),
    "1048576 x 10": ((1048576, 10), (10, 1)),
    "8 x 19 x 1024 x 2048": ((8, 19, 2**21), (19 * 2**21, 2**21, 1)),
    "8 x 128256": ((8, 128256), (128256, 1)),
}
KERNELS = ("forward", "join", "backward", "both")
# Of an H100's multiprocessor.
_REGISTERS, _WARPS, _PROGRAMS = 65536, 64, 32


def main() -> None:
    """Print the counts."""
    import torch

    from recorder import call, call_both, record

    recorder = record("sm_90")
    rows = []
    for name, (shape, strides) in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            labels = _nowhere((shape[0], *shape[2:]), None, torch.int64)
            logits = _nowhere(shape, strides, dtype)
            for run in (call, call_both):
                recorder.launched.clear()
                run(logits, labels)
                launches = ", ".join(launch.name for launch in recorder.launched)
                for counted in _counted(recorder):
                    kind = f"{name} {str(dtype).removeprefix('torch.')}"
                    rows.append({"logits": kind, "launches": launches} | counted)
    show(rows)


def _nowhere(shape: tuple[int, ...], strides: tuple[int, ...] | None, dtype: Any) -> Any:
    """Return a tensor whose memory the system provides only when it is touched."""
    import torch

    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    count = math.prod(shape)
    memory = mmap.mmap(-1, 8 * count, flags=flags)
    flat = torch.frombuffer(memory, dtype=dtype, count=count)
    return flat.view(shape) if strides is None else flat.as_strided(shape, strides)


def _counted(recorder: Any) -> Iterator[dict[str, Any]]:
    """Yield the counts of each kernel of rows that was launched."""
    from polyce.implementations.triton import kernels
    from recorder import binary, instructions, registers

    for launch in recorder.launched:
        if launch.name not in KERNELS:
            continue
        compiled = binary(launch, recorder.device)
        with tempfile.TemporaryDirectory() as folder:
            count, spilled = registers(compiled, Path(folder))
            total, loop = instructions(compiled, Path(folder))
        names = getattr(kernels, launch.name).arg_names
        given = dict(zip(names, launch.arguments, strict=True))
        numbers = given["TILE"] * given["LANES"]
        found = {
            "kernel": launch.name,
            "programs": launch.grid[0] * launch.grid[1],
            "warps": launch.warps,
            "registers": count,
            "spilled": spilled,
        }
        if launch.name != "join":
            size = given["x_ptr"].element_size()
            # A thread's registers are given out by eights.
            by_registers = _REGISTERS // (32 * launch.warps * (-(-count // 8) * 8))
            resident = min(by_registers, _WARPS // launch.warps, _PROGRAMS)
            of_all = total if launch.name == "both" else loop
            found["a logit"] = round(of_all * 32 * launch.warps / numbers, 1)
            found["in flight KB"] = resident * numbers * size // 1024
        yield found


if __name__ == "__main__":
    main()
