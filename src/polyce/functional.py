"""The functions: softmax cross-entropy and its neighbours, for the arrays of any library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from polyce.arrays import find
from polyce.arrays.plain import is_compiling, is_traced
from polyce.call import outputs
from polyce.call.options import Options, current_reduction, refuse_dim
from polyce.call.problem import Operands, Problem, describe
from polyce.formula import targets
from polyce.graphs import rules
from polyce.implementations import door
from polyce.implementations.registry import select

ArrayT = TypeVar("ArrayT")


def cross_entropy(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    axis: int | None = None,
    sample_weight: Any = None,
    normalizer: Any = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    return_stats: bool | str | Sequence[str] = False,
    validate: bool | None = None,
    implementation: str | None = None,
    dim: None = None,
) -> Any:
    r"""Compute the softmax cross-entropy between logits and a target, in nats.

    The meaning is that of ``torch.nn.functional.cross_entropy``, for the arrays of any library.
    With :math:`\mathrm{lse} = \log \sum_c e^{x_c}`, the loss of a row x of weight v is

    .. math:: v \, \big( \sum_c r_c \, (\mathrm{lse} - x_c) + λ \, \mathrm{lse}^2 \big)

    where, for class weights w and smoothing ε, :math:`r_c = (1-ε) w_y [c = y] + (ε/C) w_c` for a
    class index y and :math:`r_c = w_c ((1-ε) p_c + ε/C)` for probabilities p. For a `SparseTarget`,
    p are its probabilities, added up for each class; for `TeacherLogits` t with scale s, p is
    softmax(s t). Neither becomes an array of all classes.

    Parameters
    ----------
    input : array, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Logits, unnormalised log-probabilities, in float16, bfloat16, float32 or float64. The
        16-bit ones are computed in float32.
    target : array, SparseTarget or TeacherLogits
        Class indices in 0 to C - 1, of any integer dtype and of input's shape without the class
        axis; or class probabilities, of any floating dtype and of input's shape; or, in place of
        all probabilities, those of K classes of each row, or the logits of a teacher.
    weight : array, shape (C,), optional
        Weight of each class, of any real dtype; 1 for all by default.
    size_average, reduce : bool, optional
        Deprecated, as in torch: either one overrides `reduction`.
    ignore_index : int, default -100
        Rows with this class index have loss 0 and gradient 0, and are not counted. It need not be a
        class. In a `SparseTarget`, entries with this class are left out, and every row counts. With
        probabilities or a teacher it has no effect and must be negative.
    reduction : {'mean', 'sum', 'none'}
        For class indices the mean is the sum divided by the total class weight of the labels that
        are not ignored (their number, without `weight`); for every other target it is the sum
        divided by the number of rows. With `sample_weight` each row counts v times in both. A mean
        over nothing is nan.
    label_smoothing : float, default 0.0
        ε in [0, 1], the share of the target that is spread evenly over all classes.
    axis : int, optional
        The class axis of `input`; torch's by default: 1, or 0 if there is only one.
    sample_weight : array, optional
        v, the factor of each row's loss, of any real dtype and of input's shape without the class
        axis; 1 for all by default. A row of weight 0 has loss 0 and gradient 0, whatever its
        logits and its target hold.
    normalizer : float or array of shape (), optional
        Divisor of reduction 'mean', in place of the above. Pass the total of a whole batch, and the
        gradients of its micro-batches add up to the gradient of the batch.
    z_loss : float, default 0.0
        Weight of the squared lse, which pulls lse towards 0: λ is z_loss w_y for a class index y,
        and z_loss for every other target.
    logit_scale : float, optional
        A number from 1e-15 to 1e15 that multiplies the logits first: x is scaled; 1 by default.
        Multiply the logits by a learned scale before the call.
    logit_softcap : float, optional
        A number from 1e-15 to 1e15: after the scale, x is replaced by cap·tanh(x/cap). A masked
        logit of -inf stays -inf. No cap by default.
    return_stats : bool or str or tuple of str, default False
        Whether to return statistics of each row too: True for 'lse', 'entropy', 'prediction' and
        'correct', or names of these and of 'top_probability', 'brier' and, for class indices,
        'rank'; see `Stats`. On torch and jax the first two have gradients.
    validate : bool, optional
        Whether to check that class indices are in range. By default concrete arrays on a CPU are
        checked; elsewhere the loss and gradient of a row with a bad index are nan. True checks
        arrays on an accelerator too, and waits for it. False never checks.
    implementation : str, optional
        Name of the implementation to run; an error if it cannot. See `explain`.
    dim : None
        Not an argument: passing it is an error. The class axis is `axis`.

    Returns
    -------
    array
        Without reduction the losses, of input's shape without the class axis; else a scalar, of the
        kind that the library's own sum returns. The dtype is input's; for probabilities and
        teachers the floating dtypes of `input`, `target` and `weight` promote. With `return_stats`,
        the pair of this and a `Stats`.

    Raises
    ------
    TypeError
        If an argument is of a wrong kind or dtype, or if the arrays are of several libraries or
        lie on several devices.
    ValueError
        If a shape or an option does not fit.
    IndexError
        If a class index is out of range.

    See Also
    --------
    cross_entropy_with_grad : The gradient too, on libraries without automatic differentiation.
    CrossEntropyLoss : The same with the options kept.
    SparseTarget, TeacherLogits : Probabilities of some classes, and of a teacher.

    Notes
    -----
    A torch DTensor is taken as `input` by every function of logits, whichever axes a mesh shards.
    The other arrays are DTensors placed as input's rows or replicated, or plain tensors, whole and
    the same in every process; probabilities and a teacher are placed as `input`. What is of rows
    comes back placed as they are, gradients as `input`; a mean or sum is of all rows, replicated.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> logits = np.array([[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]])
    >>> print(round(polyce.cross_entropy(logits, np.array([0, 1])), 6))
    1.410927
    >>> probabilities = np.array([[0.9, 0.1, 0.0], [0.0, 0.5, 0.5]])
    >>> print(polyce.cross_entropy(logits, probabilities, reduction="none").round(6))
    [0.369846 1.402008]
    >>> loss, stats = polyce.cross_entropy(logits, np.array([0, 1]), return_stats="correct")
    >>> print(stats.correct)
    [ True False]
    """
    given = (
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing,
        axis, sample_weight, normalizer, z_loss, logit_scale, logit_softcap,
        return_stats, validate, implementation, dim,
    )  # fmt: skip
    if not is_traced() and (answer := door.cross_entropy(given)) is not None:
        return answer
    if dim is not None:
        raise refuse_dim()
    options = (
        axis, ignore_index, current_reduction(size_average, reduce, reduction), label_smoothing,
        z_loss, logit_scale, logit_softcap, return_stats, validate,
    )  # fmt: skip
    arrays = input, target, weight, sample_weight, normalizer
    if is_compiling():
        from polyce.implementations import torch_compiled

        if torch_compiled.takes(arrays, options):
            return torch_compiled.cross_entropy(arrays, options, implementation)
    # Not before: what is looked at on the way to a compiled call's operator is guarded.
    if find.is_dtensor(input):
        from polyce.sharded import dtensors

        loss, stats = dtensors.cross_entropy(*arrays, Options(*options), implementation)
        return loss if stats is None else (loss, stats)
    problem, operands = describe(*arrays, Options(*options))
    chosen = select(problem, implementation)
    loss, stats = chosen.cross_entropy(problem, operands)
    door.keep(given, problem, chosen)
    return loss if stats is None else (loss, stats)


def cross_entropy_with_grad(
    input: ArrayT,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    axis: int | None = None,
    sample_weight: Any = None,
    normalizer: Any = None,
    z_loss: float = 0.0,
    logit_scale: float | None = None,
    logit_softcap: float | None = None,
    return_stats: bool | str | Sequence[str] = False,
    validate: bool | None = None,
    implementation: str | None = None,
    dim: None = None,
    grad_output: Any = None,
    out: Any = None,
    grad_stats: Mapping[str, Any] | None = None,
) -> tuple[Any, ...]:
    r"""Compute the softmax cross-entropy and its gradient with respect to the logits.

    The gradient needs no automatic differentiation, so every library has it. In the terms of
    `cross_entropy` it is, for a row x,

    .. math:: g v \, \big( (\sum_c r_c + 2 λ \, \mathrm{lse}) \, \mathrm{softmax}(x) - r \big) / D

    where D is the divisor of the mean (1 for the other reductions). With a scale or a softcap, this
    is multiplied by the derivative of x with respect to the logit. With `grad_stats` the gradients
    of lse and entropy are added: :math:`g_\mathrm{lse} \, p` and :math:`g_H \, p_c \, (\mathrm{lse}
    - x_c - H)` for the softmax p and its entropy H.

    Parameters
    ----------
    input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        As for `cross_entropy`.
    axis, sample_weight, normalizer, z_loss, logit_scale, logit_softcap, return_stats
        As for `cross_entropy`.
    validate, implementation, dim
        As for `cross_entropy`.
    grad_output : array or float, optional
        g, the gradient with respect to the loss: an array of the rows' shape for reduction
        'none', else a number or a 0-d array. 1 by default, so that with reduction 'none' the
        gradient is that of the sum.
    out : array, optional
        Where to write the gradient: a writable array of input's shape and dtype, on its device,
        which is `input` itself or shares no memory with the arguments. Labels are checked before
        anything is written.
    grad_stats : mapping, optional
        The gradients with respect to stats that `return_stats` asks for: 'lse', 'entropy' or both,
        each with an array of the rows' shape (a number if there is one row without axes). They are
        added to the gradient of the loss; pass 0 as `grad_output` to leave that out. Rows that do
        not count pass nothing back.

    Returns
    -------
    loss : array
        As `cross_entropy` returns it.
    grad : array
        Of input's shape and dtype; `out`, if given. Neither result is on a torch or jax graph.
    stats : Stats
        Only with `return_stats`.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> loss, grad = polyce.cross_entropy_with_grad(np.zeros((1, 4)), np.array([2]))
    >>> print(grad)
    [[ 0.25  0.25 -0.75  0.25]]
    >>> logits = np.zeros((1, 4))
    >>> loss, grad = polyce.cross_entropy_with_grad(logits, np.array([2]), out=logits)
    >>> print(grad is logits, logits)
    True [[ 0.25  0.25 -0.75  0.25]]
    >>> loss, grad, stats = polyce.cross_entropy_with_grad(
    ...     np.zeros((1, 4)),
    ...     np.array([2]),
    ...     grad_output=0.0,
    ...     return_stats="lse",
    ...     grad_stats={"lse": np.array([1.0])},
    ... )
    >>> print(grad)
    [[0.25 0.25 0.25 0.25]]
    """
    given = (
        input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing,
        axis, sample_weight, normalizer, z_loss, logit_scale, logit_softcap,
        return_stats, validate, implementation, dim, grad_output, out,
    )  # fmt: skip
    if grad_stats is None and not is_traced() and (answer := door.cross_entropy_with_grad(given)):
        return answer
    if dim is not None:
        raise refuse_dim()
    options = (
        axis, ignore_index, current_reduction(size_average, reduce, reduction), label_smoothing,
        z_loss, logit_scale, logit_softcap, return_stats, validate,
    )  # fmt: skip
    arrays = input, target, weight, sample_weight, normalizer
    if is_compiling() and out is None and grad_stats is None:
        from polyce.implementations import torch_compiled

        if torch_compiled.takes(arrays, options):
            return torch_compiled.cross_entropy_with_grad(
                arrays, options, implementation, grad_output
            )
    if find.is_dtensor(input):
        from polyce.sharded import dtensors

        if out is not None:
            raise ValueError(
                "out must be None where input is a DTensor, whose gradient is a new one, got "
                f"{type(out).__qualname__}; leave it out"
            )
        loss, grad, stats = dtensors.cross_entropy_with_grad(
            *arrays, Options(*options), implementation, grad_output, grad_stats
        )
        return (loss, grad) if stats is None else (loss, grad, stats)
    problem, operands = describe(
        *arrays, Options(*options), grad_output=grad_output, grad_stats=grad_stats
    )
    chosen = select(problem, implementation)
    operands = rules.of(problem.backend).detach(operands)
    if out is not None:
        outputs.check(problem, operands, out)
    loss, grad, stats = chosen.cross_entropy_with_grad(problem, operands, out)
    door.keep(given, problem, chosen)
    return (loss, grad) if stats is None else (loss, grad, stats)


def nll_loss(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    *,
    axis: int | None = None,
    sample_weight: Any = None,
    normalizer: Any = None,
    validate: bool | None = None,
    dim: None = None,
) -> Any:
    """Compute the negative log-likelihood of class indices, in nats, from log-probabilities.

    The loss of a row x with label y and class weights w is -w_y x_y. After `log_softmax` it gives
    what `cross_entropy` gives; but that does both at once, and keeps digits that the
    log-probabilities lose.

    Parameters
    ----------
    input : array, shape (C,), (N, C) or (N, C, d1, ..., dK)
        Log-probabilities, in float16, bfloat16, float32 or float64.
    target : array
        Class indices in 0 to C - 1, of any integer dtype and of input's shape without the class
        axis.
    weight, size_average, ignore_index, reduce, reduction
        As for `cross_entropy`; the mean divides by the total class weight of the labels that are
        not ignored.
    axis, sample_weight, normalizer, validate, dim
        As for `cross_entropy`.

    Returns
    -------
    array
        Without reduction the losses, of input's shape without the class axis; else a scalar. The
        dtype is input's.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `cross_entropy` does.

    Examples
    --------
    >>> import numpy as np
    >>> import polyce
    >>> log_probabilities = np.log(np.array([[0.5, 0.25, 0.25]]))
    >>> print(round(polyce.nll_loss(log_probabilities, np.array([1])), 6))
    1.386294
    """
    if dim is not None:
        raise refuse_dim()
    reduction = current_reduction(size_average, reduce, reduction)
    options = Options(axis, ignore_index, reduction, validate=validate)
    arrays = input, target, weight, sample_weight, normalizer
    if find.is_dtensor(input):
        from polyce.sharded import dtensors

        return dtensors.nll_loss(_nll_loss, *arrays, options)
    return _nll_loss(*describe(*arrays, options, probabilities=False))


def _nll_loss(problem: Problem, operands: Operands) -> Any:
    autograd = rules.of(problem.backend)
    autograd.check(problem, operands)
    with problem.library.computing(operands.named()):
        plan = targets.plan(problem, operands)
        return targets.reduce(problem, plan, autograd.nll(problem, plan, operands.logits))
