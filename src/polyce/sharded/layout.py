"""Which rows and classes of logits on a mesh this process has, by the placements of DTensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from polyce.call.options import class_axis
from polyce.sharded.call import check_untransformed


class Layout(NamedTuple):
    """How rows and classes lie on a mesh."""

    mesh: Any
    placements: tuple[Any, ...]
    """Those of the logits."""
    shape: tuple[int, ...]
    """That of all logits."""
    axis: int

    @property
    def of_rows(self) -> tuple[Any, ...]:
        """Return the placements of what has one number for each row, in the rows' shape."""
        return tuple(
            Shard(p.dim - (p.dim > self.axis)) if self._shards_rows(p) else Replicate()
            for p in self.placements
        )

    @property
    def of_entries(self) -> tuple[Any, ...]:
        """Return the placements of what has some classes of each row in the place of all."""
        return tuple(p if self._shards_rows(p) else Replicate() for p in self.placements)

    @property
    def everywhere(self) -> tuple[Any, ...]:
        """Return the placements of what every process has whole."""
        return tuple(Replicate() for _ in self.placements)

    @property
    def row_groups(self) -> list[Any]:
        """Return the groups over which a sum of the rows goes."""
        return [
            self.mesh.get_group(i)
            for i, p in enumerate(self.placements)
            if self._shards_rows(p) and self.mesh.size(i) > 1
        ]

    @property
    def shard(self) -> dict[str, Any] | None:
        """Return the arguments that say which classes are here; None if all are."""
        for i, placement in enumerate(self.placements):
            if placement.is_shard(self.axis):
                classes = self.shape[self.axis]
                width = -(-classes // self.mesh.size(i))
                start = min(width * self.mesh.get_local_rank(i), classes)
                return {
                    "group": self.mesh.get_group(i),
                    "class_start": start,
                    "num_classes": classes,
                }
        return None

    def _shards_rows(self, placement: Any) -> bool:
        return placement.is_shard() and not placement.is_shard(self.axis)

    def local(self, name: str, tensor: Any, placements: tuple[Any, ...]) -> Any:
        """Return this process's part of an argument that is to have these placements.

        A tensor that is no DTensor is whole, and the same in every process.
        """
        if not isinstance(tensor, torch.Tensor):
            return tensor
        if not isinstance(tensor, DTensor):
            whole = DTensor.from_local(tensor, self.mesh, self.everywhere, run_check=False)
            return self._cut(name, whole, placements)
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"all DTensors must lie on one mesh, but input is on {self.mesh} and {name} on "
                f"{tensor.device_mesh}; redistribute {name}"
            )
        check_placements(name, tensor)
        return self._cut(name, tensor, placements)

    def _cut(self, name: str, tensor: Any, placements: tuple[Any, ...]) -> Any:
        for own, wanted in zip(tensor.placements, placements, strict=True):
            # What is whole is cut along its rows without a collective.
            cuts_rows = own == Replicate() and (
                placements != self.placements or self._shards_rows(wanted)
            )
            if own != wanted and not cuts_rows:
                raise ValueError(
                    f"{name} must be placed as input is, {placements}, got {tensor.placements}; "
                    f"redistribute {name}"
                )
        return tensor.redistribute(self.mesh, placements).to_local()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Return the shape of what has one number for each row."""
        return (*self.shape[: self.axis], *self.shape[self.axis + 1 :])

    def rows(self, local: Any) -> Any:
        """Return the DTensor of all rows, of what this process has computed of its own."""
        return None if local is None else self._result(local, self.of_rows, self.row_shape)

    def entries(self, local: Any) -> Any:
        """Do what `rows` does for several numbers of each row, on the class axis."""
        shape = list(self.shape)
        shape[self.axis] = local.shape[self.axis]
        return self._result(local, self.of_entries, shape)

    def logits(self, local: Any) -> Any:
        """Do what `rows` does for a number of each logit."""
        return self._result(local, self.placements, self.shape)

    def number(self, value: Any) -> Any:
        """Return the DTensor of a number that every process has."""
        return self._result(value, self.everywhere, value.shape)

    def _result(self, local: Any, placements: Any, shape: Sequence[int]) -> Any:
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        return DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
        )


def layout_of(input: Any, axis: int | None) -> Layout:
    """Check how the logits lie, and describe it."""
    check_untransformed()
    shape = tuple(input.shape)
    axis = class_axis(shape, axis)
    check_placements("input", input)
    placements = tuple(input.placements)
    if sum(placement.is_shard(axis) for placement in placements) > 1:
        raise ValueError(
            "the classes of input must be sharded over one axis of a mesh, got placements "
            f"{input.placements}; redistribute it"
        )
    return Layout(input.device_mesh, placements, shape, axis)


def check_placements(name: str, tensor: Any) -> None:
    """Refuse partial sums, and what FSDP cuts parameters into."""
    for placement in tensor.placements:
        # Not is_shard(), which FSDP's own kind is too in some versions.
        if type(placement) is not Shard and not placement.is_replicate():
            raise ValueError(
                f"{name} must be sharded or replicated on each axis of its mesh, got placements "
                f"{tensor.placements}; redistribute it"
            )
