"""The neutral checkpoint of a run in JAX: written, and read again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import accumulation_dtype

from .packing import Plan
from .state import InPack, MLBFGSState, joined, map_leaf_arrays, pack_name, packs_of
from .tree import check_params, named_leaves, path_names
from .values import as_real, from_real

__all__ = ["load_state", "save_state"]

_TRACE = pack_name("trace")


def save_state(
    path: str | os.PathLike[str],
    params: optax.Params,
    state: optax.OptState,
    *,
    blocks: adapter.BlockSpec = "all",
) -> None:
    """Write parameters, curvature and momentum to a file that the adapters for other frameworks read too.

    Parameters
    ----------
    path : path-like
        A file, by convention ``*.safetensors``; an existing one is replaced once the new one is complete.
    params : tree of arrays
    state : tree
        Of `mlbfgs`, or of any chain that holds one `MLBFGSState` and at most one `optax.TraceState`.
    blocks : {"all", "layer", "parameter"} or callable
        As given to `mlbfgs`.

    Raises
    ------
    ValueError
        A state that is not of these parameters and blocks.
    OSError, ImportError
        As `mlbfgs_core.save_state`.
    RuntimeError
        If another process could not write the file.

    Notes
    -----
    Parameters are known by their paths in the tree, joined by dots. Not for use inside `jit`; waits for
    the device. Schedules and every other part of the state are not in the file.

    Arrays that are spread over several processes are gathered, one at a time, in the memory of each device
    and then of process 0, which writes; all processes must call this, and go on once the file is written.

    Examples
    --------
    >>> import tempfile
    >>> from mlbfgs_jax import mlbfgs
    >>> path = tempfile.mkdtemp() + "/run.safetensors"
    >>> params, tx = {"w": jnp.ones(3)}, mlbfgs(1e-3)
    >>> save_state(path, params, tx.init(params))
    >>> restored, state = load_state(path, params, tx.init(params))
    >>> restored["w"].tolist()
    [1.0, 1.0, 1.0]
    """
    whole, _ = _snapshot(params, state, blocks)
    if all(map(_is_here, jax.tree.leaves((whole.state, whole.params, whole.momentum)))):
        core.save_state(path, [whole])
    else:
        _save_together(path, whole)


def load_state(
    path: str | os.PathLike[str],
    params: optax.Params,
    state: optax.OptState,
    *,
    blocks: adapter.BlockSpec = "all",
) -> tuple[optax.Params, optax.OptState]:
    """Resume from a file of `save_state`, whichever adapter has written it.

    Parameters
    ----------
    path : path-like
    params, state : trees
        The run to be resumed, such as ``params, tx.init(params)``: they give structure, shapes, dtypes and
        placement. They may be abstract (``jax.eval_shape(tx.init, params)``), with shardings or without.
    blocks : {"all", "layer", "parameter"} or callable
        As given to `mlbfgs`.

    Returns
    -------
    params, state : trees
        New arrays; what the file does not hold is as given. Counts of schedules inside `mlbfgs` are those
        of the accepted steps.

    Raises
    ------
    ValueError
        A damaged file, or one of other parameters, blocks, shapes or dtypes.
    OSError, ImportError
        As `mlbfgs_core.load_state`.

    Notes
    -----
    Each process reads the file and places its own part of each array.

    Examples
    --------
    See `save_state`.
    """
    wanted, plan = _snapshot(params, state, blocks)
    (snapshot,) = core.load_state(path, [wanted])
    values = dict(zip(snapshot.names, snapshot.params, strict=True))
    buffers = dict(zip(snapshot.names, snapshot.momentum, strict=True))

    def part(old: Any) -> Any:
        if isinstance(old, MLBFGSState):
            return _state_like(old, snapshot, plan)
        if isinstance(old, optax.TraceState):
            return old._replace(trace=_map_named(buffer, old.trace))
        if _is_count(old):
            return old._replace(count=_placed(old.count, snapshot.state.step))
        return old

    def buffer(name: str, leaf: Any) -> Any:
        found = buffers.get(name)
        return (
            jnp.zeros(leaf.shape, leaf.dtype, device=_place(leaf)) if found is None else _placed(leaf, found)
        )

    def value(name: str, leaf: Any) -> Any:
        return _placed(leaf, values[name]) if name in values else leaf

    return _map_named(value, params), jax.tree.map(part, state, is_leaf=_is_part)


def _snapshot(
    params: optax.Params, state: optax.OptState, blocks: adapter.BlockSpec
) -> tuple[core.Snapshot, Plan]:
    """The run, with an array for each parameter, and which of them the state has packed."""
    parts = [part for part in jax.tree.leaves(state, is_leaf=_is_part) if _is_part(part)]
    states = [part for part in parts if isinstance(part, MLBFGSState)]
    traces = [part for part in parts if isinstance(part, optax.TraceState)]
    if len(states) != 1 or len(traces) > 1:
        rule = "must hold one MLBFGSState and at most one TraceState"
        msg = f"`state` {rule}, got {len(states)} and {len(traces)}"
        raise ValueError(msg)
    own = states[0]
    # The state of a masked optimizer does not have all parameters, and may hold no array of any.
    trees = [*adapter.leaf_arrays(own).values(), *(trace.trace for trace in traces), params]
    names = tuple(named_leaves(trees[0]))
    partition = core.partition(names, blocks)
    if len(partition) != own.gamma.shape[0]:
        msg = f"`blocks` must give the state's {own.gamma.shape[0]} blocks, got {len(partition)}"
        raise ValueError(msg)
    values = named_leaves(params)
    missing = [name for name in names if name not in values]
    if missing:
        msg = f"`params` must hold the parameters of the state, got none of the name {missing[0]!r}"
        raise ValueError(msg)
    if len(names) != own.leaf_steps.shape[0]:
        msg = f"`params` must be the state's {own.leaf_steps.shape[0]} parameters, got {len(names)}"
        raise ValueError(msg)
    found = [values[name] for name in names]
    leaves = list(map(as_real, found))
    packed = [isinstance(leaf, InPack) for leaf in named_leaves(trees[0]).values()]
    plan = Plan.of(leaves, packed, partition)

    def of_leaves(name: str, tree: Any) -> tuple[Any, ...]:
        held = named_leaves(tree)  # without factors of parameters that have none
        return joined(
            [held.get(name) for name in names], jax.tree.map(_local, packs_of(own, name, plan)), plan
        )

    arrays = {name: of_leaves(name, tree) for name, tree in adapter.leaf_arrays(own).items()}
    plain = adapter.with_leaf_arrays(core.State(*own)._replace(packed=()), arrays)
    tree = list(named_leaves(trees[0]).values())
    check_params(names, found, tree, plain, plan, adapter.settings_of(plain))
    plain = adapter.with_leaf_arrays(plain, {name: tuple(plan.split(own)) for name, own in arrays.items()})
    momentum: list[Any] = [None] * len(names)
    if traces:
        trace = traces[0].trace
        buffers = {
            name: as_real(leaf) for name, leaf in named_leaves(trace).items() if not isinstance(leaf, InPack)
        }
        if (packs := own.packed.get(_TRACE)) is not None:
            alone = [buffers.get(name) for name in names]
            momentum = plan.split(joined(alone, jax.tree.map(_local, packs), plan))
        else:
            momentum = [buffers.get(name) for name in names]
        momentum = [
            None
            if buffer is None
            else buffer
            if _is_abstract(buffer)
            else buffer.astype(accumulation_dtype(leaf))
            for buffer, leaf in zip(momentum, leaves, strict=True)
        ]
    return core.Snapshot(names, partition, plain, tuple(leaves), tuple(momentum)), plan


def _is_abstract(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _local(leaf: Any) -> Any:
    """A copy that this process holds, if an array lies on several; packed ones are the same on all."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and leaf.is_fully_replicated:
        return leaf.addressable_data(0)
    return leaf


