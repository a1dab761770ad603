"""The numbers of a state, kept in two rows for each parameter, so that a checkpoint has few entries.

"coefficients" holds the reals of the parameter's block and of the whole, "counters" the integers and flags
of the parameter, its block and the whole, and the label of its block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.adapter import LEAF_COUNTS, layout

__all__ = [
    "ADDED_SINCE",
    "PER_BLOCK",
    "PER_UNIT",
    "ROWS",
    "Rows",
    "counts_and_label",
    "history_size_of",
    "is_known",
    "unpack",
    "widths",
]

Array = Any


class _Field(NamedTuple):
    """Where a field of the state stands in a row, or the label of the block."""

    name: str
    scope: str
    """"leaf", "block" or "unit": each of these has one value of it."""
    real: bool
    """Whether it is among the coefficients, not the counters."""
    columns: slice
    shape: tuple[int, ...]
    flag: bool

    def read(self, rows: Array) -> Array:
        """The field's values from one row, or from several along the first axis."""
        part = rows[..., self.columns]
        part = part.reshape((*part.shape[:-1], *self.shape)) if self.shape else part[..., 0]
        return part != 0 if self.flag else part


class _Layout(NamedTuple):
    coefficients: tuple[_Field, ...]
    counters: tuple[_Field, ...]


ROWS = _Layout._fields
"""Names of the rows in a parameter's dictionary."""


@lru_cache
def _layout(history_size: int) -> _Layout:
    config = core.Config(history_size=history_size)
    kinds: dict[bool, list[_Field]] = {True: [], False: []}
    ends = {True: 0, False: 0}
    leaf = torch.empty(0, device="meta")
    entries = [entry for entry in layout(config, [leaf], ((0,),)) if entry.leaf is None]
    fields = [(entry.name, entry.shape, entry.dtype) for entry in entries if entry.name != "size"]
    for name, shape, dtype in [*fields, ("block", (1,), "int32")]:
        scope = "leaf" if name in (*LEAF_COUNTS, "block") else "block" if shape else "unit"
        real, tail = dtype.startswith("float"), tuple(shape[1:])
        columns = slice(ends[real], ends[real] + math.prod(tail))
        ends[real] = columns.stop
        kinds[real].append(_Field(name, scope, real, columns, tail, dtype == "bool"))
    return _Layout(tuple(kinds[True]), tuple(kinds[False]))


def _names(scope: str) -> tuple[str, ...]:
    return tuple(field.name for part in _layout(1) for field in part if field.scope == scope)


PER_BLOCK = _names("block")
"""Names of the numbers and small arrays that a state has for each block."""
PER_UNIT = _names("unit")
"""Names of the numbers that a state has once."""


ADDED_SINCE = {"coefficients": 1, "counters": 0}
"""How many numbers the rows of older versions lack at their end, where today's were 1: `grad_scale`."""


def widths(history_size: int) -> dict[str, int]:
    """The length of each row of a parameter's dictionary."""
    return {name: part[-1].columns.stop for name, part in _layout(history_size)._asdict().items()}


def is_known(entry: Mapping[str, Any]) -> bool:
    """Whether a parameter's dictionary holds a state, not momentum alone."""
    return "counters" in entry


def history_size_of(entry: Mapping[str, Any]) -> int:
    """The number of pairs for which a parameter's dictionary has room."""
    return entry["history"].shape[1] if "history" in entry else 0


