"""What logits are worth: loss, accuracy and calibration, in one pass over blocks of rows."""

from __future__ import annotations

from collections import deque
from typing import Any

from polyce.score.record import Score


def score(
    input: Any,
    target: Any,
    *,
    axis: int | None = None,
    ignore_index: int = -100,
    weight: Any = None,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    bins: int = 15,
    by_class: bool = False,
    fit_temperature: bool = False,
    validate: bool | None = None,
    implementation: str | None = None,
) -> Score:
    r"""Compute what logits are worth: loss, accuracy, calibration, with standard errors.

    The logits are read once, some rows at a time, by `cross_entropy` with its statistics. The
    confidence of a row is :math:`\max_c p_c`, and the calibration error over bins b of the N rows
    is

    .. math:: \mathrm{ECE} = \sum_b \frac{n_b}{N} \,
        | \mathrm{accuracy}_b - \mathrm{confidence}_b |

    Parameters
    ----------
    input : array, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Logits of any library, in float16, bfloat16, float32 or float64. Blocks of the 16-bit ones
        are converted to float32, so that no loss is rounded to 16 bits.
    target : array
        Class indices in 0 to C - 1, of any integer dtype and of input's shape without the class
        axis.
    axis : int, optional
        The class axis of `input`; torch's by default: 1, or 0 if there is only one.
    ignore_index : int, default -100
        Rows with this label are counted and take no further part.
    weight : array, shape (C,), optional
        Weight of each class in the loss, and so in bits and perplexity; the other figures count
        each row once.
    temperature : float, default 1.0
        A number from 1e-15 to 1e15 that divides the logits.
    logit_softcap : float, optional
        As for `cross_entropy`; the cap comes after the temperature.
    bins : int, default 15
        How many bins of confidences the calibration errors have.
    by_class : bool, default False
        Whether the record has a table of the classes.
    fit_temperature : bool, default False
        Whether to find the temperature with the smallest loss, beginning at `temperature`, and
        return the figures at that. It takes five to ten passes over the logits instead of one: the
        derivative is exact, being the loss minus the entropy, and the second derivative comes from
        the derivatives of two passes. Not together with `logit_softcap`.
    validate : bool, optional
        By default all labels are checked before any logits are read. False counts the rows with a
        bad label and scores the others.
    implementation : str, optional
        Name of the implementation that computes the blocks; see `explain`.

    Returns
    -------
    Score
        The figures; ``print`` shows them as a table.

    Raises
    ------
    TypeError, ValueError
        As `cross_entropy` does; a ValueError too if there are no rows, or if no temperature has
        the smallest loss.
    IndexError
        If a class index is out of range, with its position.

    See Also
    --------
    cross_entropy : Its ``return_stats`` gives the same for each row.

    Notes
    -----
    Beside a block of 64 MB, 5 bytes of each row (9 in float64) are kept: its confidence and whether
    it is correct, for the bins of equal mass. Rows without a softmax, such as those that hold a
    nan, are counted as undefined and left out of the means.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> rng = np.random.default_rng(0)
    >>> labels = rng.integers(10, size=1000)
    >>> logits = rng.normal(size=(1000, 10)) + 3.0 * (np.arange(10) == labels[:, None])
    >>> found = polyce.score(2.0 * logits, labels, fit_temperature=True)
    >>> print(f"{found.loss:.3f} ± {found.loss_error:.3f}, temperature {found.temperature:.2f}")
    0.264 ± 0.024, temperature 0.63
    """
    # Not with `import polyce`, which few calls of this follow.
    from polyce.score import passes

    call = passes.describe(
        passes.held("input", input),
        passes.held("target", target),
        axis=axis,
        ignore_index=ignore_index,
        weight=weight,
        temperature=temperature,
        logit_softcap=logit_softcap,
        bins=bins,
        by_class=by_class,
        fit_temperature=fit_temperature,
        validate=validate,
        implementation=implementation,
    )
    # The totals of earlier blocks are let go.
    (last,) = deque(passes.run(call, passes.here(call)), maxlen=1)
    return passes.finish(call, last)
