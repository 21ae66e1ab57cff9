"""What tests of torch.compile share: calls, their results, and what is in the graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polyce

FORWARD, BACKWARD = "polyce.forward.default", "polyce.backward.default"
BOTH = "polyce.forward_backward.default"


class Graphs:
    """A compiler that records which operators of polyce the graphs call, and with what.

    Those are the graphs that a compiler is given once torch has taken operators apart and has
    differentiated: without the backward pass, which `backward` has.
    """

    def __init__(self, torch: Any, compiler: str = "aot_eager") -> None:
        self.torch, self.compiler = torch, compiler
        self.calls: list[list[tuple[str, tuple[Any, ...]]]] = []
        self.backward: list[list[tuple[str, tuple[Any, ...]]]] = []

    def __call__(self, graph: Any, inputs: Any) -> Any:
        if self.compiler == "eager":
            self.calls.append(self._calls_in(graph))
            return graph
        if self.compiler == "inductor":
            from torch._inductor.compile_fx import compile_fx, compile_fx_inner

            def inner(graph: Any, inputs: Any, **options: Any) -> Any:
                calls = self.backward if options.get("is_backward") else self.calls
                calls.append(self._calls_in(graph))
                return compile_fx_inner(graph, inputs, **options)

            return compile_fx(graph, inputs, inner_compile=inner)
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def forward(graph: Any, inputs: Any) -> Any:
            self.calls.append(self._calls_in(graph))
            return make_boxed_func(graph)

        def backward(graph: Any, inputs: Any) -> Any:
            self.backward.append(self._calls_in(graph))
            return make_boxed_func(graph)

        return aot_autograd(fw_compiler=forward, bw_compiler=backward)(graph, inputs)

    @staticmethod
    def _calls_in(graph: Any) -> list[tuple[str, tuple[Any, ...]]]:
        nodes = [node for node in graph.graph.nodes if str(node.target).startswith("polyce.")]
        return [(str(node.target), node.args) for node in nodes]

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
    if facts is not None:
        assert not any(a is not None and a.requires_grad for a in facts[2:])
    cotangent = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    grads = torch.autograd.grad(loss, [given[name] for name in names], cotangent)
    return loss.detach(), grads, [a.detach() for a in facts or () if a is not None]
