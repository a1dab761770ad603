"""Parameters that lie side by side in one leaf of the core, so that JAX compiles one in place of many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding

from mlbfgs_core import adapter
from mlbfgs_core.adapter import accumulation_dtype

from .decisions import undisclosed
from .shards import varying_axes
from .values import kind

__all__ = [
    "Pack",
    "PackMode",
    "Parts",
    "Plan",
    "check_mode",
    "may_be_sharded",
    "sharded_explicitly",
    "to_be_packed",
]

PackMode = bool | Literal["auto"]
Array = Any

_LANES = 128
"""The most values in a row of a pack."""
_PADDING = 64
"""At most one in this many values of a pack is padding, unless rows have one value."""
_LARGEST = 2**31
"""The most values in a pack."""


class Pack(NamedTuple):
    """Some parameters in rows of equal length, each beginning in a row of its own; the rest of its last row
    is zero. A number per parameter is then a number per row, which is next to nothing to store and to read.

    The numbers are needed since each parameter keeps its own count of gradients: one that has been frozen for
    a while learns as if it were alone.
    """

    members: tuple[int, ...]
    """Indices of the parameters."""
    shapes: tuple[tuple[int, ...], ...]
    lanes: int
    """Number of values in a row."""

    @classmethod
    def of(cls, members: Sequence[int], leaves: Sequence[Any]) -> Pack:
        """A pack of these leaves, with the longest rows that need little padding."""
        shapes = tuple(tuple(leaves[i].shape) for i in members)
        sizes = [math.prod(shape) for shape in shapes]
        lanes = _LANES
        while lanes > 1 and _PADDING * sum(-size % lanes for size in sizes) > sum(sizes):
            lanes //= 2
        return cls(tuple(members), shapes, lanes)

    @property
    def counts(self) -> list[int]:
        """Number of rows of each parameter."""
        return [-(-math.prod(shape) // self.lanes) for shape in self.shapes]

    @property
    def starts(self) -> list[int]:
        """Where each parameter begins."""
        return [self.lanes * sum(self.counts[:i]) for i in range(len(self.members))]

    @property
    def size(self) -> int:
        """Number of values, padding included."""
        return sum(self.counts) * self.lanes

    def like(self, leaves: Sequence[Any]) -> jax.ShapeDtypeStruct:
        """Shape and dtype of the pack, which is flat."""
        return jax.ShapeDtypeStruct((self.size,), accumulation_dtype(leaves[self.members[0]]))

    def spread(self, values: Array) -> Array:
        """A number per value from one per parameter; a compiler has to keep no more than one per row."""
        return self.filled(values[np.repeat(np.asarray(self.members), self.counts)])

    def filled(self, rows: Array) -> Array:
        """A number per value from one per row."""
        return jnp.broadcast_to(rows[:, None], (len(rows), self.lanes)).reshape(self.size)

    def by_row(self, flat: Array) -> Array:
        """A flat array as (R, lanes)."""
        return flat.reshape(-1, self.lanes)

    def join(self, arrays: Sequence[Array | None], dtype: Any, xp: Any = jnp) -> Array:
        """Arrays of the parameters as one; None is zero. They may have leading axes, the same for all."""
        parts = []
        for array, shape, count in zip(arrays, self.shapes, self.counts, strict=True):
            room = count * self.lanes
            if array is None:
                parts.append(xp.zeros(room, dtype))
                continue
            lead, size = array.shape[: array.ndim - len(shape)], math.prod(shape)
            flat = xp.reshape(array, (*lead, size)).astype(dtype)
            parts.append(xp.pad(flat, [(0, 0)] * len(lead) + [(0, room - size)]) if room > size else flat)
        return xp.concatenate(parts, axis=-1)

    def split(self, flat: Array) -> list[Array]:
        """The inverse of `join`; the array may be abstract."""
        lead = flat.shape[:-1]
        if _is_abstract(flat):
            return [jax.ShapeDtypeStruct((*lead, *shape), flat.dtype) for shape in self.shapes]
        return [
            flat[..., start : start + math.prod(shape)].reshape((*lead, *shape))
            for start, shape in zip(self.starts, self.shapes, strict=True)
        ]

    def split_if(self, keep: Array, flat: Array) -> list[Array]:
        """As `split` of an array without leading axes, but compiled sooner; unspecified where `keep` (0-d
        bool) is false."""
        return [
            lax.dynamic_slice(flat, (start,), (math.prod(shape),)).reshape(shape)
            for start, shape in zip(undisclosed(self.starts, keep), self.shapes, strict=True)
        ]


class Parts(NamedTuple):
    """A leaf that is packed only where it is read, so that it needs no memory until then."""

    pack: Pack
    arrays: tuple[Array, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pack."""
        return (self.pack.size,)

    @property
    def dtype(self) -> Any:
        """Of the pack."""
        return jnp.dtype(accumulation_dtype(self.arrays[0]))

    def only(self, present: Sequence[bool]) -> Parts:
        """The same with zeros for other parameters."""
        kept = (
            x if present[i] else jnp.zeros_like(x)
            for i, x in zip(self.pack.members, self.arrays, strict=True)
        )
        return self._replace(arrays=tuple(kept))

    def join(self, dtype: Any, keep: Array | None = None) -> Array:
        """The pack in a dtype; if `keep` (0-d) is given, not before it is known: one of the parts is zero if
        it is false, and the whole waits for that part."""
        arrays = list(self.arrays)
        if keep is not None:
            i = min(range(len(arrays)), key=lambda i: arrays[i].size)
            arrays[i] = jnp.where(keep, arrays[i], jnp.zeros((), arrays[i].dtype))
        return self.pack.join(arrays, dtype)


