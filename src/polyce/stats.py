"""What a pass over the logits can tell of each row beside its loss."""

from __future__ import annotations

from typing import Any, NamedTuple


class RowStats(NamedTuple):
    """What an implementation reports of each row; None for what the problem does not ask for.

    The arrays keep the class axis, of length 1.
    """

    lse: Any
    """The log of the sum of the exponentials, in the row dtype."""
    entropy: Any
    """The entropy of the softmax, in nats, in the row dtype."""
    prediction: Any
    """The first class with the largest logit."""
