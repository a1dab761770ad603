"""`scale_by_mlbfgs` and `mlbfgs`: the core as optax transformations."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import accumulation_dtype, dtype_name

from .decisions import decide
from .kernels import JaxKernels
from .matrices import check_matrices, matrices_of
from .packing import PackMode, Plan, check_mode, may_be_sharded, to_be_packed
from .shards import AxisName, Shards, axis_names
from .state import MLBFGSState, folded, joined, pack_name, packed_leaves, parted, unfolded
from .tree import Tree
from .values import as_real, from_real, paired, widened

__all__ = ["mlbfgs", "scale_by_mlbfgs"]


@partial(adapter.with_preset, marked=True)
def scale_by_mlbfgs(
    *,
    preset: adapter.Preset | None = None,
    history_size: int = 5,
    update_every: int = 50,
    adaptive: bool = True,
    check_every: int | None = None,
    signal_to_noise: float = 4.0,
    noise_floor: float = 4.0,
    beta: float | None = None,
    min_cosine: float = 0.2,
    shrinkage: float = 0.5,
    damping: tuple[float, float, float] | None = None,
    step_length: adapter.StepLength = "rms",
    clip_factor: float = 2.0,
    preconditioner: adapter.PreconditionerName = "diagonal",
    preconditioner_power: float = 1.0,
    preconditioner_beta: float = 0.99,
    factor_beta: float = 0.95,
    precondition_frequency: int = 10,
    max_preconditioner_dim: int = 2048,
    history_dtype: str | None = None,
    blocks: adapter.BlockSpec = "all",
    matrix_axes: adapter.MatrixAxes | None = None,
    axis_name: AxisName | None = None,
    pack: PackMode = "auto",
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by the inverse Hessian of mL-BFGS.

    Parameters
    ----------
    preset : {"default", "paper", "formulas", "lbfgs", "fit"} or None
        As in `mlbfgs_core.Config`. The settings `history_size` to `history_dtype` are those of
        `mlbfgs_core.Config`, which explains them; those not given are the preset's. All numbers except
        `history_size` and, with matrices, `max_preconditioner_dim` may be traced.
    blocks : {"all", "layer", "parameter"} or callable
        Which parameters share curvature; a callable maps a parameter's name to a label. A name is the
        path in the tree, joined by dots ("params.Dense_0.kernel").
    matrix_axes : mapping or callable, optional
        For ``preconditioner="kronecker"``: how the axes of a parameter make matrices. It maps a name to two
        numbers, of the leading axes that count stacked layers, and of the following axes that form the rows;
        all other axes form the columns. None: that parameter has the diagonal. (1, 1) suits a stack of dense
        kernels, as `flax.linen.scan` and `nnx.vmap` make it, and (0, 3) Flax's convolution kernels
        (height, width, in, out). A callable takes a name and a shape. The two parts of a complex value lie
        side by side in a column. Names that a mapping lacks have (0, 1): the first axis against the rest.
    axis_name : str or tuple of str, optional
        For `update` inside `jax.shard_map`: the axes over which parameters are sharded; inner products are
        summed over them. A parameter that is replicated over some of them counts once. Leave out axes over
        which all parameters are replicated and their gradients already summed. Under `jit`, which knows
        the shardings, give none. Not with ``preconditioner="kronecker"``.
    pack : {"auto", True, False}
        Which parameters lie side by side in one flat array of the state for each block and dtype of averages,
        which compiles and runs much faster and computes the same. "auto": those of which the types say that
        they are not sharded; never on a mesh of several devices with automatic axes, since types say nothing
        of them, and never with an `axis_name`. True: all; give it where all are replicated on such a mesh.
        False: none; each array of the state then has its parameter's shape. A parameter with a matrix is
        never packed. A state must be used with the `pack` and `matrix_axes` with which `init` has made it.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        `update` needs `params`, ignores extra arguments, and gives a direction in which the loss rises,
        of the gradients' dtypes, like optax's other ``scale_by_*``. Its state is an `MLBFGSState`.

    Raises
    ------
    ValueError, TypeError
        Settings out of range; from `init` and `update`: parameters that are not floating-point or
        complex, missing parameters; a state with other parameters packed, or packed ones that may be
        sharded, or with other matrices; with `axis_name` a `shard_map` without ``check_vma``, or gradients
        that differ between copies of a parameter.
    NameError
        From `update`: no such axis.

    Notes
    -----
    A non-finite gradient gives a direction of zero and changes nothing in the state except the counter
    `skipped`. A parameter whose gradient is None does not move. Donate the state to the compiled step
    (``jax.jit(step, donate_argnums=...)``), or each step copies it. State: ``(2 * history_size + 5) * 4``
    bytes per float32 parameter with default settings, and up to a sixty-fourth more for packs; Kronecker
    factors and bases of a matrix of a x b are ``2 (a^2 + b^2)`` values more.

    A packed parameter keeps its own count of gradients. While it has none, its averages, momentum and part of
    the history stay as they are, and afterwards it goes on as if it lay alone.

    References
    ----------
    Niu et al., TMLR 2023, arXiv:2307.13744. Difference from the paper: see `mlbfgs_core.Config`;
    ``preset="paper"`` is the published method with its authors' settings.

    Examples
    --------
    With a line search, for problems without noise, as `optax.lbfgs`:

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss(x):
    ...     return jnp.sum(jnp.asarray([10.0, 0.1]) * x**2)
    >>> tx = optax.chain(
    ...     scale_by_mlbfgs(preset="lbfgs"), optax.scale(-1.0), optax.scale_by_zoom_linesearch(20)
    ... )
    >>> x = jnp.ones(2)
    >>> state = tx.init(x)
    >>> for _ in range(8):
    ...     value, grad = jax.value_and_grad(loss)(x)
    ...     update, state = tx.update(grad, state, x, value=value, grad=grad, value_fn=loss)
    ...     x = optax.apply_updates(x, update)
    >>> bool(loss(x) < 1e-8)
    True
    """
    config = core.Config(**adapter.settings_in(locals()))
    method = _Packed(config, blocks, axis_names(axis_name), pack, matrix_axes)
    method.check()

    # Compiled as a whole, since outside `jit` each `cond` would be compiled again at every step.
    @partial(jax.jit, inline=True)
    def compiled(
        updates: optax.Updates, state: MLBFGSState, params: optax.Params
    ) -> tuple[optax.Updates, MLBFGSState]:
        step = method.step(updates, state, params)
        if step is None:
            return updates, state
        scaled = [None if d is None else d * step.factor.astype(d.dtype) for d in step.directions]
        parts = step.plan.split(scaled, step.state.accepted)
        return step.tree.updates(parts, step.grads, from_real), step.state

    def update(
        updates: optax.Updates,
        state: MLBFGSState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MLBFGSState]:
        del extra_args
        return compiled(updates, state, _needed(params))

    return optax.GradientTransformationExtraArgs(method.init, update)