class Plan(NamedTuple):
    """Which leaves of the core the parameters make."""

    groups: tuple[tuple[int, ...], ...]
    """The parameters of each leaf."""
    packs: tuple[Pack | None, ...]
    """How they lie in each leaf; None for a parameter alone, in its own shape."""
    blocks: adapter.Blocks
    """Blocks of leaves."""

    @classmethod
    def of(cls, leaves: Sequence[Any], packed: Sequence[bool], blocks: adapter.Blocks | None) -> Plan:
        """A plan for parameters of which some may be packed: those of one block lie in one leaf, if
        their averages have one dtype: the state need not change with half precision."""
        kinds = [accumulation_dtype(leaf) if yes else None for leaf, yes in zip(leaves, packed, strict=True)]
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        groups, of_leaves = adapter.pack(sizes, kinds, blocks or (), _LARGEST)
        packs = tuple(Pack.of(group, leaves) if len(group) > 1 else None for group in groups)
        return cls(tuple(groups), packs, of_leaves)

    @property
    def packed(self) -> list[bool]:
        """Whether each parameter lies in a pack."""
        inside = {i for pack in self.packs if pack is not None for i in pack.members}
        return [i in inside for i in range(sum(map(len, self.groups)))]

    def likes(self, leaves: Sequence[Any]) -> list[Any]:
        """The leaves of the core, those of packs without values."""
        return [
            leaves[group[0]] if pack is None else pack.like(leaves)
            for group, pack in zip(self.groups, self.packs, strict=True)
        ]

    def matrices(self, matrices: Sequence[adapter.Matrix | None]) -> list[adapter.Matrix | None]:
        """The matrices of the leaves of the core, of which packs have none."""
        return [
            matrices[group[0]] if pack is None else None
            for group, pack in zip(self.groups, self.packs, strict=True)
        ]

    def join(
        self, arrays: Sequence[Array | None], dtypes: Sequence[Any], xp: Any = jnp
    ) -> list[Array | None]:
        """Arrays of the parameters as those of the leaves, in these dtypes; None where there is no array."""
        joined: list[Array | None] = []
        for group, pack, dtype in zip(self.groups, self.packs, dtypes, strict=True):
            own = [arrays[i] for i in group]
            if all(array is None for array in own):
                joined.append(None)
            elif pack is None:
                joined.append(own[0].astype(dtype))
            else:
                joined.append(pack.join(own, dtype, xp))
        return joined

    def gather(self, leaves: Sequence[Any]) -> list[Any]:
        """The parameters as leaves of the core, which are read once."""
        return [
            leaves[group[0]] if pack is None else Parts(pack, tuple(leaves[i] for i in group))
            for group, pack in zip(self.groups, self.packs, strict=True)
        ]

    def split(self, arrays: Sequence[Array | None], keep: Array | None = None) -> list[Array | None]:
        """The inverse of `join`; with `keep` as `Pack.split_if`."""
        parts: list[Array | None] = [None] * sum(map(len, self.groups))
        for group, pack, array in zip(self.groups, self.packs, arrays, strict=True):
            if pack is None:
                own = [array]
            elif array is None:
                own = [None] * len(group)
            else:
                own = pack.split(array) if keep is None else pack.split_if(keep, array)
            for i, part in zip(group, own, strict=True):
                parts[i] = part
        return parts


