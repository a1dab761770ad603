"""Inner products of leaves that are shards, inside `jax.shard_map`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from mlbfgs_core.adapter import Blocks, one_block

__all__ = ["AxisName", "Shards", "axis_names", "varying_axes"]

AxisName = str | tuple[str, ...]


def axis_names(axis_name: AxisName | None) -> tuple[str, ...]:
    """An argument `axis_name` as a tuple.

    Raises
    ------
    TypeError
        If it is neither None, nor a string, nor a tuple of strings.
    """
    names = () if axis_name is None else axis_name
    names = (names,) if isinstance(names, str) else names
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        msg = f"`axis_name` must be None, a str or a tuple of str, got {axis_name!r}"
        raise TypeError(msg)
    return names


class Shards(NamedTuple):
    """The axes over which leaves may be shards, and their sizes."""

    sizes: dict[str, int]

    @classmethod
    def over(cls, names: tuple[str, ...]) -> Shards:
        """The shards of a program that is mapped over these axes.

        Raises
        ------
        NameError
            Outside a program that is mapped over them.
        ValueError
            Where types do not tell which leaves are copies.
        """
        sizes = {name: lax.axis_size(name) for name in names}
        for name, size in sizes.items():
            if size > 1 and name not in varying_axes(lax.axis_index(name)):
                rule = "must be an axis of a `jax.shard_map` with check_vma=True"
                msg = f"`axis_name` {rule}, whose types tell shards from copies, got {name!r}"
                raise ValueError(msg)
        return cls(sizes)

    def reduce(self, x: jax.Array) -> jax.Array:
        """The sum over all shards."""
        varying = tuple(name for name in self.sizes if name in varying_axes(x))
        total = lax.psum(x, varying) if varying else x
        copies = self._number(name for name in self.sizes if name not in varying)
        return total if copies == 1 else total * copies

    def shares(self, leaves: Sequence[Any]) -> list[float]:
        """The part of each leaf's inner products that a shard adds: 1 over the number of copies."""
        return [
            1.0 / self._number(name for name in self.sizes if name not in varying_axes(x)) for x in leaves
        ]

    def block_sizes(self, leaves: Sequence[Any], blocks: Blocks | None) -> list[float]:
        """Number of parameters of each block, over all shards."""
        sizes = [
            math.prod(leaf.shape) * self._number(name for name in self.sizes if name in varying_axes(leaf))
            for leaf in leaves
        ]
        return [float(sum(sizes[i] for i in block)) for block in blocks or one_block(len(sizes))]

    def check(self, names: Sequence[str], leaves: Sequence[Any], grads: Sequence[Any | None]) -> None:
        """Raise ValueError where copies of a parameter have gradients that differ."""
        for name, leaf, grad in zip(names, leaves, grads, strict=True):
            axes = () if grad is None else varying_axes(grad) - varying_axes(leaf)
            if found := [axis for axis in self.sizes if axis in axes]:
                rule = "must be the same on every copy of a parameter (sum it with `jax.lax.psum`)"
                msg = f"`updates` {rule}, got one that varies over {found} at {name!r}"
                raise ValueError(msg)

    def _number(self, names: Any) -> int:
        return math.prod(self.sizes[name] for name in names)


def varying_axes(x: Any) -> frozenset[str]:
    """The mapped axes over which a value differs, as its type tells."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)  # JAX before 0.10 has `vma` alone
    return kind.vma if manual is None else manual.varying
