"""A tree of parameters as a list of named real leaves, in blocks; and what must be true of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import dtype_name

from .packing import Plan
from .state import InPack, MLBFGSState
from .values import COMPLEX, as_real, kind

__all__ = ["Tree", "check_params", "named_leaves", "path_names"]


class Tree(NamedTuple):
    """A tree of parameters."""

    treedef: Any
    names: list[str]
    given: list[Any]
    """The leaves as the user has them."""
    leaves: list[Any]
    """Real ones."""
    blocks: adapter.Blocks | None

    @classmethod
    def of(cls, params: optax.Params, blocks: adapter.BlockSpec) -> Tree:
        """Flatten parameters; without any, as in a tree of placeholders, there are no blocks."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = path_names([path for path, _ in paths])
        for name, (_, leaf) in zip(names, paths, strict=True):
            dtype = dtype_name(leaf) if hasattr(leaf, "dtype") else type(leaf).__name__
            if dtype not in (*adapter.LEAF_DTYPES, *COMPLEX):
                rule = "must be floating-point or complex arrays (see optax.masked for the others)"
                msg = f"`params` {rule}, got {dtype} at {name!r}"
                raise TypeError(msg)
        given = [leaf for _, leaf in paths]
        return cls(
            treedef, names, given, list(map(as_real, given)), core.partition(names, blocks) if names else None
        )

    def gradients(self, updates: optax.Updates) -> list[Any | None]:
        """One gradient or None for each parameter.

        Raises
        ------
        ValueError
            A tree of another structure, or a gradient that is not like its parameter.
        """
        rule = "must be a tree like that of `params`, with None for a parameter without a gradient"
        try:
            grads = self.treedef.flatten_up_to(updates)
        except (AttributeError, TypeError, ValueError) as error:
            msg = f"`grads` {rule}, got {self._unlike(updates)}"
            raise ValueError(msg) from error
        if _is_pair(updates, self.treedef) or not jax.tree_util.all_leaves(
            [g for g in grads if g is not None]
        ):
            msg = f"`grads` {rule}, got {self._unlike(updates)}"
            raise ValueError(msg)
        for name, given, leaf, grad in zip(self.names, self.given, self.leaves, grads, strict=True):
            if grad is None:
                continue
            real = as_real(grad)
            if real.shape != leaf.shape or not jnp.issubdtype(real.dtype, jnp.floating):
                msg = f"`grads` must be like the parameter, {kind(given)}, at {name!r}, got {kind(grad)}"
                raise ValueError(msg)
        return grads

    def _unlike(self, grads: Any) -> str:
        """In what a tree of gradients differs from that of the parameters."""
        found = jax.tree.structure(grads)
        if _is_pair(grads, self.treedef):
            return "a pair whose second part is one (as `jax.value_and_grad` returns it)"
        paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=lambda node: node is None)
        names = path_names([path for path, _ in paths])
        for words, some, others in (("one for", names, self.names), ("none for", self.names, names)):
            if (odd := [name for name in some if name not in others]) and len(odd) < len(some):
                return f"{words} {odd[0]!r}"
        return f"a {type(grads).__name__}, {found}, for {self.treedef}"

    def check_names(self, state: MLBFGSState) -> None:
        """Raise ValueError unless a state has the tree of these parameters."""
        arrays = next(iter(adapter.leaf_arrays(state).values()), None)
        if arrays is None:
            return
        if (held := list(named_leaves(arrays))) != self.names:
            here, there = set(self.names), set(held)
            rule = "must be the tree that `init` has seen"
            told = f"without {sorted(there - here)[:3]} and with {sorted(here - there)[:3]} in addition"
            msg = f"`params` {rule}, got one {told}"
            raise ValueError(msg)

    def check(
        self,
        state: MLBFGSState,
        plain: core.State,
        plan: Plan,
        config: core.Config,
        matrices: Sequence[adapter.Matrix | None],
    ) -> None:
        """Raise ValueError unless the state, given as the core's, too, is one of these parameters."""
        tree = next(iter(adapter.leaf_arrays(state).values()), None)
        if tree is not None:
            check_params(self.names, self.given, self.treedef.flatten_up_to(tree), plain, plan, config)
            check_factors(self.names, plain, plan, config, self.leaves, matrices)

    def updates(
        self, parts: Sequence[Any | None], grads: Sequence[Any | None], like: Callable[..., Any]
    ) -> Any:
        """A tree of updates for the parameters that have a gradient, made `like` it."""
        return self.treedef.unflatten(
            None if grad is None else like(part, jnp.asarray(grad))
            for part, grad in zip(parts, grads, strict=True)
        )


