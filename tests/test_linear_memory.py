"""The memory that a linear head's loss takes beside inputs and gradients, and its products.

Peaks are measured in fresh processes.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polyce
from polyce.linear import in_place
from polyce.testing.backends import Backend

measured = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell of peak memory"
)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "none"])


@pytest.mark.only("numpy")
def test_without_classes_no_memory_is_taken_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    def empty(shape: tuple[int, ...], dtype: Any, _: Any) -> Any:
        return np.full(shape, 7, dtype)

    used = in_place.PRODUCTS["numpy"]()._replace(empty=empty)
    monkeypatch.setitem(in_place.PRODUCTS, "numpy", lambda: used)
    _, (grad, *_) = polyce.linear_cross_entropy_with_grad(
        np.ones((3, 2)), np.ones((0, 2)), np.array([-100, 0, -100]), validate=False
    )
    assert (grad == 0.0).all()


ROWS, FEATURES, CLASSES = 1024, 64, 65536
LOGITS = 4 * ROWS * CLASSES
GRADIENTS = 4 * FEATURES * (ROWS + CLASSES)
MOST = 64_000_000
PROGRAM = """
import json, numpy as np, polyce

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

x, w = np.ones(({rows}, {features}), np.float32), np.full(({classes}, {features}), 1e-3, np.float32)
t = np.arange({rows}) % 100
{prepare}
{few}  # what is loaded or started once is there now
before = peak()
kept = {call}
print(json.dumps(peak() - before))
"""


def growth(call: str, few: str, prepare: str = "") -> float:
    source = PROGRAM.format(
        rows=ROWS, features=FEATURES, classes=CLASSES, prepare=prepare, few=few, call=call
    )
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return float(json.loads(done.stdout))


@pytest.mark.slow("numpy")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@REDUCTIONS
def test_numpy_holds_a_chunk(reduction: str) -> None:
    of = f"reduction={reduction!r}"
    with_grad = f"polyce.linear_cross_entropy_with_grad({{}}, {{}}, {{}}, {of})"
    few = with_grad.format("x[:8]", "w[:99]", "t[:8] % 9")
    assert growth(with_grad.format("x", "w", "t"), few) < GRADIENTS + MOST
    loss = f"polyce.linear_cross_entropy({{}}, {{}}, {{}}, {of}, return_stats=True)"
    assert growth(loss.format("x", "w", "t"), loss.format("x[:8]", "w[:99]", "t[:8] % 9")) < MOST


@pytest.mark.slow("numpy")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
def test_numpy_holds_a_chunk_for_log_probabilities() -> None:
    few = "polyce.linear_log_prob(x[:8], w[:99], t[:8] % 9)"
    assert growth("polyce.linear_log_prob(x, w, t)", few) < MOST


TARGETS = pytest.mark.parametrize(
    "target",
    [
        "polyce.SparseTarget(({2})[:, None], {0}[:, :1])",
        # The teacher's chunk counts: two of them would be 96 MiB.
        "polyce.TeacherHead({0}, {1}, scale=0.5)",
    ],
    ids=["sparse", "teacher"],
)


@pytest.mark.slow("numpy")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
@TARGETS
def test_numpy_holds_a_chunk_for_other_targets(target: str) -> None:
    call = f"polyce.linear_cross_entropy_with_grad({{0}}, {{1}}, {target})"
    few = call.format("x[:8]", "w[:99]", "t[:8] % 9")
    assert growth(call.format("x", "w", "t"), few) < GRADIENTS + MOST


@pytest.mark.slow("numpy")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("numpy")
def test_numpy_holds_a_chunk_of_the_rows_that_count() -> None:
    """The rows that count are not adjacent, and are 16-bit numbers computed in 32 bits."""
    call = "polyce.linear_cross_entropy_with_grad({}, {}, {})"
    few = call.format("x[:8]", "w[:99]", "t[:8] % 9")
    thinned = "t = np.where(t % 3, t, -100)"
    assert growth(call.format("x", "w", "t"), few, thinned) < GRADIENTS + MOST
    narrow = "x, w = x.astype(np.float16), w.astype(np.float16)"
    # The gradients are summed in float32, beside those that are returned.
    assert growth(call.format("x", "w", "t"), few, narrow) < 3 * GRADIENTS / 2 + MOST


TORCH = (
    "import torch; x, w, t = map(torch.from_numpy, (x, w, t)); {cast}"
    "few = [x[:8].clone().requires_grad_(), w[:99].clone().requires_grad_()]; "
    "x.requires_grad_(); w.requires_grad_()"
)
STEP = "polyce.linear_cross_entropy({}, {}, reduction={!r}).sum().backward()"
STATS_STEP = (
    "(lambda found: (found[0] + found[1].entropy.mean()).backward())"
    "(polyce.linear_cross_entropy({}, {}, return_stats='entropy'))"
)
LOG_PROB_STEP = "polyce.linear_log_prob({}, {}).sum().backward()"


@pytest.mark.slow("torch")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("torch")
@REDUCTIONS
def test_torch_holds_a_chunk(reduction: str) -> None:
    few = STEP.format("*few", "t[:8] % 9", reduction)
    call = STEP.format("x, w", "t", reduction)
    assert growth(call, few, TORCH.format(cast="")) < GRADIENTS + MOST


@pytest.mark.slow("torch")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("torch")
@pytest.mark.parametrize("step", [STATS_STEP, LOG_PROB_STEP], ids=["stats", "log_prob"])
def test_torch_holds_a_chunk_for_other_values(step: str) -> None:
    few, call = step.format("*few", "t[:8] % 9"), step.format("x, w", "t")
    assert growth(call, few, TORCH.format(cast="")) < GRADIENTS + MOST


@pytest.mark.slow("torch")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("torch")
@TARGETS
def test_torch_holds_a_chunk_for_other_targets(target: str) -> None:
    step = f"polyce.linear_cross_entropy({{3}}, {{4}}, {target}).backward()"
    few = step.format("held[0][:8]", "held[1][:99]", "t[:8] % 9", *("few[0]", "few[1]"))
    call = step.format(*("held[0]", "held[1]", "t"), *("x", "w"))
    prepare = TORCH.format(cast="") + "; held = [x.detach(), w.detach()]"
    assert growth(call, few, prepare) < GRADIENTS + MOST


@pytest.mark.slow("torch")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("torch")
def test_the_unfused_loss_holds_all_logits() -> None:
    """The measurement shows the logits when they are held."""
    step = "torch.nn.functional.cross_entropy(torch.nn.functional.linear({}), {}).backward()"
    few, call = step.format("*few", "t[:8] % 9"), step.format("x, w", "t")
    assert growth(call, few, TORCH.format(cast="")) > LOGITS


@pytest.mark.slow("torch")
@measured
@pytest.mark.same_everywhere
@pytest.mark.only("torch")
def test_torch_holds_a_chunk_in_16_bits() -> None:
    cast = "x, w = x.bfloat16(), w.bfloat16(); "
    few, call = STEP.format("*few", "t[:8] % 9", "mean"), STEP.format("x, w", "t", "mean")
    # Gradients are summed in float32; a 16-bit product of the head's size comes on top.
    assert growth(call, few, TORCH.format(cast=cast)) < 2 * GRADIENTS + MOST


# torch: what is computed, what is saved, and what is in the graphs


def products(torch: Any, call: Callable[[], Any]) -> int:
    """Count the products of 64 by 8 by 16 that torch was told to compute."""
    with torch.profiler.profile(record_shapes=True) as profile:
        call()
    terms = 0
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = event.input_shapes[event.name != "aten::mm" :][:2]
            terms += a[0] * a[1] * b[1]
    # The sum over rows for a bias may be a product with ones, an eighth as large.
    return round(terms / (64 * 8 * 16))


NEEDED = list(itertools.product([False, True], repeat=3))


@pytest.mark.only("torch")
@pytest.mark.parametrize("needed", NEEDED, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_only_what_is_needed_is_computed(torch: Any, reduction: str, needed: Any) -> None:
    arrays = (torch.randn(64, 8), torch.randn(16, 8), torch.randn(16))
    x, w, b = leaves = [a.requires_grad_(need) for a, need in zip(arrays, needed, strict=True)]
    target = torch.randint(16, (64,))

    def fused() -> Any:
        options = {"linear_bias": b, "reduction": reduction}
        return polyce.linear_cross_entropy(x, w, target, **options, chunk_size=16)

    def unfused() -> Any:
        logits = torch.nn.functional.linear(x, w, b)
        return torch.nn.functional.cross_entropy(logits, target, reduction=reduction)

    def call(function: Callable[[], Any] = fused) -> Any:
        loss = function()
        assert loss.requires_grad == any(needed)
        if any(needed):
            loss.sum().backward()
        return loss.detach()

    again = reduction == "none" and any(needed)
    assert products(torch, call) == 1 + again + needed[0] + needed[1]
    found = []
    for function in (fused, unfused):
        for leaf in leaves:
            leaf.grad = None
        found.append([call(function), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
        assert [leaf.grad is not None for leaf in leaves] == list(needed)
    torch.testing.assert_close(*found)


@pytest.mark.only("torch")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_what_is_saved_is_what_was_given(torch: Any, reduction: str) -> None:
    """For mean and sum, the gradients are saved too."""
    shapes = ((64, 8), (16, 8), (16,))
    leaves = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    x, w, b = leaves
    target = torch.randint(16, (64,))
    logits = torch.nn.functional.linear(x, w, b)
    want = torch.autograd.grad(
        torch.nn.functional.cross_entropy(logits, target, reduction=reduction).sum(), leaves
    )
    sizes: list[tuple[int, ...]] = []

    def pack(tensor: Any) -> Any:
        sizes.append(tuple(tensor.shape))
        return tensor.clone()

    hooks = torch.autograd.graph.saved_tensors_hooks
    for context in (hooks(pack, lambda tensor: tensor.clone()), torch.autograd.graph.save_on_cpu()):
        with context:
            loss = polyce.linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction)
        for keep in (True, False):
            got = torch.autograd.grad(loss.sum(), leaves, retain_graph=keep)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert sorted(sizes) == sorted([*shapes, (64,)])


@pytest.mark.only("torch")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@REDUCTIONS
def test_no_graph_makes_anything_of_the_logits_size(torch: Any, reduction: str) -> None:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    sizes: list[int] = []

    def note(graph: Any, inputs: Any) -> Any:
        nodes = [node.meta.get("val") for node in graph.graph.nodes if node.op != "placeholder"]
        arrays = torch.utils._pytree.tree_leaves(nodes)
        sizes.append(max(a.numel() for a in arrays if isinstance(a, torch.Tensor)))
        return make_boxed_func(graph.forward)

    rows, features, classes = 64, 8, 48
    x, w = torch.randn(rows, features), torch.randn(classes, features)
    target = torch.randint(classes, (rows,))

    def fused(x: Any, w: Any) -> Any:
        return polyce.linear_cross_entropy(x, w, target, reduction=reduction)

    def unfused(x: Any, w: Any) -> Any:
        return torch.nn.functional.cross_entropy(x @ w.T, target, reduction=reduction)

    for function, most in ((fused, rows * features), (unfused, rows * classes)):
        torch._dynamo.reset()
        sizes.clear()
        backend = aot_autograd(fw_compiler=note, bw_compiler=note)
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        torch.compile(function, fullgraph=True, backend=backend)(*leaves).sum().backward()
        assert (len(sizes), max(sizes)) == (2, most)
        plain = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        unfused(*plain).sum().backward()
        torch.testing.assert_close(*([leaf.grad for leaf in each] for each in (leaves, plain)))


# Heads so large that their classes are taken in blocks


@pytest.mark.only("numpy", "torch")
@pytest.mark.parametrize("chunk_size", [128, 100])  # of fewer rows, torch's lie class by class
@pytest.mark.parametrize("left_out", [False, True])
@REDUCTIONS
def test_blocks_of_classes(
    backend: Backend, reduction: str, left_out: bool, chunk_size: int
) -> None:
    rng = np.random.default_rng(0)
    x, w, b = (rng.standard_normal(shape) for shape in ((300, 512), (1500, 512), (1500,)))
    x /= 16
    target = rng.integers(0, 1500, 300)
    target[::3] = -100 if left_out else target[::3]
    hidden, head, labels, bias = map(backend.asarray, (x, w, target, b))
    loss, found = polyce.linear_cross_entropy_with_grad(
        hidden, head, labels, linear_bias=bias, reduction=reduction, chunk_size=chunk_size
    )
    want, grad = polyce.cross_entropy_with_grad(x @ w.T + b, target, reduction=reduction)
    exact = (want, grad @ w, grad.T @ x, grad.sum(axis=0))
    for one, other in zip((loss, *found), exact, strict=True):
        np.testing.assert_allclose(backend.to_numpy(one), other, rtol=1e-9, atol=1e-12)


@pytest.mark.only("torch")
@pytest.mark.parametrize(
    ("rows", "features", "dtype", "strides"),
    [
        (100, 512, "float32", (1, 100)),
        (128, 512, "float32", (200, 1)),
        (100, 511, "float32", (200, 1)),
        (100, 512, "bfloat16", (200, 1)),
    ],
)
def test_few_rows_of_a_wide_head_lie_class_by_class(
    torch: Any, monkeypatch: Any, rows: int, features: int, dtype: str, strides: tuple[int, int]
) -> None:
    from polyce.implementations.native import path

    seen, original = [], path.run

    def spy(own: Any, problem: Any, operands: Any, grad: Any, **options: Any) -> Any:
        seen.append((operands.logits.stride(), grad.stride()))
        return original(own, problem, operands, grad, **options)

    monkeypatch.setattr(path, "run", spy)
    hidden = torch.ones((rows, features), dtype=getattr(torch, dtype))
    head = torch.ones((200, features), dtype=hidden.dtype)
    polyce.linear_cross_entropy_with_grad(hidden, head, torch.zeros(rows, dtype=torch.int64))
    assert seen == [(strides, strides)]


class OnCuda:
    """A stand-in for a 16-bit matrix on a device of type cuda, which ROCm's are too."""

    is_cuda = True
    dtype = "16 bits"


