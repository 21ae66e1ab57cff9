"""What a path is: how it computes a whole call, and which calls it serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from polyce.call.problem import Problem


def _available() -> str | None:
    return None


class OfParts(NamedTuple):
    """How a path computes rows whose classes lie in several parts, as `formula.parts` does."""

    read: Callable[..., Any]
    """(problem, operands, start, teacher) -> Part"""
    gradient: Callable[..., Any]
    """(problem, operands, start, whole, cotangent, of_stats, teacher) -> a part's gradient

    It is in the logits' dtype, or in the arithmetic one.
    """
    read_teacher: Callable[..., Any]
    """(problem, a part of a teacher's logits) -> TeacherState"""
    is_traceable: bool = False
    """Whether torch.compile can trace it: it is made of the library's own operations."""


@dataclass(frozen=True)
class Implementation:
    """A path that computes the loss of a call, and the gradient of its logits.

    None means no restriction, or that the path does not have it.
    """

    name: str
    cross_entropy: Callable[..., tuple[Any, Any]]
    """(problem, operands) -> (loss, stats), the loss on the library's graph where it has one"""
    cross_entropy_with_grad: Callable[..., tuple[Any, Any, Any]]
    """(problem, operands, out) -> (loss, gradient, stats), of operands cut from any graph

    The gradient is written to `out` if that is given.
    """
    backends: frozenset[str] | None = None
    devices: frozenset[str] | None = None
    dtypes: frozenset[str] | None = None
    kinds: frozenset[str] | None = None
    options: frozenset[str] | None = None
    stats: frozenset[str] | None = None
    """The names that return_stats may ask for."""
    unavailable: Callable[[], str | None] = _available
    """Why it cannot run at all here ("not installed", "not built"), or None."""
    refuses: Callable[[Problem], str | None] | None = None
    """Any other reason against a problem, or None."""
    by_name_only: Callable[[Problem], bool] | None = None
    """Whether it takes this problem only when it is asked for by name."""
    torch_kernels: Callable[[], Any] | None = None
    """() -> the `torch_calls.Kernels` that torch.compile may put into its graph"""
    takes_grad_stats: bool = False
    """Whether the gradient takes the cotangents of stats, which a new path need not have."""
    of_parts: OfParts | None = None
    log_softmax: Callable[..., Any] | None = None
    """(problem, logits) -> log(softmax(logits))"""

    def reasons(self, problem: Problem) -> tuple[str, ...]:
        """Return all reasons against running this problem; if there are none, it can."""
        found = []
        missing = self.unavailable()
        if missing is not None:
            found.append(missing)
        declared = (
            ("arrays", "backend", self.backends),
            ("device", "device", self.devices),
            ("dtype", "logits_dtype_name", self.dtypes),
            ("target", "kind", self.kinds),
        )
        for what, attribute, served in declared:
            if served is None or (value := getattr(problem, attribute)) in served:
                continue
            # A function of logits alone has no target.
            if value != "none":
                found.append(f"{what} {value} is not served ({', '.join(sorted(served))})")
        if self.options is not None:
            for option in problem.used_options:
                if option not in self.options:
                    found.append(f"option {option} is not served")
        for name in problem.options.stats or ():
            if self.stats is not None and name not in self.stats:
                found.append(f"stats {name} is not served ({', '.join(sorted(self.stats))})")
        if problem.grad_stats and not self.takes_grad_stats:
            found.append("cotangents of stats (grad_stats) are not served")
        if not found and self.refuses is not None and (reason := self.refuses(problem)):
            found.append(reason)
        return tuple(found)

    def serves(self, problem: Problem) -> bool:
        """Tell whether it can be chosen without being named; quick for other libraries' arrays."""
        if self.backends is not None and problem.backend not in self.backends:
            return False
        if self.by_name_only is not None and self.by_name_only(problem):
            return False
        return not self.reasons(problem)
