"""A Triton driver without a device: it compiles kernels for a GPU and records launches.

So the same Python code runs here as in a call on a GPU, on tensors in ordinary memory.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from polyce.call.options import Options
from polyce.call.problem import describe
from polyce.call.target import TeacherLogits
from polyce.formula import rows
from polyce.formula.parts import Whole
from polyce.implementations.triton import calls as triton_torch
from polyce.implementations.triton import kernels as triton_kernels
from polyce.implementations.triton import parts as triton_parts
from polyce.implementations.triton import plans

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launched:
    """A launch: the kernel, its grid, its number of warps, and its arguments."""

    name: str
    grid: tuple[int, int, int]
    warps: int
    arguments: tuple[Any, ...]
    hash: str
    """The hash that identifies its binary."""


@dataclass
class Recorder:
    """A driver that Triton takes for a device of some target."""

    target: GPUTarget
    # Triton keeps compiled kernels by device, so each target poses as a separate device.
    device: int
    launched: list[Launched] = field(default_factory=list)

    @property
    def utils(self) -> Recorder:
        return self

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            # The kernel's own arguments come last.
            values = tuple(rest[-len(source.fn.arg_names) :])
            self.launched.append(
                Launched(metadata.name, (x, y, z), metadata.num_warps, values, metadata.hash)
            )

        return launch

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": 65536,
            "max_num_regs": 65536,
            "multiprocessor_count": 132,
            "warpSize": self.target.warp_size,
        }

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


# A compiled kernel keeps the recorder that it was first launched through.
RECORDERS = {
    name: Recorder(target, device) for device, (name, target) in enumerate(TARGETS.items())
}


def record(name: str) -> Recorder:
    """Make Triton compile for a target from now on, and return the recorder of launches.

    Beside the names in TARGETS there are those of other architectures, such as "sm_86".
    """
    if name not in RECORDERS:
        is_cuda = name.startswith("sm_")
        target = GPUTarget("cuda", int(name[3:]), 32) if is_cuda else GPUTarget("hip", name, 64)
        RECORDERS[name] = Recorder(target, len(RECORDERS))
    recorder = RECORDERS[name]
    recorder.launched.clear()
    plans.forget()
    driver.set_active(recorder)
    return recorder


def call(
    *arrays: Any, keep: bool = True, backward: bool = True, grad_stats: Any = None, **options: Any
) -> Any:
    """Run a call's own code for the triton path, forward and backward; validate=False."""
    options = {"validate": False} | options
    problem, operands = describe(
        *arrays, options=Options.taken_from(options), grad_stats=grad_stats
    )
    loss, _, saved = triton_torch.forward(problem, operands, keep)
    if not backward:
        return None
    cotangent = torch.ones((), dtype=loss.dtype).expand(loss.shape)
    operands = operands._replace(grad_output=cotangent)
    return triton_torch.backward(problem, operands, saved, None)


def call_part(shard: Any, target: Any, *arrays: Any, classes: int, **options: Any) -> None:
    """Run the code of some classes of a call, from the second on: state, then gradient."""
    options = {"validate": False} | options
    of_stats = options.pop("grad_stats", None)
    shape = (shard.shape[0], classes, *shard.shape[2:])
    soft = isinstance(target, torch.Tensor) and target.is_floating_point()
    whole: Any = target.new_empty(()).expand(shape) if soft else target
    if isinstance(target, TeacherLogits):
        whole = target._replace(logits=shard.new_empty(()).expand(shape))
    problem, operands = describe(
        shard.new_empty(()).expand(shape), whole, *arrays,
        options=Options.taken_from(options), grad_stats=of_stats,
    )  # fmt: skip
    operands = operands._replace(logits=shard)
    teacher = None
    if soft:
        operands = operands._replace(target=target)
    if problem.kind == "teacher":
        operands = operands._replace(target=target.logits)
        teacher = triton_parts.read_teacher(problem, target.logits)
    part = triton_parts.read(problem, operands, 1, teacher)
    joined = Whole(None, part.state, part.pivot, None, None)
    cotangents = rows.stats_cotangents(problem, operands)
    triton_parts.gradient(problem, operands, 1, joined, 1.0, cotangents, teacher)


def call_both(*arrays: Any, **options: Any) -> Any:
    """Run a call's own code for loss and gradient, the gradient over the logits."""
    options = {"validate": False} | options
    problem, operands = describe(*arrays, options=Options.taken_from(options))
    return triton_torch.cross_entropy_with_grad(problem, operands, arrays[0])


def binary(launched: Launched, device: int) -> Any:
    """Return what was compiled for a launch."""
    kernel = getattr(triton_kernels, launched.name)
    compiled = kernel.device_caches[device][0].values()
    return next(one for one in compiled if one.metadata.hash == launched.hash)


def registers(binary: Any, folder: Path) -> tuple[int, int]:
    """Return how many registers a thread has, and how many bytes it spills.

    On NVIDIA's GPUs spilled bytes are reported as stack.
    """
    if "amdgcn" in binary.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", binary.asm["amdgcn"]))
        return int(found["vgpr_count"]), int(found["vgpr_spill_count"])
    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return int(found[1]), int(found[2])


def spills_in_loops(compiled: Any, folder: Path) -> list[str]:
    """Return the instructions for NVIDIA's GPUs that access a spilled register in a loop."""
    lines = disassembled(compiled, folder)
    found = []
    for first, last in _loops(lines):
        found += [one for one in lines[first:last] if re.search(r"\b(LDL|STL)\b", one)]
    return found


def instructions(compiled: Any, folder: Path) -> tuple[int, int]:
    """Count the instructions for NVIDIA's GPUs: in all, and of the longest loop."""
    lines = disassembled(compiled, folder)
    marks = [bool(re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+[^/\s]", line)) for line in lines]
    return sum(marks), max((sum(marks[a : b + 1]) for a, b in _loops(lines)), default=0)


def disassembled(compiled: Any, folder: Path) -> list[str]:
    """Return the lines of the machine code for NVIDIA's GPUs."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [str(tool), "-c", str(path)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return told.splitlines()


def _loops(lines: list[str]) -> list[tuple[int, int]]:
    """Return the first and last line of each loop."""
    labels = {line.rstrip(":"): number for number, line in enumerate(lines) if line[:2] == ".L"}
    found = []
    for number, line in enumerate(lines):
        branch = re.search(r"\bBRA(?:\.\w+)* .*`\((\.L\w+)\)", line)
        first = labels.get(branch[1], number) if branch else number
        # A jump to itself follows the end.
        if first < number - 1:
            found.append((first, number))
    return found


def widths(binary: Any) -> tuple[set[int], set[int]]:
    """Return how many bytes at once it loads, and stores."""
    if "amdgcn" in binary.asm:
        sizes = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
        found = re.findall(r"(?:global|buffer)_(load|store)_(\w+?)\b", binary.asm["amdgcn"])
        pairs = [(kind, sizes.get(size.removesuffix("_d16"), 1)) for kind, size in found]
    else:
        found = re.findall(r"\b(ld|st)\.global(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
        pairs = [
            ("load" if kind == "ld" else "store", int(count or 1) * int(bits) // 8)
            for kind, count, bits in found
        ]
    return tuple({size for kind, size in pairs if kind == what} for what in ("load", "store"))
