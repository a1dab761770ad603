"""What the optimizer remembers: a NamedTuple of arrays, its layout, and its exact size in bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from .blocks import Blocks, one_block, validate_blocks
from .config import Config
from .kernels import Kernels
from .preconditioner import PRECONDITIONERS, Matrix, preconditioner_of

__all__ = [
    "LEAF_COUNTS",
    "LEAF_DTYPES",
    "LEAF_NAMES",
    "OF_MATRICES",
    "RENAMED",
    "Array",
    "Entry",
    "Matrices",
    "MemoryPlan",
    "State",
    "accumulation_dtype",
    "dtype_name",
    "has_rows",
    "init",
    "layout",
    "leaf_arrays",
    "leaf_count",
    "leaf_shapes",
    "matrices_of",
    "plan_memory",
    "with_leaf_arrays",
]

Array = Any
_BYTES = {"bool": 1, "int32": 4, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
LEAF_DTYPES = ("float16", "bfloat16", "float32", "float64")
"""Names of the dtypes that a leaf may have."""


class State(NamedTuple):
    """Everything that one optimizer remembers; `m` pairs, `L` leaves, `B` blocks.

    Symbols are those of the paper (Niu et al. 2023); shapes never change.
    """

    # For the leaves: a tuple with one array per leaf, or an empty tuple where there are none of the kind.
    history: tuple[Array, ...]
    """``(2, m, *leaf)``: `s` in [0], damped `y` in [1], each divided by the norm of `s` (and, where ``|y|``
    and ``|s|`` differ by many orders of magnitude, multiplied by a common power of two)."""
    mean_params: tuple[Array, ...]
    """`M_theta`, the average of this window."""
    mean_grads: tuple[Array, ...]
    """`M_g`."""
    prev_params: tuple[Array, ...]
    """`M_theta` of the previous window."""
    prev_grads: tuple[Array, ...]
    preconditioner: dict[str, tuple[Array | None, ...]]
    """What the preconditioner remembers, by the names of its layout: an array per leaf, or None for a leaf
    without one. ``exp_avg_sq``: `v`, the running mean of squared gradients."""

    # Per parameter, (P,) int32: per leaf, unless an adapter packs several parameters into one.
    leaf_steps: Array
    """Observations so far."""
    leaf_window: Array
    """Observations in this window."""
    leaf_prev_window: Array
    """Observations on which the previous window's averages rest."""

    # Per block, leading axis B.
    size: Array
    """Number of parameters, over all shards."""
    mean_square: Array
    """Running mean of the mean squared gradient."""
    gram: Array
    """(B, 2m, 2m): inner products of the stored rows."""
    middle_matrix: Array
    """(B, 2m, 2m): `C` in ``H = gamma I + B^T C B``."""
    gamma: Array
    """Scale of the initial inverse Hessian."""
    pairs: Array
    """int32: pairs stored so far; modulo m, the ring's next slot."""
    rejected: Array
    """int32: pairs that carried no usable curvature."""
    row_projection: Array
    """(B, 2, m): the last two inner products of the stored `s` with a gradient, newest in [0]."""
    row_noise: Array
    """(B, m): variance of the gradient along the stored `s`."""
    row_age: Array
    """(B, m) int32: projections seen since the row was written."""
    mu: Array
    """Curvature ``s.y / s.s`` of the last pair, before damping."""
    tau: Array
    """Weight of `y` in the paper's damping of the last stored pair."""
    delta: Array
    """What the floors added to the curvature of the last stored pair."""
    cosine: Array
    """Cosine of the angle between the last direction and gradient."""

    # One for all blocks, 0-d.
    step: Array
    """int32: accepted steps."""
    skipped: Array
    """int32: steps left out because of a non-finite gradient."""
    accepted: Array
    """bool: whether the last step was accepted."""
    window: Array
    """int32 `n`: accepted steps in this window."""
    prev_window: Array
    """int32 `n_P`: the same for the previous window; 0 before there is one."""
    scatter: Array
    """`r`: scatter of the gradient about its mean in this window."""
    prev_scatter: Array
    signal_to_noise: Array
    """At the last check: ``|y|^2`` over the noise expected in it."""
    pending: Array
    """bool: a check has passed, and the next accepted step takes the pair."""
    due: Array
    """bool: this step takes the pair."""
    length: Array
    """Running length of the direction, for ``step_length="clip"``; 0 before the first pair."""
    grad_scale: Array
    """Power of two by which every gradient is multiplied before anything else, so that no square over- or
    underflows; 1 unless the very first gradient was out of the ordinary. `gamma` and all that comes from
    gradients are in these units, so that the inverse Hessian is ``grad_scale * (gamma I + B^T C B)``."""

    packed: Any = ()
    """What an adapter holds of several parameters together, in place of arrays for each; empty elsewhere. The
    core's functions neither read nor write it."""