def _is_pair(grads: Any, treedef: Any) -> bool:
    """Whether it is what `jax.value_and_grad` returns: a number and a tree of gradients."""
    if not isinstance(grads, tuple) or len(grads) != 2 or jax.tree.structure(grads[1]) != treedef:
        return False
    return jax.tree_util.all_leaves([grads[0]]) and jnp.ndim(grads[0]) == 0


def check_params(
    names: Sequence[str],
    params: Sequence[Any],
    tree: Sequence[Any],
    state: core.State,
    plan: Plan,
    config: core.Config,
) -> None:
    """Raise ValueError unless parameters are like those whose averages a state holds, in a tree and in packs.

    Shapes and dtypes of a state never change, so it cannot follow parameters whose shape or dtype has.
    """

    def refuse(name: str, param: Any, averages: str) -> None:
        rule = f"must be as `init` has seen them, with averages in {averages} at {name!r}"
        msg = f"`params` {rule}, got {kind(param)} (a state cannot change: `init` makes a new one)"
        raise ValueError(msg)

    held, leaves = adapter.leaf_arrays(state), list(map(as_real, params))
    for name, param, leaf, stands in zip(names, params, leaves, tree, strict=True):
        if isinstance(stands, InPack) and stands != InPack.of(leaf):
            refuse(name, param, str(stands))
    # Without matrices, whose arrays are not like the parameters.
    for entry in adapter.layout(config, plan.likes(leaves), (), [None] * len(plan.groups)):
        if entry.leaf is None or entry.kind == "history":
            continue
        if entry.name not in held:
            msg = f"`state` must be of these settings, got one without {entry.name!r}"
            raise ValueError(msg)
        found, first = held[entry.name][entry.leaf], plan.groups[entry.leaf][0]
        if (tuple(found.shape), dtype_name(found)) != (entry.shape, entry.dtype):
            refuse(names[first], params[first], kind(found))


def check_factors(
    names: Sequence[str],
    state: core.State,
    plan: Plan,
    config: core.Config,
    leaves: Sequence[Any],
    matrices: Sequence[adapter.Matrix | None],
) -> None:
    """Raise ValueError unless a state has the factors and bases of these matrices, and no others."""
    wanted = {
        (entry.name, entry.leaf): f"{entry.dtype} of shape {entry.shape}"
        for entry in adapter.layout(config, plan.likes(leaves), (), plan.matrices(matrices))
        if entry.name in adapter.OF_MATRICES
    }
    for name in adapter.OF_MATRICES:
        held = state.preconditioner.get(name, (None,) * len(plan.groups))
        for leaf, (group, array) in enumerate(zip(plan.groups, held, strict=True)):
            got = "nothing" if array is None else f"{dtype_name(array)} of shape {tuple(array.shape)}"
            told = wanted.get((name, leaf), "nothing")
            if got != told:
                rule = "must be of these settings and `matrix_axes`, which give"
                msg = f"`state` {rule} {told} for {name!r} of {names[group[0]]!r}, got one with {got}"
                raise ValueError(msg)


def path_names(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Keys joined by dots; without the attribute `value` of a variable, which NNX shows to `init` only."""
    children = Counter(path[:-1] for path in paths)
    boxed = jax.tree_util.GetAttrKey("value")
    plain = [path[:-1] if path[-1:] == (boxed,) and children[path[:-1]] == 1 else path for path in paths]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in plain]


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their names, with an `InPack` for each that lies in a pack."""
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, InPack))[0]
    return dict(zip(path_names([path for path, _ in paths]), (leaf for _, leaf in paths), strict=True))
