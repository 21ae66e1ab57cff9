"""Tools to check an implementation of polyce's cross entropy against exact answers.

`check_implementation` runs the conformance grid through an implementation on an array library;
`cases` builds the grid, `exact_answer` computes the answers with decimal arithmetic, and `dump`
writes both to plain files for drivers that are not written in Python. Only NumPy is needed, and
ml_dtypes for the bfloat16 cases.
"""

from .backends import BACKENDS, Backend, dask, get_backend
from .case import LAYOUTS, Case, arrange
from .conformance import Functions, Report, check_implementation
from .dtypes import missing
from .dump import dump, read
from .grid import GROUPS, cases
from .linear import check_linear, grid_functions
from .linear_cases import LinearCase, linear_cases
from .oracle import Answer, ExactStats, exact_answer
from .tolerances import (
    ACCURACY,
    Accuracy,
    Transformed,
    accuracy,
    compare,
    grad_tolerance,
    loss_tolerance,
    stats_tolerances,
)

__all__ = [
    "ACCURACY",
    "BACKENDS",
    "GROUPS",
    "LAYOUTS",
    "Accuracy",
    "Answer",
    "Backend",
    "Case",
    "ExactStats",
    "Functions",
    "LinearCase",
    "Report",
    "Transformed",
    "accuracy",
    "arrange",
    "cases",
    "check_implementation",
    "check_linear",
    "compare",
    "dask",
    "dump",
    "exact_answer",
    "get_backend",
    "grad_tolerance",
    "grid_functions",
    "linear_cases",
    "loss_tolerance",
    "missing",
    "read",
    "stats_tolerances",
]