_LEAF_FIELDS = State._fields[:5]
"""Names of the fields that hold an array per leaf, except what the preconditioner remembers."""
COEFFICIENTS = State._fields[6:-1]
"""Names of the fields that hold arrays of coefficients, and counts of leaves."""
LEAF_COUNTS = State._fields[6:9]
"""Names of the fields that hold one number per leaf."""
RENAMED = {"moment": "exp_avg_sq", "operator": "middle_matrix"}
"""Names of arrays in states that older versions have written, and their names today."""


def leaf_arrays(state: State) -> dict[str, tuple[Array | None, ...]]:
    """All that is remembered of leaves, by name: for each leaf an array, or None where it has none.

    An adapter's state may hold trees in place of the tuples; their truth value says nothing.
    """
    own = {name: getattr(state, name) for name in _LEAF_FIELDS}
    return {name: arrays for name, arrays in own.items() if not _is_empty(arrays)} | state.preconditioner


def _is_empty(arrays: Any) -> bool:
    return isinstance(arrays, tuple) and len(arrays) == 0


def with_leaf_arrays(state: State, arrays: Mapping[str, tuple[Array | None, ...]]) -> State:
    """The state with these arrays in place of its `leaf_arrays`; what is not given becomes empty."""
    own: dict[str, Any] = {name: tuple(arrays.get(name, ())) for name in _LEAF_FIELDS}
    rest = {name: tuple(values) for name, values in arrays.items() if name not in own}
    return state._replace(**own, preconditioner=rest)


Matrices = Sequence[Matrix | None]
"""For each leaf how its values form matrices; None: they form none."""


class Entry(NamedTuple):
    """One array of a state."""

    name: str
    leaf: int | None
    """Index of the leaf to which it belongs; None for a coefficient."""
    shape: tuple[int, ...]
    dtype: str
    kind: str
    """The field of `MemoryPlan` under which it counts."""

    @property
    def is_basis(self) -> bool:
        """Whether it starts as identities, not as zeros."""
        return self.name.endswith("_basis")


class MemoryPlan(NamedTuple):
    """Bytes of an optimizer's state, by kind."""

    history: int
    averages: int
    preconditioner: int
    coefficients: int
    total: int


def init(
    config: Config,
    leaves: Sequence[Array],
    blocks: Blocks | None = None,
    xp: Any = None,
    *,
    kernels: Kernels | None = None,
    matrices: Matrices | None = None,
) -> State:
    """The state before the first step; see `mlbfgs_core.Method.init`."""
    blocks = _check(config, leaves, blocks)
    if kernels is None:
        kernels = Kernels(array_namespace(*leaves) if xp is None else xp)
    xp = kernels.xp
    devices = {str(device): device for device in map(kernels.device, leaves) if device is not None}
    if len(devices) > 1:
        msg = f"`leaves` must be on one device, got {sorted(devices)}"
        raise ValueError(msg)
    device = next(iter(devices.values()), None)
    leaf_values: dict[str, list[Array | None]] = {
        name: [None] * len(leaves) for name in preconditioner_of(config).names
    }
    values: dict[str, Array] = {}
    for entry in layout(config, leaves, blocks, matrices):
        of = xp if entry.leaf is None else kernels.leaf_xp
        if not hasattr(of, entry.dtype):
            msg = f"`history_dtype` must be a dtype of {of.__name__}, got {entry.dtype!r}"
            raise ValueError(msg)
        dtype = getattr(of, entry.dtype)
        if entry.leaf is None:
            fill = 1 if entry.name in ("gamma", "accepted", "grad_scale") else 0
            values[entry.name] = xp.full(entry.shape, fill, dtype=dtype, device=device)
        else:
            own = leaf_values.setdefault(entry.name, [None] * len(leaves))
            own[entry.leaf] = _initial(kernels, leaves[entry.leaf], entry, dtype)
    sizes = [float(sum(math.prod(leaves[i].shape) for i in block)) for block in blocks]
    full = [xp.full((), size, dtype=values["size"].dtype, device=device) for size in sizes]
    values["size"] = xp.stack(full)
    empty: dict[str, Any] = {**dict.fromkeys(_LEAF_FIELDS, ()), "preconditioner": {}}
    return with_leaf_arrays(State(**empty, **values), {name: tuple(own) for name, own in leaf_values.items()})


