"""A run at rest: one core state with its names, parameters and momentum, and when two of them match."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .blocks import Blocks, validate_blocks
from .config import Config
from .preconditioner import PRECONDITIONERS
from .state import (
    COEFFICIENTS,
    LEAF_COUNTS,
    LEAF_DTYPES,
    OF_MATRICES,
    Matrices,
    State,
    accumulation_dtype,
    dtype_name,
    layout,
    leaf_arrays,
    matrices_of,
    with_leaf_arrays,
)

__all__ = [
    "Snapshot",
    "arrays_by_name",
    "check_layout",
    "check_names",
    "coefficients",
    "matched",
    "settings_of",
    "shape_settings",
]

Array = Any


class Snapshot(NamedTuple):
    """One core state with all that belongs to it, as NumPy arrays; a checkpoint holds one or more."""

    names: tuple[str, ...]
    """A distinct name for each leaf, by which leaves are found again in any order."""
    blocks: Blocks
    state: State
    params: tuple[Array, ...]
    """The leaves' values; a complex leaf is one of reals with a last axis of 2."""
    momentum: tuple[Array | None, ...]
    """Heavy-ball buffers, in the dtype of the averages; None where there is none."""

    def mapped(
        self,
        rename: Callable[[str], str],
        transform: Callable[[str, Array], Array] = lambda name, array: array,
    ) -> Snapshot:
        """The same run with other names and shapes, for a model that is written differently elsewhere.

        Parameters
        ----------
        rename : callable
            Maps a name to the new one.
        transform : callable, optional
            Maps a (new) name and an array to the array in the new shape. It is called for the leaf's
            value, averages and momentum, and for its history, which has two more axes in front. It may
            permute the leaf's axes (such as ``np.swapaxes(array, -1, -2)``), but not mix values; with a
            Kronecker preconditioner it must keep its matrices, or transpose them.

        Returns
        -------
        Snapshot

        Examples
        --------
        PyTorch's linear layer as Flax's dense one:

        >>> from mlbfgs_core import Config, Method
        >>> weight = np.zeros((3, 8))
        >>> run = Snapshot(("0.weight",), ((0,),), Method(Config()).init([weight]), (weight,), (None,))
        >>> dense = run.mapped(lambda name: "Dense_0.kernel", lambda name, a: np.swapaxes(a, -1, -2))
        >>> dense.names, dense.state.history[0].shape
        (('Dense_0.kernel',), (2, 5, 8, 3))
        """
        names = tuple(map(rename, self.names))

        def moved(arrays: Sequence[Array | None]) -> tuple[Any, ...]:
            pairs = zip(names, arrays, strict=True)
            return tuple(None if array is None else transform(name, array) for name, array in pairs)

        arrays = {
            name: moved(own) for name, own in leaf_arrays(self.state).items() if name not in OF_MATRICES
        }
        if OF_MATRICES[0] in self.state.preconditioner:
            arrays |= _moved_factors(self, names, transform)
        state = with_leaf_arrays(self.state, arrays)
        return Snapshot(names, self.blocks, state, moved(self.params), moved(self.momentum))


def _moved_factors(
    snapshot: Snapshot, names: Sequence[str], transform: Callable[[str, Array], Array]
) -> dict[str, tuple[Array | None, ...]]:
    """The factors and bases after leaves have been transformed: where matrices are transposed, left and right
    change places."""
    own = {name: list(snapshot.state.preconditioner[name]) for name in OF_MATRICES}
    for leaf, (name, matrix) in enumerate(zip(names, matrices_of(snapshot.state), strict=True)):
        if matrix is None:
            continue
        shape = snapshot.params[leaf].shape
        index = np.arange(math.prod(shape)).reshape(shape)
        moved = np.ravel(transform(name, index))
        if (moved == np.ravel(index)).all():
            continue
        folded = index.reshape(matrix.count, matrix.rows, matrix.columns)
        if (moved != np.ravel(np.swapaxes(folded, 1, 2))).any():
            rule = "must keep or transpose the matrices of a Kronecker preconditioner"
            msg = f"`transform` {rule}, got another order of values for {name!r}"
            raise ValueError(msg)
        for kind in ("factor", "basis"):
            left, right = own[f"left_{kind}"], own[f"right_{kind}"]
            left[leaf], right[leaf] = right[leaf], left[leaf]
    return {name: tuple(arrays) for name, arrays in own.items()}


