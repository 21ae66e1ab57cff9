"""Calls whose classes are cut into parts, each read by itself, joined, and given its gradient."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np

import polyce
from polyce.call.options import Options
from polyce.call.problem import Operands, Problem, describe
from polyce.formula import parts, rows, rowstats, stats, targets
from polyce.formula.rowgradient import StatsCotangents
from polyce.implementations import registry
from polyce.implementations.contract import OfParts
from polyce.testing.conformance import Functions


def of_parts(name: str) -> OfParts:
    found = registry.find(name).of_parts
    assert found is not None
    return found


class Cut(NamedTuple):
    """The classes of a call, cut at random: each piece with the first of its classes."""

    problem: Problem
    pieces: list[tuple[Operands, int]]
    teacher: parts.TeacherState | None

    @classmethod
    def of(
        cls, path: OfParts, problem: Problem, operands: Operands, rng: np.random.Generator
    ) -> Cut:
        classes = problem.classes
        # Parts without classes, of one class, and uneven ones.
        inner = sorted(rng.integers(0, classes + 1, rng.integers(0, 5)))
        edges = [0, *map(int, inner), classes]
        pieces = []
        for start, end in itertools.pairwise(edges):
            here = (*(slice(None),) * problem.axis, slice(start, end))
            own = {"logits": operands.logits[here]}
            if problem.kind in ("probability", "teacher"):
                own["target"] = operands.target[here]
            pieces.append((operands._replace(**own), start))
        teacher = None
        if problem.kind == "teacher":
            read = [path.read_teacher(problem, piece.target) for piece, _ in pieces]
            teacher = parts.join_teacher(problem, read)
        return cls(problem, pieces, teacher)

    def whole(self, path: OfParts) -> parts.Whole:
        read = [path.read(self.problem, *piece, self.teacher) for piece in self.pieces]
        return parts.join(self.problem, read)

    def gradient(self, path: OfParts, whole: parts.Whole, *cotangents: Any) -> Any:
        problem = self.problem
        grads = [
            path.gradient(problem, *piece, whole, *cotangents, self.teacher)
            for piece in self.pieces
        ]
        cast = [problem.library.cast(grad, problem.logits_dtype) for grad in grads]
        return problem.xp.concat(cast, axis=problem.axis)

    def stats(self, whole: parts.Whole, plan: targets.Plan) -> stats.Stats | None:
        problem, found = self.problem, whole.stats
        if found is None:
            return None
        for name in filter(lambda name: rowstats.looks_again(problem, name), problem.options.stats):
            added = [
                parts.rank(problem, piece, whole.label_logit)
                if name == "rank"
                else parts.brier(problem, piece, start, whole)
                for piece, start in self.pieces
            ]
            found = found._replace(**{name: sum(added[1:], added[0])})
        return stats.finish(problem, plan, found)


def cut_functions(path: OfParts) -> Functions:
    """Return polyce's functions as `path` computes them from parts of the classes."""
    rng = np.random.default_rng(0)

    def call(with_grad: bool, given: dict[str, Any]) -> Any:
        whole_call = dict(given)
        options = Options.taken_from(given)
        names = ("input", "target", "weight", "sample_weight", "normalizer")
        arrays = [given.pop(name, None) for name in names]
        problem, operands = describe(*arrays, options, **given)
        if problem.is_empty:
            function = polyce.cross_entropy_with_grad if with_grad else polyce.cross_entropy
            return function(**whole_call)
        with problem.library.computing(operands.named()):
            plan = targets.plan(problem, operands)
            cut = Cut.of(path, problem, operands, rng)
            whole = cut.whole(path)
            results = [targets.reduce(problem, plan, whole.losses)]
            if with_grad:
                cotangent = targets.cotangent(problem, plan, operands.grad_output)
                of_stats = selected(problem, plan, rows.stats_cotangents(problem, operands))
                results.append(cut.gradient(path, whole, cotangent, of_stats))
            found = cut.stats(whole, plan)
        results += [] if found is None else [found]
        return results[0] if len(results) == 1 else tuple(results)

    return Functions(lambda **given: call(False, given), lambda **given: call(True, given))


def selected(problem: Problem, plan: targets.Plan, given: StatsCotangents) -> StatsCotangents:
    """Leave out the cotangents of rows that do not count, whose stats are nan."""
    return StatsCotangents(
        *(a if a is None else targets.select_rows(plan, problem.xp, a) for a in given)
    )
