"""What tests of torch.compile share: calls, their results, and what is in the graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polyce

FORWARD, BACKWARD = "polyce.cross_entropy.default", "polyce.cross_entropy_backward.default"


class Graphs:
    """A compiler that records which operators of polyce the graphs call, and with what."""

    def __init__(self, torch: Any, compiler: str = "aot_eager") -> None:
        self.torch, self.compiler = torch, compiler
        self.calls: list[list[tuple[str, tuple[Any, ...]]]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        nodes = [node for node in graph.graph.nodes if str(node.target).startswith("polyce.")]
        self.calls.append([(str(node.target), node.args) for node in nodes])
        return self.torch._dynamo.lookup_backend(self.compiler)(graph, inputs)

    @property
    def names(self) -> list[list[str]]:
        return [[name for name, _ in calls] for calls in self.calls]


def compiled(torch: Any, function: Callable[..., Any], graphs: Graphs, **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=graphs, **options)


def by_name(*arrays: Any, **options: Any) -> Any:
    return polyce.cross_entropy(*arrays, **options, implementation="native")


def arguments(torch: Any, kind: str, classes: int = 70, dtype: str = "float64") -> dict[str, Any]:
    wide = getattr(torch, dtype)
    target = torch.tensor([0, -100, 4, 2])
    if kind == "probability":
        target = torch.softmax(torch.randn(4, classes), 1).to(wide)
    return {
        "input": (2 * torch.randn(4, classes)).to(wide),
        "target": target,
        "weight": torch.rand(classes).to(wide),
        "sample_weight": torch.rand(4),
    }


def answers(torch: Any, function: Callable[..., Any], arrays: dict[str, Any]) -> Any:
    """Return loss, stats and the gradients of all arguments that have one."""
    names = ["input"]
    if arrays["target"].is_floating_point():
        names += [name for name in ("target", "weight") if name in arrays]
    if isinstance(arrays.get("normalizer"), torch.Tensor):
        names.append("normalizer")
    given = {
        key: value.clone().requires_grad_(key in names)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in arrays.items()
    }
    found = function(**given)
    loss, facts = found if isinstance(found, tuple) else (found, None)
    assert facts is None or not any(a is not None and a.requires_grad for a in facts)
    cotangent = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad(loss, [given[name] for name in names], cotangent)
    return loss.detach(), grads, [a for a in facts or () if a is not None]
