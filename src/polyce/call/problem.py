"""What a call asks for, before any value is looked at: every shape, dtype and option error.

`describe` turns the arguments of a call into a `Problem`, which is hashable and holds no arrays, so
that a traced or lazy call takes the same path as an eager one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from polyce.arrays import dtypes, find
from polyce.arrays.library import Library
from polyce.arrays.plain import plain_key
from polyce.call import checks
from polyce.call import target as of_target
from polyce.call.options import Options, check_has_effect, check_have_meaning

NAMES_CLASSES = ("index", "sparse")


class Problem(NamedTuple):
    """The static facts of one call."""

    library: Library
    device: str
    """The kind of device: cpu, cuda, ..., or unknown while tracing."""
    kind: str
    """What the target holds: index, probability, sparse, teacher, or none where there is none."""
    shape: tuple[int, ...]
    axis: int
    """The class axis, counted from the front."""
    row_shape: tuple[int, ...]
    """`shape` without the class axis: one softmax, one loss and one index target per entry."""
    logits_dtype: Any
    target_dtype: str
    result_dtype: Any
    arithmetic_dtype: Any
    """The dtype of what is computed for every logit: float64 for float64, else float32."""
    row_dtype: Any
    """The dtype of what is computed for every row: float64 where the library has it."""
    options: Options
    is_concrete: bool
    """Whether the arrays are memory that can be read now: not traced, lazy, transformed or meta."""
    check_labels: bool = False
    weighted: bool = False
    sample_weighted: bool = False
    normalized: bool = False
    """Whether the caller passes what the mean divides by."""
    inplace_backward: bool = False
    """Whether torch's backward pass writes the gradient over the logits."""
    is_compiling: bool = False
    """Whether torch.compile traces plain tensors, so that it may call kernels as operators."""
    grad_stats: tuple[str, ...] = ()
    """The stats whose cotangents are among the operands."""
    label_name: str = "labels"
    """What the caller calls class indices, for an error about one that is out of range."""
    teacher_scale: float = 1.0
    """What multiplies a teacher's logits."""
    entries: int = 0
    """K, how many classes of each row a sparse target names."""
    teacher_dtype: Any = None
    """The dtype of a teacher's logits, if a head computes them; None for other targets."""

    @property
    def xp(self) -> Any:
        """Return the array library's namespace."""
        return self.library.xp

    @property
    def backend(self) -> str:
        """Return the array library's name."""
        return self.library.name

    @property
    def classes(self) -> int:
        """Return C, the length of the class axis."""
        return self.shape[self.axis]

    @property
    def names_classes(self) -> bool:
        """Tell whether the target holds class indices, one or several of each row."""
        return self.kind in NAMES_CLASSES

    @property
    def target_shape(self) -> tuple[int, ...]:
        """Return the target's shape; one label for one row may have an axis more."""
        if self.kind == "sparse":
            return (*self.shape[: self.axis], self.entries, *self.shape[self.axis + 1 :])
        return self.shape if self.kind in ("probability", "teacher") else self.row_shape

    @property
    def is_empty(self) -> bool:
        """Tell whether there are no logits: no rows or no classes."""
        return 0 in self.shape

    @property
    def logits_dtype_name(self) -> str:
        """Return the logits' dtype by its name in the standard."""
        return dtypes.name_of(self.logits_dtype)

    @property
    def used_options(self) -> tuple[str, ...]:
        """Return the names of the arguments in use that an implementation may lack."""
        weights = {"weight": self.weighted, "sample_weight": self.sample_weighted}
        return (*(name for name, is_there in weights.items() if is_there), *self.options.used)

    def asks(self, *names: str) -> bool:
        """Tell whether the caller asks for any of these stats."""
        stats = self.options.stats
        return stats is not None and any(name in stats for name in names)

    def with_options(self, **changed: Any) -> Problem:
        """Return the problem with some of its options changed."""
        return self._replace(options=self.options._replace(**changed))


class Head(NamedTuple):
    """A linear head: the logits are the product of the hidden states with its weight, plus bias."""

    weight: Any
    """(classes, features)"""
    bias: Any = None
    """(classes,)"""


class Operands(NamedTuple):
    """The arrays of one call, all of one library."""

    logits: Any
    target: Any
    """Labels, probabilities, the classes of a sparse target, or a teacher's logits.

    Where a head computes these, its hidden states stand in their place.
    """
    weight: Any
    sample_weight: Any
    normalizer: Any
    grad_output: Any
    grad_lse: Any = None
    """The cotangent of the stats' lse, one for each row; None for 0."""
    grad_entropy: Any = None
    """The same of their entropy."""
    target_probability: Any = None
    """The probabilities of a sparse target."""
    teacher_weight: Any = None
    """(classes, features) of a teacher's head."""
    teacher_bias: Any = None
    """(classes,)"""

    def named(self) -> dict[str, Any]:
        """Return the operands by the caller's names for them."""
        return {"input": self.logits, **dict(zip(self._fields[1:], self[1:], strict=True))}