_TRACE = pack_name("trace")


class _Step(NamedTuple):
    """What a step of the core gives."""

    tree: Tree
    grads: list[Any | None]
    """As they were given."""
    plan: Plan
    directions: list[Any | None]
    """One for each leaf of the core, up to `factor`."""
    factor: Any
    state: MLBFGSState


class _Packed(NamedTuple):
    """The core over trees of parameters."""

    config: core.Config
    blocks: adapter.BlockSpec
    axes: tuple[str, ...]
    pack: PackMode
    matrix_axes: adapter.MatrixAxes

    def check(self) -> None:
        """Raise ValueError or TypeError unless the options go together."""
        check_mode(self.pack, self.axes)
        check_matrices(self.config, self.axes)

    def init(self, params: optax.Params) -> MLBFGSState:
        """The state before the first step."""
        return self.start(params)[0]

    def start(self, params: optax.Params) -> tuple[MLBFGSState, Tree, Plan]:
        """The state before the first step, and of what it is."""
        tree = Tree.of(params, self.blocks)
        packs = self.config.takes_pairs or self.config.preconditioner != "none"
        matrices = self.matrices(tree)
        packed = to_be_packed(self.pack if packs else False, self.axes, tree.names, tree.leaves, matrices)
        plan = Plan.of(tree.leaves, packed, tree.blocks)
        kernels = JaxKernels(plan)
        likes = plan.likes(tree.leaves) or [jnp.zeros(0)]
        of_leaves = plan.matrices(matrices) or [None]
        state = core.Method(self.config, plan.blocks or None, kernels, matrices=of_leaves).init(likes)
        shards = Shards({})
        if self.axes:
            with contextlib.suppress(NameError):  # outside `shard_map`, where leaves are whole
                shards = Shards.over(self.axes)
        sizes = shards.block_sizes(tree.leaves, tree.blocks)
        state = state._replace(size=state.size * 0 + jnp.asarray(sizes, state.size.dtype))
        if any(plan.packed):
            counts = {name: jnp.zeros(len(tree.leaves), jnp.int32) for name in adapter.LEAF_COUNTS}
            state = state._replace(**counts)
        state = folded(state, plan, tree.leaves, tree.treedef)
        if state.packed:  # lies where the parameters are
            numbers = {name: _placed(value, tree) for name, value in adapter.coefficients(state).items()}
            state = state._replace(**numbers, packed=_placed(state.packed, tree))
        if not tree.leaves and self.pack is not False and not self.axes:
            # A tree of placeholders, as `optax.tree.map_params` makes it, tells not what will be packed.
            state = state._replace(packed=jnp.zeros(()))
        return state, tree, plan

    def matrices(self, tree: Tree) -> list[adapter.Matrix | None]:
        """The matrices of the parameters."""
        return matrices_of(self.config, tree, self.matrix_axes)

    def plan(self, tree: Tree, state: MLBFGSState, matrices: Sequence[adapter.Matrix | None]) -> Plan:
        """The plan of a state.

        Raises
        ------
        ValueError
            Where it is not the one that `pack` asks for, or would gather shards.
        """
        arrays = next(iter(adapter.leaf_arrays(state).values()), None)
        packed = [False] * len(tree.names) if arrays is None else packed_leaves(arrays, tree.treedef)
        plan = Plan.of(tree.leaves, packed, tree.blocks)
        advice = "make a new one with `init`, or carry it over with `save_state` and `load_state`"
        if self.pack != "auto" and arrays is not None:
            wanted = to_be_packed(self.pack, self.axes, tree.names, tree.leaves, matrices)
            if Plan.of(tree.leaves, wanted, tree.blocks).packed != packed:
                told = "some" if any(packed) else "no"
                got = f"got one with {told} parameters packed"
                msg = f"`state` must be one of pack={self.pack}, {got}; {advice}"
                raise ValueError(msg)
        elif self.axes and any(packed):
            msg = f"`state` must have no packed parameters with `axis_name`; {advice}"
            raise ValueError(msg)
        elif self.pack == "auto":
            for name, leaf, yes in zip(tree.names, tree.leaves, packed, strict=True):
                if yes and may_be_sharded(leaf):
                    rule = "must not have packed what may be sharded, since each step would gather it"
                    told = f"got one that has packed {name!r} before it lay on a mesh of automatic axes"
                    msg = f"`state` {rule}, {told}; {advice}, or give pack=True if nothing is sharded"
                    raise ValueError(msg)
        return plan

    def step(self, updates: optax.Updates, state: MLBFGSState, params: optax.Params) -> _Step | None:
        """One step of the core; None where no parameter has a gradient."""
        tree = Tree.of(params, self.blocks)
        given = tree.gradients(updates)
        tree.check_names(state)
        if not tree.leaves:
            return None
        matrices = self.matrices(tree)
        plan = self.plan(tree, state, matrices)
        before = unfolded(state, plan, tree.treedef)
        tree.check(state, before, plan, self.config, matrices)
        if all(grad is None for grad in given):
            return None
        likes = plan.likes(tree.leaves)
        wide = [accumulation_dtype(leaf) for leaf in likes]
        grads = plan.join([None if grad is None else as_real(grad) for grad in given], wide)
        leaves = plan.gather(tree.leaves)
        shared = ()
        if self.axes:
            shards = Shards.over(self.axes)
            shards.check(tree.names, leaves, grads)
            shared = shards.reduce, shards.shares(leaves)
        kernels = JaxKernels(plan, [grad is not None for grad in given])
        method = core.Method(_cast(self.config, state.gamma.dtype), plan.blocks, kernels, *shared)
        directions, factor, after = method.unscaled_step(
            before,
            leaves,
            grads,
            when_check=decide,
            when_due=decide,
            when_scaled=decide,
            when_formed=decide,
            when_turned=decide,
        )
        new = folded(after, plan, tree.leaves, tree.treedef)
        new = new._replace(packed=state.packed | new.packed)  # the momentum is not the core's
        return _Step(tree, given, plan, directions, factor, new)