WIDE_OVERLOADS = ["default", "out", "dtype", "dtype_out"]


@pytest.mark.only("torch")
@pytest.mark.parametrize(
    ("version", "hip", "overloads", "asked"),
    [
        ("2.13.0+cu130", None, WIDE_OVERLOADS, [("mm", "wide", "in place"), ("addmm", "in place")]),
        ("2.9.1+cu128", None, WIDE_OVERLOADS, [("mm", "wide", "in place"), ("mm", "wide")]),
        ("2.7.1+cu126", None, WIDE_OVERLOADS[:2], [("mm",), ("mm",)]),
        ("2.13.0+rocm7.0", "7.0", WIDE_OVERLOADS, [("mm",), ("mm",)]),
    ],
    ids=["cuda", "torch-2.9", "torch-2.7", "rocm"],
)
def test_wide_products_are_asked_for_where_they_are(
    torch: Any,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    hip: str | None,
    overloads: list[str],
    asked: list[tuple[str, ...]],
) -> None:
    import importlib

    from polyce.linear import torch_memory

    done = []
    total = torch.full((2, 2), 3.0)

    def product(a: Any, b: Any, out_dtype: Any = None, out: Any = None) -> Any:
        assert out_dtype in (None, torch.float32)
        words = {"wide": out_dtype is not None, "in place": out is total}
        done.append(("mm", *(word for word, is_so in words.items() if is_so)))
        return torch.ones(2, 2) if out is None else out.fill_(1.0)

    def sum_of_products(given: Any, a: Any, b: Any, out_dtype: Any, out: Any) -> Any:
        assert given is total
        assert out is total
        assert out_dtype == torch.float32
        done.append(("addmm", "in place"))
        return out.add_(1.0)

    with monkeypatch.context() as patched:
        patched.setattr(torch.version, "hip", hip)
        patched.setattr(torch, "__version__", type(torch.__version__)(version))
        for operator in (torch.ops.aten.mm, torch.ops.aten.addmm):
            patched.setattr(operator, "overloads", lambda: overloads)
        patched.setattr(torch, "mm", product)
        patched.setattr(torch, "addmm", sum_of_products)
        add_product = importlib.reload(torch_memory).PRODUCTS.add_product
        add_product(OnCuda(), OnCuda(), total, True, None)
        add_product(OnCuda(), OnCuda(), total, False, None)
    importlib.reload(torch_memory)
    assert done == asked
    assert torch.equal(total, torch.full((2, 2), 2.0))


