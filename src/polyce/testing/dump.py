"""Write the conformance grid to plain files, for drivers that are not written in Python.

`dump` writes one text file, ``cases.txt``, and one ``.bin`` file for each array: its elements
alone, little-endian, in C order whatever the layout of the case. Arrays that cases share are
written once.

A line of ``cases.txt`` that starts with ``#`` is a comment; every other line is one case, made of
``key=value`` fields separated by one space; no value contains a space. The fields, in this order:

===================  =======================================================================
The stats are there whether or not the case asks for them; those of `polyce.testing.ExactStats`.
nan and infinity in an expected result have to be met exactly; the sign of zero is free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .case import Case
from .dtypes import Array, dtype, is_float, missing
from .grid import cases as grid_cases
from .tolerances import accuracy, grad_tolerance, loss_tolerance, stats_tolerances

INDEX = "cases.txt"


def dump(directory: str | Path, cases: Iterable[Case] | None = None) -> Path:
    """Write cases to files that a program in any language can read.

    Parameters
    ----------
    directory : path
        Where the files are written; created if it does not exist.
    cases : iterable of Case, optional
        The whole grid by default.

    Returns
    -------
    Path
        The index, ``cases.txt``; the format is written at the top of this module.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = list(grid_cases() if cases is None else cases)
    lines = ["# polyce conformance grid; the format is described in polyce.testing.dump"]
    lines += [f"# left out: {name}: {why}" for name, why in missing().items() if cases is None]
    for case in chosen:
        fields = _fields(case, folder)
        lines.append(" ".join(f"{key}={value}" for key, value in fields.items()))
    index = folder / INDEX
    index.write_text("\n".join(lines) + "\n", encoding="ascii")
    return index


def read(directory: str | Path) -> list[dict[str, Any]]:
    """Read back what `dump` wrote: for each case its fields, with arrays in place of files.

    Parameters
    ----------
    directory : path
        Where `dump` wrote.
    """
    folder = Path(directory)
    found = []
    for line in (folder / INDEX).read_text(encoding="ascii").splitlines():
        if line.startswith("#"):
            continue
        fields: dict[str, Any] = dict(item.split("=", 1) for item in line.split(" "))
        index = fields["kind"] in ("index", "sparse")
        elements = {
            "logits": (fields["dtype"], fields["shape"]),
            "target": ("int64" if index else fields["target_dtype"], fields["target_shape"]),
            "target_probability": ("float64", fields["target_shape"]),
            "weight": (fields["weight_dtype"], "-1"),
            "grad_output": ("float64", fields["loss_shape"]),
            "loss": ("float64", fields["loss_shape"]),
            "loss_tol": ("float64", fields["loss_shape"]),
            "grad": ("float64", fields["shape"]),
            "grad_tol": ("float64", fields["shape"]),
            "sample_weight": ("float64", fields["row_shape"]),
            "prediction": ("int64", fields["row_shape"]),
            "rank": ("int64", fields["row_shape"]),
        }
        stats = ("lse", "entropy", "top_probability", "brier")
        floats = ("grad_lse", "grad_entropy", *stats, *(f"{name}_tol" for name in stats))
        elements |= dict.fromkeys(floats, ("float64", fields["row_shape"]))
        elements |= dict.fromkeys(("correct", "valid"), ("uint8", fields["row_shape"]))
        for key, (name, shape) in elements.items():
            path = fields[key]
            fields[key] = None if path == "-" else _load(folder / path, name, shape)
        found.append(fields)
    return found


def _load(path: Path, name: str, shape: str) -> Array:
    sizes = () if shape == "scalar" else tuple(int(n) for n in shape.split("x"))
    return np.frombuffer(path.read_bytes(), dtype=dtype(name)).reshape(sizes)


def _fields(case: Case, folder: Path) -> dict[str, object]:
    answer, options = case.answer, case.options
    grad_dtype, loss_dtype = case.logits.dtype.name, answer.loss_dtype.name
    axis = options.get("axis")
    axis = (1 if case.logits.ndim > 1 else 0) if axis is None else axis % case.logits.ndim
    target, probability = case.target, case.target_probability
    if probability is not None:
        target, probability = (np.moveaxis(array, axis, -1) for array in (target, probability))
    given, stats = case.arrays, answer.stats
    arithmetic = "float64" if loss_dtype == "float64" else "float32"
    allowed = stats_tolerances(answer, accuracy(arithmetic))
    normalizer = given.get("normalizer", options.get("normalizer"))

    def number(value: Any) -> str:
        return "-" if value is None else float(value).hex()

    def wide(array: Any) -> Array | None:
        return None if array is None else np.asarray(array).astype(np.float64)

    def write(array: Array | None) -> str:
        if array is None:
            return "-"
        little = array.dtype.newbyteorder("<") if array.dtype.name != "bfloat16" else array.dtype
        data = array.astype(little).tobytes(order="C")
        name = f"{hashlib.sha256(data).hexdigest()[:16]}.bin"
        if not (folder / name).exists():
            (folder / name).write_bytes(data)
        return name

    return {
        "name": case.name,
        "group": case.group,
        "kind": case.kind,
        "dtype": grad_dtype,
        "loss_dtype": loss_dtype,
        "shape": _shape(case.logits),
        "axis": axis,
        "reduction": options.get("reduction", "mean"),
        "ignore_index": options.get("ignore_index", -100),
        "label_smoothing": number(options.get("label_smoothing", 0.0)),
        "z_loss": number(options.get("z_loss", 0.0)),
        "logit_scale": number(options.get("logit_scale")),
        "logit_softcap": number(options.get("logit_softcap")),
        "normalizer": number(normalizer),
        "teacher_scale": number(options.get("teacher_scale")),
        "return_stats": ",".join(case.stats_names) or "-",
        "layout": case.layout,
        "logits": write(case.logits),
        "target": write(target if is_float(target) else target.astype(np.int64)),
        "target_shape": _shape(target),
        "target_dtype": case.target.dtype.name,
        "target_probability": write(wide(probability)),
        "weight": write(case.weight),
        "weight_dtype": "-" if case.weight is None else case.weight.dtype.name,
        "sample_weight": write(wide(case.sample_weight)),
        "grad_output": write(wide(case.grad_output)),
        "grad_lse": write(wide(case.grad_lse)),
        "grad_entropy": write(wide(case.grad_entropy)),
        "loss": write(answer.loss),
        "loss_tol": write(loss_tolerance(answer, loss_dtype, accuracy(loss_dtype))),
        "loss_shape": _shape(answer.loss),
        "grad": write(answer.grad),
        "grad_tol": write(grad_tolerance(answer, grad_dtype, accuracy(grad_dtype))),
        "row_shape": _shape(stats.lse),
        "lse": write(stats.lse),
        "lse_tol": write(allowed["lse"]),
        "entropy": write(stats.entropy),
        "entropy_tol": write(allowed["entropy"]),
        "prediction": write(stats.prediction),
        "correct": write(stats.correct.astype(np.uint8)),
        "valid": write(stats.valid.astype(np.uint8)),
        "top_probability": write(stats.top_probability),
        "top_probability_tol": write(allowed["top_probability"]),
        "brier": write(stats.brier),
        "brier_tol": write(allowed["brier"]),
        "rank": write(stats.rank),
    }


def _shape(array: Array) -> str:
    return "x".join(map(str, array.shape)) or "scalar"