def _initial(kernels: Kernels, leaf: Array, entry: Entry, dtype: Any) -> Array:
    """Zeros, placed like the leaf if they are of its shape; or identities."""
    xp, shape = kernels.leaf_xp, entry.shape
    if entry.name in OF_MATRICES:
        array = xp.zeros(shape, dtype=dtype, device=kernels.device(leaf))
        if not entry.is_basis:
            return array
        return array + xp.eye(shape[-1], dtype=dtype, device=kernels.device(leaf))[None, ...]
    count = len(shape) - len(leaf.shape)
    return kernels.zeros(leaf, shape[:count], dtype)


def plan_memory(
    config: Config,
    leaves: Sequence[Array],
    blocks: Blocks | None = None,
    matrices: Matrices | None = None,
) -> MemoryPlan:
    """Exact bytes of the state that `init` would allocate, without allocating it.

    Parameters
    ----------
    config : Config
    leaves : sequence of arrays
        Anything with a `shape` and a `dtype`.
    blocks : tuple of tuples of int, optional
    matrices : sequence of Matrix or None, optional
        As in `Method`.

    Returns
    -------
    MemoryPlan
        Bytes. With float32 parameters and history it is ``(2 m + 5) * 4`` bytes per parameter (one
        array less without a preconditioner; with Kronecker factors for each matrix of a x b ``2 (a^2 + b^2)``
        values more) and a few kilobytes of coefficients per block.

    Raises
    ------
    TypeError, ValueError
        As `init`.

    Examples
    --------
    >>> import numpy as np
    >>> plan = plan_memory(Config(history_dtype="float32"), [np.zeros(1000, dtype=np.float32)])
    >>> plan.history, plan.averages, plan.preconditioner
    (40000, 16000, 4000)
    """
    blocks = _check(config, leaves, blocks)
    kinds = dict.fromkeys(("history", "averages", "preconditioner", "coefficients"), 0)
    for entry in layout(config, leaves, blocks, matrices):
        kinds[entry.kind] += math.prod(entry.shape) * _BYTES[entry.dtype]
    return MemoryPlan(**kinds, total=sum(kinds.values()))


def accumulation_dtype(leaf: Array) -> str:
    """Name of the dtype of a leaf's averages and inner products: float32, or float64 for float64."""
    return "float64" if dtype_name(leaf) == "float64" else "float32"


def coefficient_dtype(leaves: Sequence[Array]) -> str:
    """Name of the dtype of coefficients: the widest of the leaves' accumulation dtypes."""
    return max(map(accumulation_dtype, leaves))


def dtype_name(leaf: Array) -> str:
    """Name of the dtype, such as "float32", the same for NumPy, PyTorch and JAX."""
    return str(leaf.dtype).rpartition(".")[2]