@pytest.mark.only("torch")
def test_torch_takes_what_is_asked_of_it(torch: Any) -> None:
    """The operators' schemas have the arguments; a CPU has no kernels for them."""
    schemas = [getattr(torch.ops.aten, name).dtype_out._schema for name in ("mm", "addmm")]
    for schema, count in zip(schemas, (2, 3), strict=True):
        names = [argument.name for argument in schema.arguments]
        assert (names[count], names[-1]) == ("out_dtype", "out")
        a, total = torch.ones((2, 2), dtype=torch.bfloat16), torch.zeros(2, 2)
        call = torch.mm if count == 2 else torch.addmm
        with pytest.raises(NotImplementedError, match=r"aten::\w*mm\.dtype_out"):
            call(*[total][: count - 2], a, a, out_dtype=torch.float32, out=total)


@pytest.mark.only("torch")
@pytest.mark.parametrize(
    ("features", "bytes_of_block"), [(1024, 32 << 20), (4096, 128 << 20)], ids=["cached", "large"]
)
def test_blocks_on_a_gpu_stay_in_its_cache_where_that_helps(
    torch: Any, features: int, bytes_of_block: int
) -> None:
    """The gradient of 2048 rows' hidden states is read and written for each block of classes."""
    from polyce.call.options import Options
    from polyce.call.problem import describe
    from polyce.linear import chunks

    x, t = torch.empty((8192, 128256), dtype=torch.bfloat16, device="meta"), torch.zeros(8192)
    problem, _ = describe(x, t.long().to("meta"), options=Options(validate=False))
    cut = chunks.choose(problem._replace(device="cuda"), features, None)
    assert cut.rows == 2048
    assert 0 <= 2 * (cut.rows + features) * cut.classes - bytes_of_block < 128 * (2048 + features)