# The problems of earlier calls on plain arrays: a small call mostly repeats an earlier one, and
# describing it again would take longer than computing it.
_MOST_KNOWN = 1024
_known: dict[tuple[Any, ...], Problem] = {}

DEFAULTS = Options()


def describe(
    input: Any,
    target: Any,
    weight: Any = None,
    sample_weight: Any = None,
    normalizer: Any = None,
    options: Options = DEFAULTS,
    *,
    grad_output: Any = None,
    grad_stats: Any = None,
    probabilities: bool = True,
) -> tuple[Problem, Operands]:
    """Check the arguments of a call, with options as given, and return its problem and operands.

    Without `probabilities`, as for nll_loss, the target is class indices whatever its shape.
    """
    plain = None
    has_number = grad_output is None or type(grad_output) is float
    if normalizer is None and grad_stats is None and has_number:
        plain = plain_key(input, target, weight, sample_weight)
    if plain is not None:
        try:
            # With their types: True, 1 and 1.0 are equal, but not all of them are valid options.
            key = (plain, options, probabilities, grad_output is None, *map(type, options))
            problem = _known.get(key)
        except TypeError:  # an option without a hash, such as a list
            plain = None
        else:
            if problem is not None:
                return problem, Operands(input, target, weight, sample_weight, None, grad_output)
    problem, operands, _ = describe_anew(
        None,
        input,
        target,
        weight,
        sample_weight,
        normalizer,
        options,
        grad_output=grad_output,
        grad_stats=grad_stats,
        probabilities=probabilities,
    )
    if plain is not None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = problem
    return problem, operands


def describe_anew(
    head: Head | None,
    input: Any,
    target: Any,
    weight: Any,
    sample_weight: Any,
    normalizer: Any,
    options: Options,
    *,
    grad_output: Any = None,
    grad_stats: Any = None,
    probabilities: bool = True,
) -> tuple[Problem, Operands, Head]:
    """Describe a call without looking at earlier ones.

    With a head, the problem is that of the logits that it computes from `input`, in the dtype of
    the product; in the operands `input` stands in the logits' place.
    """
    options = options.checked()
    reduction = options.reduction
    if head is not None and head.weight is None:
        raise TypeError("linear_weight must be an array, got None; pass the weight of the head")
    of_target.check_given(input, target, is_head=head is not None)
    if normalizer is not None and reduction != "mean":
        raise ValueError(
            f"normalizer is what reduction 'mean' divides by, got reduction {reduction!r}; "
            "leave one of them out"
        )
    divisor, normalizer = checks.number_or_array("normalizer", normalizer)
    number, cotangent = checks.number_or_array("grad_output", grad_output)
    numbers, of_stats = checks.grad_stats(grad_stats, options.stats)
    names = of_target.arrays(target)
    scale = of_target.teacher_scale(target)
    given = {
        "input": input,
        **names,
        "weight": weight,
        "sample_weight": sample_weight,
        "normalizer": normalizer,
        "grad_output": cotangent,
    }
    if head is not None:
        given |= {"linear_weight": head.weight, "linear_bias": head.bias}
    given |= {checks.stats_name(name): array for name, array in of_stats.items()}
    library, values = find.of(**given)
    found = dict(zip(given, values, strict=True))
    if library.device(found["input"]) is not None:
        checks.devices(library, found)
    if not library.swaps_bytes:
        checks.byte_order(found)
    held = tuple(found.pop(name) for name in names)
    logits, weight, sample_weight, normalizer, cotangent, *parameters = found.values()
    if head is None:
        shape, axis = checks.logits_shape(logits, options.axis, held[0])
        logits_dtype = given_dtype = logits.dtype
    else:
        head, parameters = Head(*parameters[:2]), parameters[2:]
        given_dtype = checks.product_dtype(library, logits, *head, held[0])
        shape = checks.product_shape(logits, *head)
        axis = len(shape) - 1
        logits_dtype = library.product_dtype(given_dtype, logits)
    row_shape = shape[:axis] + shape[axis + 1 :]
    own_dtype = of_target.float_dtype(library, target, held)
    kind = of_target.kind_of(
        target, held, shape, axis, logits, probabilities=probabilities, is_head=head is not None
    )
    check_has_effect(options.ignore_index, kind)
    check_have_meaning(options.stats, kind)
    if weight is not None:
        checks.weight(weight, shape[axis])
    if sample_weight is not None:
        checks.sample_weight(sample_weight, row_shape)
    if normalizer is not None:
        checks.normalizer(normalizer)
    result_dtype, target_dtype, teacher_dtype = given_dtype, held[0].dtype, None
    if kind != "index":
        beside = () if weight is None else (weight.dtype,)
        result_dtype = checks.promoted(library, given_dtype, own_dtype, *beside)
        if isinstance(target, of_target.TeacherHead):
            target_dtype = teacher_dtype = library.product_dtype(own_dtype, held[0])
    result_dtype = library.result_dtype(result_dtype, logits)

    problem = Problem(
        library=library,
        device=library.device_kind(logits),
        kind=kind,
        shape=shape,
        axis=axis,
        row_shape=row_shape,
        logits_dtype=logits_dtype,
        target_dtype=dtypes.name_of(target_dtype),
        **_dtypes(library, logits, result_dtype),
        options=options,
        is_concrete=library.are_concrete(values),
        check_labels=kind in NAMES_CLASSES
        and checks.looks_at_labels(next(iter(names)), held[0], library, options.validate),
        weighted=weight is not None,
        sample_weighted=sample_weight is not None,
        normalized=divisor is not None or normalizer is not None,
        # The operators of logits take no cotangents of stats.
        is_compiling=(head is not None or grad_stats is None) and library.are_compiled(values),
        grad_stats=(*of_stats, *numbers),
        label_name="target.index" if kind == "sparse" else "labels",
        teacher_scale=library.exact(scale) if library.is_exact else scale,
        entries=held[0].shape[axis] if kind == "sparse" else 0,
        teacher_dtype=teacher_dtype,
    )
    checks.grad_output(number, cotangent, row_shape, reduction)
    if number is not None:
        cotangent = number
    if divisor is not None:
        normalizer = divisor
    if library.is_exact:
        problem = _with_exact_options(problem)
        if reduction == "mean" and not hasattr(cotangent, "dtype"):
            cotangent = library.xp.asarray(1.0 if cotangent is None else cotangent)
    operands = Operands(logits, held[0], weight, sample_weight, normalizer, cotangent)
    if len(held) > 1:
        more = zip(of_target.more_operands(target), held[1:], strict=True)
        operands = operands._replace(**dict(more))
    if problem.grad_stats:
        arrays = dict(zip(of_stats, parameters, strict=True))
        operands = _with_stats_cotangents(problem, operands, numbers | arrays)
    return problem, operands, head or Head(None)