def layout(
    config: Config, leaves: Sequence[Array], blocks: Blocks, matrices: Matrices | None = None
) -> Iterator[Entry]:
    """Every array of the state; nothing else defines which there are. For `matrices` see `Method`."""
    m, count, number = config.history_size, len(leaves), len(blocks)
    preconditioner = preconditioner_of(config)
    if not preconditioner.has_matrices:
        matrices = [None] * count
    elif matrices is None:
        matrices = [Matrix.of(tuple(leaf.shape), config.max_preconditioner_dim) for leaf in leaves]
    for index, leaf in enumerate(leaves):
        shape, dtype = tuple(leaf.shape), accumulation_dtype(leaf)
        if config.takes_pairs:
            yield Entry("history", index, (2, m, *shape), config.history_dtype or dtype, "history")
            for name in ("mean_params", "mean_grads", "prev_params", "prev_grads"):
                yield Entry(name, index, shape, dtype, "averages")
        for name, own, kind in preconditioner.layout(config, shape, dtype, matrices[index]):
            yield Entry(name, index, own, kind, "preconditioner")
    real = coefficient_dtype(leaves)
    coefficients: dict[str, tuple[tuple[int, ...], str]] = {
        **dict.fromkeys(("leaf_steps", "leaf_window", "leaf_prev_window"), ((count,), "int32")),
        **dict.fromkeys(("size", "mean_square", "gamma", "mu", "tau", "delta", "cosine"), ((number,), real)),
        **dict.fromkeys(("gram", "middle_matrix"), ((number, 2 * m, 2 * m), real)),
        **dict.fromkeys(("pairs", "rejected"), ((number,), "int32")),
        "row_projection": ((number, 2, m), real),
        "row_noise": ((number, m), real),
        "row_age": ((number, m), "int32"),
        **dict.fromkeys(("step", "skipped", "window", "prev_window"), ((), "int32")),
        **dict.fromkeys(("accepted", "pending", "due"), ((), "bool")),
        **dict.fromkeys(("scatter", "prev_scatter", "signal_to_noise", "length", "grad_scale"), ((), real)),
    }
    for name, (shape, dtype) in coefficients.items():
        yield Entry(name, None, shape, dtype, "coefficients")


LEAF_NAMES = tuple(
    dict.fromkeys(
        [*_LEAF_FIELDS]
        + [name for preconditioner in PRECONDITIONERS.values() for name in preconditioner.names]
    )
)
"""Names of all arrays that leaves may have, with any settings."""


_OF_LEAF_SHAPE = (
    "mean_params",
    *(
        name
        for preconditioner in PRECONDITIONERS.values()
        for name, shape, _ in preconditioner.layout(Config(), (2, 3), "float32")
        if shape == (2, 3)
    ),
)
"""Names of arrays that have their leaf's shape."""

OF_MATRICES = tuple(name for name in PRECONDITIONERS["kronecker"].names if name != "exp_avg_sq")
"""Names of arrays that are stacks of square matrices, one for each matrix of a leaf."""


def leaf_count(state: State) -> int:
    """Number of leaves."""
    count: int = state.leaf_steps.shape[0]
    return next((len(arrays) for arrays in leaf_arrays(state).values()), count)


def has_rows(state: State, xp: Any) -> Array:
    """(B,): whether any stored pair says something; those that are noise are stored as zeros."""
    return xp.any(state.middle_matrix != 0, axis=(1, 2))


def matrices_of(state: State) -> list[Matrix | None]:
    """How the values of each leaf form matrices."""
    own = state.preconditioner
    squares = own.get("exp_avg_sq", (None,) * len(state.leaf_steps))
    return [
        None
        if square is None
        else Matrix.found(
            {name: own[name][leaf] for name in OF_MATRICES if name in own}, math.prod(square.shape)
        )
        for leaf, square in enumerate(squares)
    ]


def leaf_shapes(state: State) -> list[tuple[int, ...] | None]:
    """The shape of each leaf; None if no array of the state has it."""
    known = leaf_arrays(state)
    for name in _OF_LEAF_SHAPE:
        if name in known:
            return [None if array is None else tuple(array.shape) for array in known[name]]
    return [None] * state.leaf_steps.shape[0]


def _check(config: Config, leaves: Sequence[Array], blocks: Blocks | None) -> Blocks:
    if not isinstance(config, Config):
        msg = f"`config` must be a Config, got {type(config).__name__}"
        raise TypeError(msg)
    if len(leaves) == 0:
        msg = "`leaves` must hold at least one array, got none"
        raise ValueError(msg)
    for index, leaf in enumerate(leaves):
        if dtype_name(leaf) not in LEAF_DTYPES:
            msg = f"`leaves`[{index}] must be of one of the dtypes {LEAF_DTYPES}, got {leaf.dtype}"
            raise TypeError(msg)
    if blocks is None:
        return one_block(len(leaves))
    validate_blocks(blocks, len(leaves))
    return blocks