def _needed(params: optax.Params | None) -> optax.Params:
    if params is None:
        msg = "`params` must be given to `update`, got None: curvature is learned from their changes"
        raise ValueError(msg)
    return params


@partial(adapter.with_preset, marked=True)
def mlbfgs(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    *,
    preset: adapter.Preset | None = None,
    history_size: int = 5,
    update_every: int = 50,
    adaptive: bool = True,
    check_every: int | None = None,
    signal_to_noise: float = 4.0,
    noise_floor: float = 4.0,
    beta: float | None = None,
    min_cosine: float = 0.2,
    shrinkage: float = 0.5,
    damping: tuple[float, float, float] | None = None,
    step_length: adapter.StepLength = "rms",
    clip_factor: float = 2.0,
    preconditioner: adapter.PreconditionerName = "diagonal",
    preconditioner_power: float = 1.0,
    preconditioner_beta: float = 0.99,
    factor_beta: float = 0.95,
    precondition_frequency: int = 10,
    max_preconditioner_dim: int = 2048,
    history_dtype: str | None = None,
    blocks: adapter.BlockSpec = "all",
    matrix_axes: adapter.MatrixAxes | None = None,
    axis_name: AxisName | None = None,
    pack: PackMode = "auto",
    nesterov: bool | None = None,
    mask: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """mL-BFGS: quasi-Newton training from momentum-averaged curvature pairs.

    Parameters
    ----------
    learning_rate : float or schedule
        Root mean square of a step's changes, before momentum, with the default ``step_length="rms"``: about
        1e-3, as for `optax.adam`.
    momentum : float, optional
        Momentum on the direction; by default the preset's: 0 for "lbfgs" and "fit", else 0.9.
    weight_decay : float or schedule
        Parameters shrink by ``learning_rate * weight_decay`` per step, as in `optax.adamw`.
    preset, blocks, matrix_axes, axis_name, pack
        As in `scale_by_mlbfgs`. The settings `history_size` to `history_dtype` are those of
        `mlbfgs_core.Config`, which explains them; those not given are the preset's.
    nesterov : bool, optional
        Whether the momentum looks ahead (Nesterov's), as in `optax.sgd`, or is heavy-ball. The
        default preset looks ahead, the others do not.
    mask : tree of bool or callable, optional
        Which parameters decay, as in `optax.adamw`.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        What a chain of `scale_by_mlbfgs`, `optax.trace`, `optax.add_decayed_weights` and
        `optax.scale_by_learning_rate` does, with the tuple of their states.

    Raises
    ------
    ValueError, TypeError, NameError
        Numbers out of range, and what `scale_by_mlbfgs` raises.

    Notes
    -----
    The chain computes in float32 where parameters are of half precision, and rounds its update once. A
    step with a non-finite gradient leaves parameters, momentum and the schedules' counts as they were.
    Memory: 4 bytes per float32 parameter more than `scale_by_mlbfgs`, for the momentum. To change numbers
    during a run, use `optax.inject_hyperparams`, with `history_size`, `max_preconditioner_dim` (and `blocks`,
    `matrix_axes` and `mask`, if they are functions) in its `static_args`.

    References
    ----------
    As `scale_by_mlbfgs`.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, optax
    >>> tx = mlbfgs(1e-3, momentum=0.0)
    >>> params = {"w": jnp.ones(3)}
    >>> state = tx.init(params)
    >>> grads = jax.grad(lambda p: jnp.sum(p["w"] ** 2))(params)
    >>> updates, state = tx.update(grads, state, params)
    >>> [round(float(change), 6) for change in updates["w"]]
    [-0.001, -0.001, -0.001]
    """
    config = core.Config(**adapter.settings_in(locals()))
    if momentum is None:
        momentum = adapter.preset_momentum(preset)
    if nesterov is None:
        nesterov = adapter.preset_nesterov(preset)
    if not isinstance(nesterov, bool):
        msg = f"`nesterov` must be a bool, got {nesterov!r}"
        raise TypeError(msg)
    decay = _number("momentum", momentum)
    shrinkage = weight_decay if callable(weight_decay) else _number("weight_decay", weight_decay)
    rate = learning_rate if callable(learning_rate) else _number("learning_rate", learning_rate)
    method = _Packed(config, blocks, axis_names(axis_name), pack, matrix_axes)
    method.check()
    momentum = None if adapter.is_zero(decay) else _Momentum(decay, nesterov)
    # A decay of zero would still turn an infinite parameter into a NaN.
    weights = optax.identity() if adapter.is_zero(shrinkage) else optax.add_decayed_weights(shrinkage, mask)
    steps = optax.scale_by_learning_rate(rate)

    def init(params: optax.Params) -> optax.OptState:
        wide = widened(params)
        first, tree, plan = method.start(wide)
        trace = optax.EmptyState()
        if momentum is not None:
            first, trace = momentum.init(first, tree, plan)
        return first, trace, weights.init(wide), steps.init(wide)

    # Compiled as a whole, since outside `jit` each operation would be compiled alone.
    @partial(jax.jit, inline=True)
    def compiled(
        updates: optax.Updates, state: optax.OptState, params: optax.Params, numbers: tuple[Any, Any]
    ) -> tuple[optax.Updates, optax.OptState]:
        wide = widened(params)
        step = method.step(updates, state[0], wide)
        if step is None:
            return updates, state
        first, trace = step.state, state[1]
        moved = [None if d is None else d * step.factor.astype(d.dtype) for d in step.directions]
        if momentum is not None:
            moved, first, trace = momentum.step(step, trace)
        parts = step.tree.updates(step.plan.split(moved, first.accepted), step.grads, paired)
        if not adapter.is_zero(shrinkage):
            parts = _decayed(parts, wide, numbers[0], mask)

        def finished(part: Any, given: Any) -> Any:
            change = jnp.asarray(-numbers[1], part.dtype) * part
            return jnp.where(first.accepted, change, jnp.zeros((), part.dtype)).astype(
                jnp.asarray(given).dtype
            )

        result = jax.tree.map(
            lambda part, given: None if part is None else finished(part, given),
            parts,
            updates,
            is_leaf=_is_none,
        )
        counts = jax.tree.map(
            lambda count: jnp.where(first.accepted, optax.safe_increment(count), count), tuple(state[2:])
        )
        return result, (first, trace, *counts)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        # The only array in the state of a schedule is its count.
        numbers = [
            number(*jax.tree.leaves(part)) if callable(number) else number
            for number, part in zip((shrinkage, rate), tuple(state[2:]), strict=True)
        ]
        return compiled(updates, tuple(state), _needed(params), tuple(numbers))

    return optax.GradientTransformationExtraArgs(init, update)


class _Momentum(NamedTuple):
    """`optax.trace` over the leaves of the core, which promotes no dtype."""

    decay: Any
    nesterov: bool

    def init(self, first: MLBFGSState, tree: Tree, plan: Plan) -> tuple[MLBFGSState, optax.TraceState]:
        """The states before the first step."""
        zeros = JaxKernels().zeros
        likes = plan.likes(tree.leaves)
        return self._stored(
            first, tree, plan, [zeros(leaf, (), getattr(jnp, dtype_name(leaf))) for leaf in likes]
        )

    def step(
        self, step: _Step, trace: optax.TraceState
    ) -> tuple[list[Any | None], MLBFGSState, optax.TraceState]:
        """The directions with momentum, and the states with the new momentum."""
        held = step.tree.treedef.flatten_up_to(jax.tree.map(as_real, trace.trace))
        before = joined(held, step.state.packed.get(_TRACE, ()), step.plan)
        after, moved = list(before), list(step.directions)
        for leaf, (old, d) in enumerate(zip(before, step.directions, strict=True)):
            if d is None:
                continue
            decay, change = jnp.asarray(self.decay, d.dtype), d * step.factor.astype(d.dtype)
            # A step that is skipped, and a parameter without a gradient, leave the momentum as it is.
            after[leaf] = jnp.where(step.state.accepted & _present(step, leaf), change + decay * old, old)
            moved[leaf] = change + decay * after[leaf] if self.nesterov else after[leaf]
        first, trace = self._stored(step.state, step.tree, step.plan, after)
        return moved, first, trace

    @staticmethod
    def _stored(
        first: MLBFGSState, tree: Tree, plan: Plan, arrays: Sequence[Any]
    ) -> tuple[MLBFGSState, optax.TraceState]:
        """The states with this momentum; a complex parameter alone has a complex one."""
        own = [
            array if pack is not None else paired(array, tree.given[group[0]])
            for group, pack, array in zip(plan.groups, plan.packs, arrays, strict=True)
        ]
        alone, packed = parted(own, plan, tree.leaves, tree.treedef)
        if any(plan.packed):
            first = first._replace(packed=first.packed | {_TRACE: _placed(packed, tree)})
        return first, optax.TraceState(alone)


def _decayed(updates: optax.Updates, params: optax.Params, rate: Any, mask: Any) -> optax.Updates:
    """`optax.add_decayed_weights`, but it promotes no dtype, and takes gradients of None with a mask."""
    chosen = True if mask is None else mask(params) if callable(mask) else mask

    def decayed(update: Any, param: Any) -> Any:
        if update is None:
            return None
        # An infinite parameter stays as it is; its own decay would turn it into a NaN.
        finite = jnp.where(jnp.isfinite(param), param, jnp.zeros((), param.dtype))
        return update + jnp.asarray(rate, update.dtype) * finite

    def part(chosen: bool, updates: optax.Updates, params: optax.Params) -> optax.Updates:
        return jax.tree.map(decayed, updates, params, is_leaf=_is_none) if chosen else updates

    return jax.tree.map(part, chosen, updates, params)


def _placed(arrays: Any, tree: Tree) -> Any:
    """Arrays on the devices of the parameters, which are not sharded, unless these are traced or anywhere."""
    device = JaxKernels().device(tree.leaves[0])
    return arrays if device is None else jax.device_put(arrays, device)


def _present(step: _Step, leaf: int) -> Any:
    """Which values of a leaf of the core have a gradient: true, or a truth value for each."""
    pack, present = step.plan.packs[leaf], [grad is not None for grad in step.grads]
    return True if pack is None or all(present) else pack.spread(jnp.asarray(present))


def _cast(config: core.Config, dtype: Any) -> core.Config:
    """The settings with those that are arrays, traced or not, in the dtype of the coefficients."""

    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        if not isinstance(value, jax.Array):
            return value
        return _real(value).astype(jnp.int32 if jnp.issubdtype(value.dtype, jnp.integer) else dtype)

    return core.Config(**{name: cast(value) for name, value in vars(config).items()})


def _number(name: str, value: Any) -> Any:
    """A checked number, real where it is an array."""
    value = adapter.check_real(name, value)
    return _real(value) if isinstance(value, jax.Array) else value


def _real(number: jax.Array) -> jax.Array:
    """A real number, which `optax.inject_hyperparams` makes complex if a parameter is complex."""
    return jnp.real(number) if jnp.issubdtype(number.dtype, jnp.complexfloating) else number


def _is_none(leaf: Any) -> bool:
    return leaf is None
