"""What the functions of the triton kernels hand on to each other.

Names in capitals are compile-time constants. The fields of all other records are tensors or
pointers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl


class Form(NamedTuple):
    """What a kernel is compiled for."""

    TRANSFORM: str
    """"none", "scale" or "softcap"."""
    DTYPE: tl.dtype
    """What is computed in, float32 or float64."""
    PROBABILITY: bool
    """Whether the target has a number of each class: a probability, or a teacher's logit."""
    TEACHER: bool
    TEMPERED: bool
    """Whether a teacher's logits are multiplied by something other than 1."""
    ENTRIES: int
    """How many entries of a sparse target are read at once; 0 for other targets."""
    WEIGHTED: bool
    SAMPLED: bool
    SMOOTHED: bool
    IGNORES: bool
    EMULATED: bool
    PART: bool = False
    """Whether these are some of the classes: labels count from the first, and may lie elsewhere."""
    # What a forward pass is asked for.
    PENALTY: bool = False
    REDUCED: bool = False
    KEEP: bool = False
    STATS: bool = False
    LSE: bool = False
    ENTROPY: bool = False
    PREDICTION: bool = False
    CORRECT: bool = False
    TOP: bool = False
    BRIER: bool = False
    RANK: bool = False
    FIRST: bool = False
    """Whether it is known which class besides the pivot has the logit of m' first."""
    # Which stats the gradient has cotangents of.
    OF_LSE: bool = False
    OF_ENTROPY: bool = False
    # What follows from these, see `completed`.
    EVEN: bool = False
    """Whether all classes have a share of the smoothing beside a teacher's, which is known last."""
    LABELED: bool = False
    """Whether the target holds labels."""
    SPREAD: bool = False
    """Whether classes besides the pivot have coefficients, other than those of entries."""
    LARGEST: bool = False
    """Whether the pivot is the class of the largest logit, not the label."""
    SURPRISE: bool = False
    """Whether the entropy's part of the state is summed."""
    SQUARES: bool = False
    """Whether that of a label's Brier score is."""
    DISTANT: bool = False
    """Whether rows are looked at again, for the score of probabilities."""
    VALUED: bool = False
    """Whether the gradient is also that of lse or entropy."""


def completed(form: Form) -> Form:
    """Set what follows from the rest."""
    labeled = not (form.PROBABILITY or form.ENTRIES)
    return form._replace(
        EVEN=form.TEACHER and form.SMOOTHED,
        LABELED=labeled,
        SPREAD=form.PROBABILITY or form.SMOOTHED,
        LARGEST=not labeled or form.ENTROPY or form.OF_ENTROPY or form.PREDICTION or form.CORRECT,
        SURPRISE=form.ENTROPY or form.OF_ENTROPY,
        SQUARES=form.BRIER and not form.PROBABILITY,
        DISTANT=form.BRIER and form.PROBABILITY,
        VALUED=form.OF_LSE or form.OF_ENTROPY,
    )


class Numbers(NamedTuple):
    """A call's numbers, each a vector of length 1 in float64."""

    kept: Any
    """1 less the smoothing."""
    share: Any
    """The smoothing's share of each class."""
    scale: Any
    cap: Any
    teacher_scale: Any


class State(NamedTuple):
    """The state of a part of each row's classes, besides the pivot; all but m' in float64."""

    top: Any
    """m'"""
    total: Any
    """d'"""
    rest: Any
    """R'"""
    excess: Any
    """q'"""
    entropy: Any
    squares: Any
    """The sum of exp(x - m')²."""
    even: Any
    """R' and q' of the class weights alone: where EVEN needs them."""
    even_excess: Any


class Pivot(NamedTuple):
    """The pivot of each row."""

    logit: Any
    coefficient: Any
    number: Any
    """Which class it is."""
    even: Any
    """Its class weight: where EVEN needs it."""


class Teacher(NamedTuple):
    """What is known of a teacher's logits; R', q' and r_k are in units of `top`'s exponential."""

    top: Any
    """The largest of them."""
    total: Any
    """The sum of exp(scale (t - top)), in float64."""


class Inputs(NamedTuple):
    """Where the target, the class weights and the sample weights lie."""

    target: Any
    """Labels, probabilities, or the classes of a sparse target."""
    weight: Any
    sample: Any
    chance: Any
    """The probabilities of a sparse target."""
    entries: Any
    """How many entries each row has."""


class Entries(NamedTuple):
    """What a sparse target says at some entries."""

    number: Any
    """The class, always in range."""
    chance: Any
    """The probability."""
    coefficient: Any
    """What it adds to that of its class."""
    used: Any
    """Whether it takes part."""
    bad: Any
    """Whether the class was out of range."""


class Outputs(NamedTuple):
    """Where a forward pass writes its results."""

    loss: Any
    saved: Any
    """What a backward pass needs of each row: four numbers, or nine with cotangents of stats.

    Two more beside a teacher.
    """
    sums: Any
    """For each program the sum of its rows' losses, and of their weights."""
    lse: Any
    entropy: Any
    prediction: Any
    correct: Any
    valid: Any
    top_probability: Any
    brier: Any
    rank: Any
    softmax: Any
    """What `distance` needs of each row, five numbers."""
    of_lse: Any
    """The cotangents of lse and entropy, which are read."""
    of_entropy: Any


class Meaning(NamedTuple):
    """What the target says of each row."""

    label: Any
    """Always in range."""
    weight: Any
    """The class weight of the label."""
    sample: Any
    """The sample weight."""
    counted: Any
    invalid: Any
    """Whether the label was out of range."""


class Label(NamedTuple):
    """The label of each row, which need not be the pivot."""

    number: Any
    logit: Any
    coefficient: Any
    # Where LARGEST needs them:
    leads: Any
    """Whether it is the pivot."""
    p: Any
    """exp(x - m')"""
    gap: Any
    """m' - x"""


class Seen(NamedTuple):
    """What is known of each row after a part of its classes has been read."""

    state: Any
    pivot: Any
    most: Any
    """The target's largest probability, and its class: where CORRECT needs them."""
    most_class: Any
    rank: Any
    """How many classes have a larger logit than the label: where RANK needs it."""
    first: Any
    """The first class besides the pivot with the logit of m': where FIRST needs it."""
    teacher: Any


class Outcome(NamedTuple):
    """What the state of whole rows gives; what a program does not ask for is not computed."""

    loss: Any
    lse: Any
    entropy: Any
    factor: Any
    """f, of exp(x - m') in the softmax"""
    probability: Any
    """p_k"""
    others: Any
    """1 - p_k"""
    top_probability: Any
    sum_of_r: Any
    """R with the penalty's share"""
    pivot_grad: Any
    lead: Any
    """lse - m'"""
    entropy_at_pivot: Any
    """What the entropy's cotangent is multiplied by in the pivot's gradient."""


class Saved(NamedTuple):
    """What a row's gradient is made of, as the forward pass saved it."""

    top: Any
    factor: Any
    pivot_grad: Any
    pivot_class: Any
    # Where there are cotangents of stats:
    more: Any
    """The factor of exp(x - m') for them."""
    by_gap: Any
    """That of exp(x - m') (m' - x)."""
    pivot_more: Any
    """What they add to the pivot's gradient."""
    label_grad: Any
    label_more: Any
    # Beside a teacher:
    teacher_top: Any
    teacher_factor: Any
    """What exp(scale (t - top)) is multiplied by in a class's coefficient."""