def _is_abstract(array: Array) -> bool:
    return isinstance(array, jax.ShapeDtypeStruct)


def check_mode(pack: PackMode, axes: tuple[str, ...]) -> None:
    """Raise ValueError or TypeError unless an argument `pack` can be followed."""
    if not isinstance(pack, bool) and pack != "auto":
        error = ValueError if isinstance(pack, str) else TypeError
        msg = f"`pack` must be True, False or 'auto', got {pack!r}"
        raise error(msg)
    if pack is True and axes:
        msg = f"`pack` must not be True with `axis_name`, whose leaves are shards, got axis_name={axes!r}"
        raise ValueError(msg)


def to_be_packed(
    pack: PackMode,
    axes: tuple[str, ...],
    names: Sequence[str],
    leaves: Sequence[Any],
    matrices: Sequence[adapter.Matrix | None],
) -> list[bool]:
    """Which parameters an argument `pack` lets lie side by side: none of those with a matrix.

    Raises
    ------
    ValueError
        With True where a type says that a parameter is sharded.
    """
    alone = [matrix is not None for matrix in matrices]
    if pack is True:
        for name, leaf, whole in zip(names, leaves, alone, strict=True):
            if not whole and (axes_of := _sharded_axes(leaf)):
                rule = "must not be True where a parameter is sharded, since packing would gather it"
                msg = f"`pack` {rule}, got {kind(leaf)} over the axes {axes_of} at {name!r}"
                raise ValueError(msg)
        return [not whole for whole in alone]
    if pack is False or axes:
        return [False] * len(names)
    # Inside of `shard_map` a leaf that is replicated could be packed; but outside, on the mesh, it is not.
    return [
        not (whole or may_be_sharded(leaf) or _axes_of(leaf, AxisType.Manual))
        for leaf, whole in zip(leaves, alone, strict=True)
    ]


def may_be_sharded(leaf: Any) -> bool:
    """Whether a leaf is sharded or a shard, as its type says, or lies on a mesh of automatic axes, of which
    types say nothing. The answer is the same outside of `jit` and inside, and for abstract arrays with
    shardings."""
    shard = not _is_abstract(leaf) and varying_axes(leaf)
    return bool(_axes_of(leaf, AxisType.Auto) or _sharded_axes(leaf) or shard)


def sharded_explicitly(leaf: Any) -> list[str]:
    """Names of the explicit axes over which a leaf is sharded."""
    explicit = _axes_of(leaf, AxisType.Explicit)
    return [name for name in _sharded_axes(leaf) if name in explicit]


def _axes_of(leaf: Any, kind: AxisType) -> list[str]:
    """Names of the axes of this kind and of more than one device in the mesh on which a leaf lies."""
    mesh = _sharding(leaf).mesh
    axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, axis in axes if axis is kind and mesh.shape[name] > 1]


def _sharded_axes(leaf: Any) -> list[str]:
    """Names of the axes of more than one device over which a leaf's type says that it is sharded."""
    sharding = _sharding(leaf)
    named = [part for part in sharding.spec if part is not None]
    names = [name for part in named for name in (part if isinstance(part, tuple) else (part,))]
    return [name for name in names if isinstance(name, str) and sharding.mesh.shape[name] > 1]


def _sharding(leaf: Any) -> NamedSharding:
    """The sharding in the type of a leaf, which may be abstract; without a mesh of its own, on that of the
    context."""
    known = getattr(leaf, "sharding", None) if _is_abstract(leaf) else None
    if isinstance(known, NamedSharding):
        return known
    sharding = jax.typeof(leaf).sharding
    return NamedSharding(jax.sharding.get_abstract_mesh(), sharding.spec) if sharding.mesh.empty else sharding