def _with_stats_cotangents(
    problem: Problem, operands: Operands, cotangents: dict[str, Any]
) -> Operands:
    library, logits = problem.library, operands.logits
    for name, cotangent in cotangents.items():
        checks.stats_cotangent(name, cotangent, problem.row_shape)
        if isinstance(cotangent, float):
            where = library.device(logits)
            device = {} if where is None else {"device": where}
            cotangents[name] = library.xp.full((), cotangent, dtype=problem.row_dtype, **device)
    return operands._replace(**{f"grad_{name}": array for name, array in cotangents.items()})


def describe_logits(input: Any, options: Options) -> tuple[Problem, Any]:
    """Check the arguments of a function of logits alone; return its problem and the logits."""
    options = options.checked()
    if input is None:
        raise TypeError("input must be an array, got None; pass the logits")
    library, (logits,) = find.of(input=input)
    shape, axis = checks.logits_shape(logits, options.axis)
    problem = Problem(
        library=library,
        device=library.device_kind(logits),
        kind="none",
        shape=shape,
        axis=axis,
        row_shape=shape[:axis] + shape[axis + 1 :],
        logits_dtype=logits.dtype,
        target_dtype="none",
        **_dtypes(library, logits, logits.dtype),
        options=options._replace(reduction="none"),
        is_concrete=library.are_concrete([logits]),
    )
    return (_with_exact_options(problem) if library.is_exact else problem), logits


def _with_exact_options(problem: Problem) -> Problem:
    """Turn float options into the library's numbers, with as many digits as the arrays have."""
    given = problem.options._asdict()
    exact = problem.library.exact
    floats = {name: exact(value) for name, value in given.items() if type(value) is float}
    return problem.with_options(**floats)


def _dtypes(library: Library, logits: Any, result_dtype: Any) -> dict[str, Any]:
    is_double = dtypes.name_of(result_dtype) == "float64"
    wide = is_double or library.has_float64(logits)
    return {
        "result_dtype": result_dtype,
        "arithmetic_dtype": library.float_dtype("float64" if is_double else "float32"),
        "row_dtype": library.float_dtype("float64" if wide else "float32"),
    }