def unpack(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """All numbers of a parameter's dictionary by their names; views, except flags."""
    size = history_size_of(entry)
    parts = _layout(size)
    rows = {name: torch.as_tensor(entry[name]) for name in parts._fields}
    for name, width in widths(size).items():
        rows[name] = torch.nn.functional.pad(rows[name], (0, width - rows[name].shape[0]), value=1)
    return {field.name: field.read(rows[name]) for name, part in parts._asdict().items() for field in part}


def counts_and_label(entries: Sequence[Mapping[str, Any]]) -> list[tuple[tuple[int, ...], int]]:
    """For each entry its own counts and the label of its block; waits for the device once."""
    if not entries:
        return []
    rows = [torch.as_tensor(entry["counters"]) for entry in entries]
    # Counts stand first in a row, the label last.
    ends = [torch.cat([row[: len(LEAF_COUNTS)], row[-1:]]).to(rows[0].device) for row in rows]
    return [(tuple(counts), label) for *counts, label in torch.stack(ends).tolist()]


class Rows:
    """The rows of all leaves of a state, which share memory by block.

    Parameters
    ----------
    state : State
    blocks : Blocks
        Of leaves.
    first_label : int
        The label of the first block.
    """

    def __init__(self, state: core.State, blocks: Sequence[Sequence[int]], first_label: int) -> None:
        device, count = state.gamma.device, len(state.leaf_steps)
        self._layout = _layout(state.row_noise.shape[1])
        self._block_of = [0] * count
        for number, block in enumerate(blocks):
            for leaf in block:
                self._block_of[leaf] = number
        self._own = torch.tensor(self._block_of, device=device)
        self._firsts = torch.tensor([block[0] for block in blocks], device=device)
        self._labels = (self._own + first_label).to(torch.int32)
        self._coefficients, self._counters = self._packed(state)
        self._tensors = _Reader(self._layout, self._coefficients, self._counters, self._firsts)
        self._arrays: _Reader | None = None

    @property
    def host(self) -> _Reader:
        """The same memory as arrays of NumPy; on a CPU only."""
        if self._arrays is None:
            parts = (self._coefficients, self._counters, self._firsts)
            self._arrays = _Reader(self._layout, *(part.numpy() for part in parts))
        return self._arrays

    def of(self, leaf: int) -> dict[str, Tensor]:
        """The rows of one leaf, under their names."""
        return {
            "coefficients": self._coefficients[self._block_of[leaf]],
            "counters": self._counters[leaf],
        }

    def read(self) -> dict[str, Tensor]:
        """The fields of the state."""
        return self._tensors.read()

    def write(self, state: core.State) -> None:
        """Take over the numbers of a new state, which are tensors, or else those that `host` gave."""
        if not isinstance(state.gamma, Tensor):
            self.host.write(state, self._own.numpy())
            return
        for rows, new in zip((self._coefficients, self._counters), self._packed(state), strict=True):
            rows.copy_(new)

    def _packed(self, state: core.State) -> tuple[Tensor, Tensor]:
        return (
            torch.cat(list(self._parts(state, self._layout.coefficients, len(self._firsts))), dim=1),
            torch.cat(
                [*self._parts(state, self._layout.counters[:-1], len(self._own)), self._labels[:, None]],
                dim=1,
            ),
        )

    def _parts(self, state: core.State, fields: Sequence[_Field], count: int) -> Iterator[Tensor]:
        for field in fields:
            value = getattr(state, field.name)
            if field.flag:
                value = value.to(torch.int32)
            if field.scope == "unit":
                value = value.expand(count)
            elif field.scope == "block" and value.shape[0] != count:
                value = value[self._own]
            yield value.reshape(count, math.prod(field.shape))


class _Reader:
    """The rows of a state, as tensors or as arrays of NumPy, and the fields in them."""

    def __init__(self, layout: _Layout, coefficients: Array, counters: Array, firsts: Array) -> None:
        self._coefficients, self._counters, self._firsts = coefficients, counters, firsts
        self._fields = (*layout.coefficients, *layout.counters[:-1])
        self._several = len(firsts) > 1
        self._copied = [
            field
            for field in self._fields
            if field.flag or (self._several and field.scope == "block" and not field.real)
        ]
        self._views: dict[str, Array] | None = None

    def read(self) -> dict[str, Array]:
        """The fields, which are views, except flags and the counters of several blocks."""
        if torch.compiler.is_compiling():
            return self._read(self._fields)
        if self._views is None:
            self._views = self._read([field for field in self._fields if field not in self._copied])
        return self._views | self._read(self._copied)

    def _rows(self, field: _Field) -> Array:
        return self._coefficients if field.real else self._counters

    def _read(self, fields: Sequence[_Field]) -> dict[str, Array]:
        values = {}
        for field in fields:
            rows = self._rows(field)
            if field.scope == "unit":
                rows = rows[0]
            elif field.scope == "block" and not field.real:
                rows = rows[self._firsts] if self._several else rows[:1]
            values[field.name] = field.read(rows)
        return values

    def write(self, state: core.State, own: Array) -> None:
        """Take over the numbers that are not the views that were read; `own` tells the block of each leaf.
        This is for arrays: with tensors each field would be an operation."""
        views = self._views or {}
        for field in self._fields:
            value = getattr(state, field.name)
            if value is views.get(field.name):
                continue
            if field.scope == "block" and not field.real and self._several:
                value = value[own]
            if field.shape:
                value = value.reshape((len(value), math.prod(field.shape)))
            else:
                value = value if field.scope == "unit" else value[:, None]
            self._rows(field)[:, field.columns] = value
