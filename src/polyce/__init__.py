"""polyce: softmax cross-entropy with one meaning on every array library."""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from polyce.call.target import SparseTarget, TeacherHead, TeacherLogits
from polyce.explain import explain, show_versions
from polyce.formula.stats import Stats
from polyce.functional import cross_entropy, cross_entropy_with_grad, nll_loss
from polyce.implementations.native.core import CoreMissingWarning
from polyce.implementations.native.threads import get_num_threads, set_num_threads
from polyce.implementations.registry import use
from polyce.linear.functional import linear_cross_entropy, linear_cross_entropy_with_grad
from polyce.linear.values import linear_log_prob
from polyce.loss import CrossEntropyLoss, NLLLoss
from polyce.score import score
from polyce.score.record import Score
from polyce.values import entropy, log_prob, log_softmax
from polyce.version import __version__

__all__ = [
    "CoreMissingWarning",
    "CrossEntropyLoss",
    "NLLLoss",
    "Score",
    "SparseTarget",
    "Stats",
    "TeacherHead",
    "TeacherLogits",
    "__version__",
    "cross_entropy",
    "cross_entropy_with_grad",
    "entropy",
    "explain",
    "get_num_threads",
    "linear_cross_entropy",
    "linear_cross_entropy_with_grad",
    "linear_log_prob",
    "log_prob",
    "log_softmax",
    "nll_loss",
    "score",
    "set_num_threads",
    "show_versions",
    "use",
]

if not _TYPE_CHECKING:  # to a checker every name would exist

    def __getattr__(name: str) -> object:
        """Import `polyce.torch`, which imports torch, when it is first asked for."""
        if name == "torch":
            from importlib import import_module

            return import_module("polyce.torch")
        raise AttributeError(f"module 'polyce' has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the public names, without the modules that importing them has loaded."""
        return __all__
