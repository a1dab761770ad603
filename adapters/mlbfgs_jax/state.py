"""The state of `scale_by_mlbfgs`, and how it holds what the core remembers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

import mlbfgs_core as core
from mlbfgs_core import adapter

from .packing import Plan

__all__ = [
    "InPack",
    "MLBFGSState",
    "folded",
    "joined",
    "map_leaf_arrays",
    "pack_name",
    "packed_leaves",
    "packs_of",
    "parted",
    "unfolded",
]


class InPack(NamedTuple):
    """Stands in a tree for a parameter that lies in a pack; holds no array."""

    kind: dict[str, tuple[()]]
    """Its only key tells dtype and shape, such as "float32 of shape (4, 6)"; a part of the tree's structure,
    so that parameters that have changed are told from those that `init` has seen."""

    @classmethod
    def of(cls, leaf: Any) -> InPack:
        """For a real leaf."""
        return cls({f"{adapter.accumulation_dtype(leaf)} of shape {tuple(leaf.shape)}": ()})

    def __str__(self) -> str:
        return next(iter(self.kind))


class MLBFGSState(core.State):
    """The core's state with trees like that of the parameters in place of tuples with an array per leaf.

    A leaf of `history` has two more leading axes than its parameter. A complex parameter counts as a
    real one with a last axis of length 2.

    In the trees an `InPack` stands for each parameter that lies in a pack. For each tree `packed` holds a
    tuple of flat arrays, such as ``packed["packed_history"]``: one for each block and dtype of averages of
    which several parameters are packed. ``packed["packed_trace"]`` is the momentum of `mlbfgs`.
    """

    __slots__ = ()


def pack_name(name: str) -> str:
    """The name of a tree's packs; another than the tree's, which `optax.tree.get` may look for."""
    return f"packed_{name}"


def folded(state: core.State, plan: Plan, leaves: Sequence[Any], treedef: Any) -> MLBFGSState:
    """A state of the core as trees and packs."""
    trees: dict[str, Any] = {}
    packed: dict[str, Any] = {}
    for name, arrays in adapter.leaf_arrays(state).items():
        if name in adapter.OF_MATRICES:
            trees[name] = _of_matrices(arrays, plan, treedef)
        else:
            trees[name], packed[pack_name(name)] = parted(arrays, plan, leaves, treedef)
    packed = packed if any(plan.packed) else {}
    own = {name: trees.pop(name) for name in state.preconditioner}
    return MLBFGSState(*state)._replace(**trees, preconditioner=own, packed=packed)


def _of_matrices(arrays: Sequence[Any | None], plan: Plan, treedef: Any) -> Any:
    """Factors or bases of the core's leaves as a tree; packs have none."""
    if treedef.num_leaves == 0:
        # A tree of placeholders, as `optax.tree.map_params` makes it: what holds factors is no parameter.
        return jnp.zeros(())
    return treedef.unflatten(plan.split(arrays))


def parted(
    arrays: Sequence[Any], plan: Plan, leaves: Sequence[Any], treedef: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Arrays of the core's leaves as a tree and as packs."""
    if treedef.num_leaves == 0:
        return treedef.unflatten([]), ()
    alone: list[Any] = [InPack.of(leaf) for leaf in leaves]
    flat = []
    for group, pack, array in zip(plan.groups, plan.packs, arrays, strict=True):
        if pack is None:
            alone[group[0]] = array
        else:
            flat.append(array)
    return treedef.unflatten(alone), tuple(flat)


def unfolded(state: MLBFGSState, plan: Plan, treedef: Any) -> core.State:
    """The inverse of `folded`."""
    arrays = {
        name: joined(treedef.flatten_up_to(tree), packs_of(state, name, plan), plan)
        for name, tree in adapter.leaf_arrays(state).items()
    }
    return adapter.with_leaf_arrays(core.State(*state)._replace(packed=()), arrays)


def packs_of(state: MLBFGSState, name: str, plan: Plan) -> tuple[Any | None, ...]:
    """The packs of what has this name in the state of this plan; each None for factors and bases."""
    if name in adapter.OF_MATRICES:
        return (None,) * len(plan.packs)
    packs: tuple[Any, ...] = state.packed.get(pack_name(name), ())
    return packs


def joined(alone: Sequence[Any], packed: Sequence[Any], plan: Plan) -> tuple[Any, ...]:
    """The inverse of `parted`, from the leaves of the tree."""
    packs = iter(packed)
    return tuple(
        alone[group[0]] if pack is None else next(packs)
        for group, pack in zip(plan.groups, plan.packs, strict=True)
    )


def packed_leaves(tree: Any, treedef: Any) -> list[bool]:
    """Which leaves of a tree of the state lie in packs."""
    return [isinstance(leaf, InPack) for leaf in treedef.flatten_up_to(tree)]


def map_leaf_arrays(function: Callable[[Any], Any], state: Any, *others: Any) -> Any:
    """The state with `function` applied to all leaves' arrays of each kind, with those of other states."""
    found = [adapter.leaf_arrays(own) for own in (state, *others)]
    arrays = {name: function(*(own[name] for own in found)) for name in found[0]}
    own = {name: arrays.pop(name) for name in state.preconditioner}
    return state._replace(**arrays, preconditioner=own)
