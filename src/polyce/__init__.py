"""polyce: softmax cross-entropy with one meaning on every array library."""

from polyce.explain import explain, show_versions
from polyce.functional import cross_entropy, cross_entropy_with_grad, log_softmax, nll_loss
from polyce.loss import CrossEntropyLoss, NLLLoss
from polyce.registry import use
from polyce.stats import Stats
from polyce.threads import get_num_threads, set_num_threads

__version__ = "0.1.0"

__all__ = [
    "CrossEntropyLoss",
    "NLLLoss",
    "Stats",
    "__version__",
    "cross_entropy",
    "cross_entropy_with_grad",
    "explain",
    "get_num_threads",
    "log_softmax",
    "nll_loss",
    "set_num_threads",
    "show_versions",
    "use",
]