def arrays_by_name(snapshot: Snapshot) -> Iterator[tuple[str, Array]]:
    """The arrays of a file by their names in it, without those of leaves that never had a gradient."""
    for name, value in coefficients(snapshot.state).items():
        yield name, value
    seen = np.asarray(snapshot.state.leaf_steps) > 0
    for name, values in leaf_arrays(snapshot.state).items():
        for leaf, value, used in zip(snapshot.names, values, seen, strict=True):
            if used and value is not None:
                yield f"{name}/{leaf}", value
    for leaf, param, buffer in zip(snapshot.names, snapshot.params, snapshot.momentum, strict=True):
        yield f"params/{leaf}", param
        if buffer is not None:
            yield f"momentum/{leaf}", buffer


def check_names(names: Sequence[str], blocks: Blocks, where: str) -> None:
    """Raise ValueError unless the names are distinct strings and the blocks a partition of them."""
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) for name in names):
        msg = f"{where} must have distinct names, got {names!r}"
        raise ValueError(msg)
    if not all(type(index) is int for block in blocks for index in block):
        msg = f"{where} must have blocks of ints, got {blocks!r}"
        raise ValueError(msg)
    validate_blocks(blocks, len(names))


def check_layout(
    config: Config,
    names: Sequence[str],
    blocks: Blocks,
    arrays: dict[str, Array],
    where: str,
    matrices: Matrices | None = None,
) -> None:
    """Raise unless the arrays are those of a state of these leaves."""
    params = [arrays[f"params/{name}"] for name in names]
    wanted = {}
    for name, param in zip(names, params, strict=True):
        if dtype_name(param) not in LEAF_DTYPES:
            msg = f"{where} must hold parameters of the dtypes {LEAF_DTYPES}, got {param.dtype} for {name!r}"
            raise ValueError(msg)
        wanted[f"params/{name}"] = tuple(param.shape), dtype_name(param)
    steps = np.asarray(arrays["leaf_steps"])
    if steps.shape != (len(names),):
        msg = f"{where} must hold for 'leaf_steps' {len(names)} numbers, got an array of shape {steps.shape}"
        raise ValueError(msg)
    used = steps > 0
    for entry in layout(config, params, blocks, matrices):
        if entry.leaf is None:
            wanted[entry.name] = entry.shape, entry.dtype
        elif used[entry.leaf]:
            wanted[f"{entry.name}/{names[entry.leaf]}"] = entry.shape, entry.dtype
    for name, param in zip(names, params, strict=True):
        if f"momentum/{name}" in arrays:
            wanted[f"momentum/{name}"] = tuple(param.shape), accumulation_dtype(param)
    got = {name: (tuple(array.shape), dtype_name(array)) for name, array in arrays.items()}
    for name in sorted({*wanted, *got}):
        if wanted.get(name) != got.get(name):
            msg = f"{where} must hold for {name!r} {_told(wanted.get(name))}, got {_told(got.get(name))}"
            raise ValueError(msg)


def _told(kind: tuple[tuple[int, ...], str] | None) -> str:
    return "nothing" if kind is None else f"{kind[1]} of shape {kind[0]}"


