"""What reaches a call on torch from outside: what hooks return, freed memory, operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import polyce
from polyce.call.options import Options

pytestmark = pytest.mark.only("torch")

PATHS = ("native", "reference")


def hooks(
    torch: Any, unpack: Callable[[Any], Any], pack: Callable[[Any], Any] = lambda t: t
) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def gradient(torch: Any, context: Any, x: Any, target: Any, **options: Any) -> Any:
    x = x.detach().clone().requires_grad_()
    with context:
        loss = polyce.cross_entropy(x, target, **options)
    (grad,) = torch.autograd.grad(loss, x)
    return grad


@pytest.mark.parametrize("kind", ["label", "probabilities", "label with its entropy"])
@pytest.mark.parametrize("classes", [300, 32000])
def test_hooks_that_keep_small_floats_as_bfloat16(torch: Any, classes: int, kind: str) -> None:
    x = torch.randn(4, classes)
    x[:, classes - 1] = 9.0
    # A class number that is rounded up points there.
    x[1::2, 0] = 20.0
    target = torch.tensor([classes - 1, 299, 0, classes - 1])
    if kind == "probabilities":
        target = torch.softmax(torch.randn(4, classes), 1)
    options = {"return_stats": True} if "entropy" in kind else {}

    def pack(tensor: Any) -> Any:
        small = tensor.is_floating_point() and tensor.numel() <= 16
        return tensor.to(torch.bfloat16) if small else tensor

    def unpack(tensor: Any) -> Any:
        return tensor.to(torch.float64) if tensor.dtype == torch.bfloat16 else tensor

    def loss_of(function: Any, x: Any, **options: Any) -> Any:
        found = function(x, target, **options)
        return found[0] if isinstance(found, tuple) else found

    x.requires_grad_()
    with hooks(torch, unpack, pack):
        loss = loss_of(polyce.cross_entropy, x, **options)
    (got,) = torch.autograd.grad(loss, x)
    (want,) = torch.autograd.grad(loss_of(torch.nn.functional.cross_entropy, x), x)
    # As exact as what the hooks kept.
    torch.testing.assert_close(got, want, rtol=0.1, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "give_back",
    [
        lambda t: t.double() if t.is_floating_point() else t.int(),
        lambda t: t[:1] if t.ndim else t,
        lambda t: t[..., :-1] if t.ndim else t,
        lambda t: t.unsqueeze(0),
        lambda t: t.new_empty(0),
    ],
    ids=["dtype", "fewer rows", "shorter", "one more axis", "nothing"],
)
@pytest.mark.parametrize("graph", [False, True], ids=["once", "differentiated again"])
def test_hooks_that_give_back_other_tensors(
    torch: Any, give_back: Callable[[Any], Any], path: str, graph: bool
) -> None:
    for target in (torch.tensor([1, 99, 0]), torch.softmax(torch.randn(3, 100), 1)):
        x = torch.randn(3, 100, requires_grad=True)
        with hooks(torch, give_back):
            loss = polyce.cross_entropy(
                x, target, torch.rand(100), sample_weight=torch.rand(3), implementation=path
            )
        with pytest.raises(RuntimeError, match="give back what they were given"):
            torch.autograd.grad(loss, x, create_graph=graph)
        # The next call is right.
        got = gradient(torch, hooks(torch, lambda t: t), x, target)
        want = torch.autograd.grad(torch.nn.functional.cross_entropy(x, target), x)[0]
        torch.testing.assert_close(got, want)


def test_hooks_that_lay_the_logits_otherwise(torch: Any) -> None:
    # A backward pass along the classes must not read what a forward pass across the rows saved.
    x = torch.randn(100, 7).t()
    target = torch.arange(7)
    want = gradient(torch, hooks(torch, lambda t: t), x, target)
    got = gradient(torch, hooks(torch, lambda t: t.contiguous()), x, target)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "give_back",
    [lambda t: t.mT.contiguous().mT if t.ndim == 2 else t, lambda t: t.clone()],
    ids=["other strides", "copies"],
)
def test_hooks_that_give_back_equal_tensors(torch: Any, give_back: Callable[[Any], Any]) -> None:
    check_hooks_that_change_nothing(torch, give_back)


def test_hooks_that_give_back_negated_views(torch: Any) -> None:
    def negated(tensor: Any) -> Any:
        return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor

    check_hooks_that_change_nothing(torch, negated)


def check_hooks_that_change_nothing(torch: Any, give_back: Callable[[Any], Any]) -> None:
    for target in (torch.tensor([1, 299, 0]), torch.softmax(torch.randn(3, 300), 1)):
        x = torch.randn(3, 300)
        options = {"sample_weight": torch.rand(3), "normalizer": torch.tensor(2.0)}
        want = gradient(torch, hooks(torch, lambda t: t), x, target, **options)
        got = gradient(torch, hooks(torch, give_back), x, target, **options)
        torch.testing.assert_close(got, want)


def test_negated_numbers(torch: Any) -> None:
    three = torch.complex(torch.zeros(()), torch.tensor(3.0)).conj().imag  # -3, through a view
    x, target = torch.tensor([[1.0, 2.0]], requires_grad=True), torch.tensor([0])
    polyce.cross_entropy(x, target).backward(three)
    want = polyce.cross_entropy_with_grad(x, target, grad_output=-3.0)[1]
    torch.testing.assert_close(x.grad, want)
    torch.testing.assert_close(
        polyce.cross_entropy_with_grad(x, target, grad_output=three)[1], want
    )
    torch.testing.assert_close(
        polyce.cross_entropy(x, target, normalizer=three),
        polyce.cross_entropy(x, target, normalizer=-3.0),
    )


def test_hooks_and_the_other_functions(torch: Any) -> None:
    x, target = torch.randn(3, 5, requires_grad=True), torch.tensor([1, 4, 0])
    head = torch.randn(5, 4, requires_grad=True)
    hidden = torch.randn(3, 4, requires_grad=True)
    calls = {
        "log_softmax": lambda: polyce.log_softmax(x).sum(),
        "nll_loss": lambda: polyce.nll_loss(x, target),
        "linear": lambda: polyce.linear_cross_entropy(hidden, head, target, reduction="none").sum(),
    }
    for call in calls.values():
        with hooks(torch, lambda t: t[:1] if t.ndim else t):
            loss = call()
        with pytest.raises(RuntimeError, match="let the hooks for saved tensors give back"):
            loss.backward()


def freed(torch: Any, tensor: Any, left: int = 0) -> Any:
    tensor.untyped_storage().resize_(left)
    return tensor


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left", [0, 4], ids=["nothing left", "too little left"])
@pytest.mark.parametrize(
    "name", ["input", "target", "weight", "sample_weight", "out", "grad_output"]
)
def test_memory_that_is_gone(torch: Any, name: str, left: int, path: str) -> None:
    for dtype in (torch.float32, torch.float16):
        given = {
            "input": torch.randn(6, 200, dtype=dtype),
            "target": torch.randint(200, (6,)),
            "weight": torch.rand(200, dtype=dtype),
            "sample_weight": torch.rand(6),
            "grad_output": torch.rand(6),
            "out": torch.empty(6, 200, dtype=dtype),
        }
        freed(torch, given[name], left)
        options = given | {"reduction": "none", "implementation": path}
        with pytest.raises(RuntimeError, match=f"^{name} must lie within its storage"):
            polyce.cross_entropy_with_grad(**options)
        for one in ("out", "grad_output"):
            del options[one]
        if name in options:
            with pytest.raises(RuntimeError, match=f"^{name} must lie within its storage"):
                polyce.cross_entropy(**options)


def test_a_freed_number(torch: Any) -> None:
    x, target = torch.randn(3, 5), torch.tensor([1, 4, 0])
    with pytest.raises(RuntimeError, match=r"^normalizer must lie within its storage"):
        polyce.cross_entropy(x, target, normalizer=freed(torch, torch.tensor(3.0)))
    with pytest.raises(RuntimeError, match=r"^grad_output must lie within its storage"):
        polyce.cross_entropy_with_grad(x, target, grad_output=freed(torch, torch.tensor(3.0)))


def test_memory_that_is_gone_in_the_other_functions(torch: Any) -> None:
    target, message = torch.tensor([1, 4, 0]), "must lie within its storage"
    with pytest.raises(RuntimeError, match=f"^input {message}"):
        polyce.log_softmax(freed(torch, torch.randn(3, 5)))
    with pytest.raises(RuntimeError, match=f"^input {message}"):
        polyce.nll_loss(freed(torch, torch.randn(3, 5)), target)
    with pytest.raises(RuntimeError, match=f"^weight {message}"):
        polyce.nll_loss(torch.randn(3, 5), target, freed(torch, torch.rand(5)))
    hidden, head, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    for name in ("input", "linear_weight", "target", "linear_bias"):
        given = {
            "input": hidden.clone(), "linear_weight": head.clone(),
            "target": target.clone(), "linear_bias": bias.clone(),
        }  # fmt: skip
        freed(torch, given[name])
        for function in (polyce.linear_cross_entropy, polyce.linear_cross_entropy_with_grad):
            with pytest.raises(RuntimeError, match=f"^{name} {message}"):
                function(**given)


@pytest.mark.parametrize("path", PATHS)
def test_logits_freed_before_the_backward_pass(torch: Any, path: str) -> None:
    for target in (torch.tensor([1, 99, 0]), torch.softmax(torch.randn(3, 100), 1)):
        for graph in (False, True):
            x = torch.randn(3, 100, requires_grad=True)
            loss = polyce.cross_entropy(x, target, implementation=path)
            freed(torch, x)
            with pytest.raises(RuntimeError, match="must lie within its storage"):
                torch.autograd.grad(loss, x, create_graph=graph)


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight"])
def test_nll_loss_and_memory_freed_before_the_backward_pass(torch: Any, name: str) -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    given = {
        "target": torch.tensor([1, 4, 0]),
        "weight": torch.rand(5, dtype=torch.float64),
        "sample_weight": torch.rand(3, dtype=torch.float64),
    }
    loss = polyce.nll_loss(x, **given)
    freed(torch, given[name])
    if name == "weight":
        loss.backward()  # each label's weight has been read from it
    else:
        with pytest.raises(RuntimeError, match="must lie within its storage"):
            loss.backward()


def test_the_gradient_of_nll_loss_is_torch_s(torch: Any) -> None:
    x = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (4, 3))
    target[0, 0] = -100
    weight = torch.rand(5, dtype=torch.float64)
    for reduction in ("none", "sum", "mean"):
        found = []
        for function in (polyce.nll_loss, torch.nn.functional.nll_loss):
            loss = function(x, target, weight, reduction=reduction).square().sum()
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            found.append([loss, grad, *torch.autograd.grad(grad.square().sum(), x)])
        torch.testing.assert_close(*found)


def test_memory_that_is_gone_under_transforms(torch: Any) -> None:
    x, target = freed(torch, torch.randn(3, 5)), torch.tensor([1, 4, 0])
    for call in (
        lambda: torch.func.grad(lambda x: polyce.cross_entropy(x, target))(x),
        lambda: torch.func.vmap(polyce.cross_entropy)(x, target),
        lambda: torch.func.grad(lambda x: polyce.log_softmax(x).sum())(x),
        lambda: torch.func.grad(lambda x: polyce.nll_loss(x, target))(x),
    ):
        with pytest.raises(RuntimeError, match="must lie within its storage"):
            call()


@pytest.mark.parametrize("path", PATHS)
def test_logits_freed_before_a_backward_pass_in_place(torch: Any, path: str) -> None:
    x = torch.randn(3, 5, requires_grad=True) * 1.0
    loss = polyce.torch.cross_entropy(
        x, torch.tensor([1, 4, 0]), inplace_backward=True, implementation=path
    )
    freed(torch, x.detach())
    with pytest.raises(RuntimeError, match="must lie within its storage"):
        loss.backward()


def test_empty_tensors_of_several_row_axes(torch: Any) -> None:
    import numpy as np

    for shape in ((0, 3, 5), (0, 3, 5, 7), (2, 3, 0, 7), (0, 100, 5)):
        rows = (shape[0], *shape[2:])
        for empty in (torch.zeros(rows), torch.from_numpy(np.zeros(rows, np.float32))):
            target, weights = empty.long(), empty
            for reduction in ("none", "sum", "mean"):
                x = torch.zeros(shape, requires_grad=True)
                loss, stats = polyce.cross_entropy(
                    x, target, sample_weight=weights, reduction=reduction, return_stats=True
                )
                loss.sum().backward()
                assert x.grad.shape == shape
                assert loss.shape == (rows if reduction == "none" else ())
                assert stats.lse.shape == rows
                _, grad = polyce.cross_entropy_with_grad(x, target, reduction=reduction)
                assert grad.shape == shape


def operator(torch: Any, *tensors: Any, **changed: Any) -> Any:
    call = {"implementation": "native", "result_dtype": "float32"}
    call |= {name: changed.pop(name) for name in (*call, *Options._fields) if name in changed}
    result_dtype, implementation = call.pop("result_dtype"), call.pop("implementation")
    options = Options(**{"axis": 1, "stats": None} | call)
    given = {"weight": None, "sample_weight": None, "normalizer": None} | changed
    text = repr((options[:-1], result_dtype, implementation))
    return torch.ops.polyce.backward(*tensors, **given, call=text)


def test_arguments_of_the_operators(torch: Any) -> None:
    import polyce.implementations.torch_ops

    x, target, one = torch.randn(3, 100), torch.tensor([1, 99, 0]), torch.ones(())
    want = polyce.cross_entropy_with_grad(x, target)[1]

    def run(rows: Any = None, cotangent: Any = one, **changed: Any) -> Any:
        tensors = cotangent, x, target
        return operator(torch, *tensors, rows=rows, denominator=None, **changed)

    assert torch.equal(run(), want)
    # What does not fit is refused; what fits but makes no sense gives some numbers.
    for rows in (torch.zeros(2, 4).double(), torch.zeros(3, 4), torch.zeros(12).double()):
        with pytest.raises(RuntimeError, match="what was saved of the rows must be float64"):
            run(rows)
    for value in (float("nan"), 1e300, -5.0):
        assert run(torch.full((3, 4), value, dtype=torch.float64)).shape == x.shape
    with pytest.raises(RuntimeError, match="grad_output must be float64 of shape"):
        run(cotangent=torch.ones(2), reduction="none")
    for changed in ({"axis": 7}, {"reduction": "some"}, {"stats": "none"}):
        with pytest.raises(ValueError, match=r"must lie within|must be|takes the names"):
            run(**changed)
    with pytest.raises(ValueError, match="an implementation that has kernels for torch"):
        run(implementation="dask")
    meta = torch.ones((), device="meta")
    for arguments in ({"cotangent": meta}, {"normalizer": meta}, {"rows": meta}):
        with pytest.raises(TypeError, match="all tensors must lie on one device, but some are on"):
            run(**arguments)


def test_results_lie_where_the_input_does(torch: Any) -> None:
    x, target = torch.randn(3, 100, requires_grad=True), torch.tensor([1, 99, 0])
    hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    soft = torch.softmax(torch.randn(3, 100), 1).requires_grad_()
    weight = torch.rand(100, requires_grad=True)
    functions = {
        "labels": lambda: polyce.cross_entropy(x, target, return_stats=True)[0],
        "rows": lambda: polyce.CrossEntropyLoss(reduction="none")(x, target).sum(),
        "probabilities": lambda: polyce.cross_entropy(x, soft, weight),
        "nll_loss": lambda: polyce.nll_loss(polyce.log_softmax(x), target),
        "head": lambda: polyce.linear_cross_entropy(hidden, head, target),
        "rows of a head": lambda: polyce.linear_cross_entropy(
            hidden, head, target, reduction="none"
        ).sum(),
    }
    parameters = [x, soft, weight, hidden, head]

    def results(function: Callable[[], Any]) -> list[Any]:
        loss = function()
        grads = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        total = sum(grad.square().sum() for grad in grads if grad is not None)
        again = torch.autograd.grad(total, parameters, allow_unused=True)
        return [loss, *grads, *again]

    for function in functions.values():
        want = results(function)
        with torch.device("meta"):
            got = results(function)
        torch.testing.assert_close(got, want, allow_subclasses=False)