def _is_part(node: Any) -> bool:
    return isinstance(node, (MLBFGSState, optax.TraceState)) or _is_count(node)


def _is_count(node: Any) -> bool:
    """Whether a state is that of a schedule, of the rate or of weight decay, which only counts steps."""
    return getattr(node, "_fields", ()) == ("count",)


def _map_named(function: Callable[[str, Any], Any], tree: Any) -> Any:
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    names = path_names([path for path, _ in paths])
    return treedef.unflatten(function(name, leaf) for name, (_, leaf) in zip(names, paths, strict=True))


def _state_like(old: MLBFGSState, snapshot: core.Snapshot, plan: Plan) -> MLBFGSState:
    """The state of a snapshot in the place of an old one."""
    arrays = {pack_name(name): own for name, own in adapter.leaf_arrays(snapshot.state).items()}
    arrays[_TRACE] = snapshot.momentum

    def alone(tree: Any, values: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        chosen = [
            value
            for value, inside in zip(values, plan.packed, strict=True)
            if not inside and value is not None
        ]
        return treedef.unflatten(map(_placed, leaves, chosen))

    def packs(name: str, places: Sequence[Any]) -> tuple[Any, ...]:
        values = [None if value is None else np.asarray(value) for value in arrays[name]]
        flat = [
            pack.join([values[i] for i in pack.members], place.dtype, np)
            for pack, place in zip(filter(None, plan.packs), places, strict=True)
        ]
        return tuple(map(_placed, places, flat))

    numbers = {
        name: _placed(own, getattr(snapshot.state, name)) for name, own in adapter.coefficients(old).items()
    }
    packed = {name: packs(name, leaf) for name, leaf in old.packed.items()}
    return map_leaf_arrays(alone, old, snapshot.state)._replace(**numbers, packed=packed)


def _placed(leaf: Any, values: np.ndarray) -> jax.Array:
    """Values of the file in the place of a leaf: with its dtype, and on its devices."""
    place = _place(leaf)
    if place is None:
        return from_real(jnp.array(values), leaf)  # a copy, which may be donated
    return jax.make_array_from_callback(
        leaf.shape, place, lambda index: from_real(jnp.array(values[index]), leaf)
    )


def _place(leaf: Any) -> Sharding | None:
    """The sharding that a leaf, which may be abstract, asks for."""
    asked = leaf.committed if isinstance(leaf, jax.Array) else isinstance(leaf, jax.ShapeDtypeStruct)
    sharding = leaf.sharding if asked else None
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, AbstractMesh):
        return sharding
    if jax.sharding.get_abstract_mesh().empty:
        return None
    # `jax.eval_shape` gives the names of the axes, `jax.set_mesh` the devices.
    known = jnp.zeros((), device=NamedSharding(sharding.mesh, PartitionSpec())).sharding
    return NamedSharding(known.mesh, sharding.spec)


def _is_here(leaf: Any) -> bool:
    """Whether this process holds all of an array."""
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _save_together(path: str | os.PathLike[str], snapshot: core.Snapshot) -> None:
    """Write on process 0 what is spread over all of them, and raise on all if that fails."""
    writes = jax.process_index() == 0

    def gathered(leaf: Any) -> np.ndarray | None:
        values = np.asarray(leaf) if _is_here(leaf) else multihost_utils.process_allgather(leaf, tiled=True)
        return values if writes else None

    arrays = snapshot.state, snapshot.params, snapshot.momentum
    state, params, momentum = jax.tree.map(gathered, arrays)
    error = None
    if writes:
        try:
            core.save_state(path, [snapshot._replace(state=state, params=params, momentum=momentum)])
        except Exception as caught:
            error = caught
    failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))  # the others wait here
    if error is not None:
        raise error
    if failed:
        msg = f"`path` ({os.fspath(path)}) was not written; process 0 tells why"
        raise RuntimeError(msg)