def matched(found: Sequence[Snapshot], wanted: Snapshot, where: str) -> Snapshot:
    """The snapshot with the names of the wanted one, in its order of leaves and blocks.

    Raises ValueError if there is none, or if its blocks, shapes or dtypes differ.
    """
    same = [snapshot for snapshot in found if set(snapshot.names) == set(wanted.names)]
    if not same:
        here, there = set(wanted.names), {name for snapshot in found for name in snapshot.names}
        told = f"without {sorted(here - there)[:3]} and with {sorted(there - here)[:3]} in addition"
        msg = f"{where} must hold the parameters that are to be resumed, got some {told}"
        raise ValueError(msg)
    snapshot = same[0]
    place = [snapshot.names.index(name) for name in wanted.names]
    got_blocks, want_blocks = _named_blocks(snapshot), _named_blocks(wanted)
    if sorted(got_blocks) != sorted(want_blocks):
        msg = f"{where} must have the blocks {want_blocks[:2]}, ..., got {got_blocks[:2]}, ..."
        raise ValueError(msg)
    order = [got_blocks.index(block) for block in want_blocks]
    arrays = {name: tuple(own[i] for i in place) for name, own in leaf_arrays(snapshot.state).items()}
    numbers = {
        name: value[place] if name in LEAF_COUNTS else value[order]
        for name, value in coefficients(snapshot.state).items()
        if value.ndim
    }
    result = Snapshot(
        wanted.names,
        wanted.blocks,
        with_leaf_arrays(snapshot.state, arrays)._replace(**numbers),
        tuple(snapshot.params[i] for i in place),
        tuple(snapshot.momentum[i] for i in place),
    )
    _check_same(result, wanted, where)
    return result


def _named_blocks(snapshot: Snapshot) -> list[list[str]]:
    return [sorted(snapshot.names[i] for i in block) for block in snapshot.blocks]


def _check_same(found: Snapshot, wanted: Snapshot, where: str) -> None:
    """Raise unless both have parameters and state of the same shapes and dtypes."""
    kinds = [settings_of(snapshot.state).preconditioner for snapshot in (wanted, found)]
    if kinds[0] != kinds[1]:
        told = f"preconditioner={kinds[0]!r}, got one with {kinds[1]!r}"
        msg = f"{where} must be of a run with {told}"
        raise ValueError(msg)
    sizes = [snapshot.state.gram.shape[-1] // 2 for snapshot in (wanted, found)]
    if sizes[0] != sizes[1] and 0 in sizes:
        msg = f"{where} must be of a run with history_size={sizes[0]}, got one with {sizes[1]}"
        raise ValueError(msg)
    pairs = [("params", found.params, wanted.params)]
    own, others = leaf_arrays(found.state), leaf_arrays(wanted.state)
    pairs += [(name, own.get(name, ()), others.get(name, ())) for name in {**others, **own}]
    for field, got, want in pairs:
        for index, name in enumerate(found.names):
            kind = [
                None if not arrays or arrays[index] is None else _kind(arrays[index])
                for arrays in (got, want)
            ]
            if kind[0] != kind[1]:
                told = f"{_told(kind[1])}, got {_told(kind[0])}"
                msg = f"{where} must hold for '{field}/{name}' {told}"
                raise ValueError(msg)


def _kind(array: Array) -> tuple[tuple[int, ...], str]:
    return tuple(array.shape), dtype_name(array)


def coefficients(state: State) -> dict[str, Array]:
    """The arrays of a state that belong to no leaf, and the counts of leaves, by their names."""
    return {name: getattr(state, name) for name in COEFFICIENTS}


def shape_settings(history_size: int, history_dtype: str | None, preconditioner: str) -> Config:
    """Settings that stand only for the shapes and dtypes of a state's arrays."""
    return Config(
        history_size=history_size,
        history_dtype=history_dtype,
        preconditioner=preconditioner,  # type: ignore[arg-type]
    )


def settings_of(state: State) -> Config:
    """The `shape_settings` that give the layout of a state."""
    dtypes = {dtype_name(history) for history in state.history}
    own = all(
        dtype_name(history) == dtype_name(mean)
        for history, mean in zip(state.history, state.mean_params, strict=True)
    )
    for name, preconditioner in PRECONDITIONERS.items():
        config = shape_settings(state.gram.shape[-1] // 2, None if own else next(iter(dtypes)), name)
        if set(preconditioner.names) == set(state.preconditioner):
            break
    return config
