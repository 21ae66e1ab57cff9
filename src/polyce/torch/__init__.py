"""For torch only: modules, classes over processes, and a backward pass without memory of its own.

``import polyce.torch`` imports torch, which ``import polyce`` does not.
"""

from __future__ import annotations

from polyce.torch.functional import cross_entropy
from polyce.torch.linear import linear_cross_entropy, linear_log_prob
from polyce.torch.linear_module import LinearCrossEntropyLoss
from polyce.torch.modules import CrossEntropyLoss, NLLLoss
from polyce.torch.values import entropy, log_prob

__all__ = [
    "CrossEntropyLoss",
    "LinearCrossEntropyLoss",
    "NLLLoss",
    "cross_entropy",
    "entropy",
    "linear_cross_entropy",
    "linear_log_prob",
    "log_prob",
]
