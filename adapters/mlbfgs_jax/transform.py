"""`scale_by_mlbfgs` and `mlbfgs`: the core as optax transformations."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import accumulation_dtype, dtype_name

from .kernels import JaxKernels
from .shards import AxisName, Shards, axis_names

__all__ = ["MLBFGSState", "as_real", "from_real", "mlbfgs", "path_names", "scale_by_mlbfgs"]

_COMPLEX = {"complex64": "float32", "complex128": "float64"}


class MLBFGSState(core.State):
    """The core's state with trees like that of the parameters in place of tuples with an array per leaf.

    A leaf of `history` has two more leading axes than its parameter. A complex parameter counts as a
    real one with a last axis of length 2.
    """

    __slots__ = ()


@partial(adapter.with_preset, marked=True)
def scale_by_mlbfgs(
    *,
    preset: adapter.Preset | None = None,
    history_size: int = 5,
    update_every: int = 50,
    adaptive: bool = True,
    check_every: int = 2,
    signal_to_noise: float = 4.0,
    noise_floor: float = 4.0,
    beta: float | None = None,
    min_cosine: float = 0.2,
    shrinkage: float = 0.25,
    damping: tuple[float, float, float] | None = None,
    step_length: adapter.StepLength = "rms",
    clip_factor: float = 2.0,
    preconditioner: adapter.PreconditionerName = "diagonal",
    preconditioner_power: float = 1.0,
    preconditioner_beta: float = 0.99,
    history_dtype: str | None = None,
    blocks: adapter.BlockSpec = "all",
    axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients by the inverse Hessian of mL-BFGS.

    Parameters
    ----------
    preset : {"default", "paper", "formulas", "lbfgs", "fit"} or None
        As in `mlbfgs_core.Config`. The settings `history_size` to `history_dtype` are those of
        `mlbfgs_core.Config`, which explains them; those not given are the preset's. All numbers except
        `history_size` may be traced.
    blocks : {"all", "layer", "parameter"} or callable
        Which parameters share curvature; a callable maps a parameter's name to a label. A name is the
        path in the tree, joined by dots ("params.Dense_0.kernel").
    axis_name : str or tuple of str, optional
        For `update` inside `jax.shard_map`: the axes over which parameters are sharded; inner products are
        summed over them. A parameter that is replicated over some of them counts once. Leave out axes over
        which all parameters are replicated and their gradients already summed. Under `jit`, which knows
        the shardings, give none.

    Returns
    -------
    optax.GradientTransformationExtraArgs
        `update` needs `params`, ignores extra arguments, and gives a direction in which the loss rises,
        of the gradients' dtypes, like optax's other ``scale_by_*``. Its state is an `MLBFGSState`.

    Raises
    ------
    ValueError, TypeError
        Settings out of range; from `init` and `update`: parameters that are not floating-point or
        complex, missing parameters; with `axis_name` a `shard_map` without ``check_vma``, or gradients
        that differ between copies of a parameter.
    NameError
        From `update`: no such axis.

    Notes
    -----
    A non-finite gradient gives a direction of zero and changes nothing in the state except the counter
    `skipped`. A parameter whose gradient is None does not move. Donate the state to the compiled step
    (``jax.jit(step, donate_argnums=...)``), or each step copies it. State: ``(2 * history_size + 5) * 4``
    bytes per float32 parameter with default settings.

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
    return _directions(config, blocks, axis_name)


def _directions(
    config: core.Config, blocks: adapter.BlockSpec, axis_name: AxisName | None, *, wide: bool = False
) -> optax.GradientTransformationExtraArgs:
    """`scale_by_mlbfgs`; where `wide`, directions are of the dtype of the averages, not of the gradient."""
    kernels, axes = JaxKernels(), axis_names(axis_name)

    def init(params: optax.Params) -> MLBFGSState:
        tree = _Tree.of(params, blocks)
        state = core.Method(config, tree.blocks, kernels).init(tree.leaves or [jnp.zeros(0)])
        if axes:
            with contextlib.suppress(NameError):  # outside `shard_map`, where leaves are whole
                sizes = Shards.over(axes).block_sizes(tree.leaves, tree.blocks)
                state = state._replace(size=jnp.asarray(sizes, state.size.dtype))
        return tree.folded(state)

    # Compiled as a whole, since outside `jit` each `cond` would be compiled again at every step.
    @partial(jax.jit, inline=True)
    def compiled(
        updates: optax.Updates, state: MLBFGSState, params: optax.Params
    ) -> tuple[optax.Updates, MLBFGSState]:
        tree = _Tree.of(params, blocks)
        given = tree.gradients(updates)
        tree.check(state, given, config)
        if all(grad is None for grad in given):
            return updates, state
        grads = [
            None if grad is None else as_real(grad).astype(accumulation_dtype(leaf))
            for grad, leaf in zip(given, tree.leaves, strict=True)
        ]
        shards = Shards.over(axes)
        shards.check(tree.names, tree.leaves, grads)
        settings = _cast(config, state.gamma.dtype)
        method = core.Method(settings, tree.blocks, kernels, shards.reduce, shards.shares(tree.leaves))
        directions, after = method.step(
            tree.unfolded(state), tree.leaves, grads, when_check=_if, when_due=_if, when_scaled=_if
        )
        result = [
            None if grad is None else (_paired if wide else from_real)(direction, jnp.asarray(grad))
            for direction, grad in zip(directions, given, strict=True)
        ]
        return tree.treedef.unflatten(result), tree.folded(after)

    def update(
        updates: optax.Updates,
        state: MLBFGSState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, MLBFGSState]:
        del extra_args
        if params is None:
            msg = "`params` must be given to `update`, got None: curvature is learned from their changes"
            raise ValueError(msg)
        return compiled(updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


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
    check_every: int = 2,
    signal_to_noise: float = 4.0,
    noise_floor: float = 4.0,
    beta: float | None = None,
    min_cosine: float = 0.2,
    shrinkage: float = 0.25,
    damping: tuple[float, float, float] | None = None,
    step_length: adapter.StepLength = "rms",
    clip_factor: float = 2.0,
    preconditioner: adapter.PreconditionerName = "diagonal",
    preconditioner_power: float = 1.0,
    preconditioner_beta: float = 0.99,
    history_dtype: str | None = None,
    blocks: adapter.BlockSpec = "all",
    axis_name: AxisName | None = None,
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
    preset, blocks, axis_name
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
        A chain of `scale_by_mlbfgs`, `optax.trace`, `optax.add_decayed_weights` and
        `optax.scale_by_learning_rate`, whose state is the tuple of theirs.

    Raises
    ------
    ValueError, TypeError, NameError
        Numbers out of range, and what `scale_by_mlbfgs` raises.

    Notes
    -----
    The chain computes in float32 where parameters are of half precision, and rounds its update once. A
    step with a non-finite gradient leaves parameters, momentum and the schedules' counts as they were.
    Memory: 4 bytes per float32 parameter more than `scale_by_mlbfgs`, for the momentum. To change numbers
    during a run, use `optax.inject_hyperparams`, with `history_size` (and `blocks` and `mask`, if they are
    functions) in its `static_args`.

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
    return _guarded(
        optax.chain(
            _directions(config, blocks, axis_name, wide=True),
            optax.identity() if adapter.is_zero(decay) else _trace(decay, nesterov=nesterov),
            # A decay of zero would still turn an infinite parameter into a NaN.
            optax.identity() if adapter.is_zero(shrinkage) else _decayed_weights(shrinkage, mask),
            _scale_by_rate(rate),
        )
    )


def _trace(decay: Any, *, nesterov: bool) -> optax.GradientTransformation:
    """`optax.trace`, but its initial state is sharded like the parameters even in a compiled `init`, and it
    promotes no dtype."""
    zeros = JaxKernels().zeros

    def init(params: optax.Params) -> optax.TraceState:
        return optax.TraceState(jax.tree.map(lambda leaf: zeros(leaf, (), leaf.dtype), params))

    def moved(update: Any, trace: Any) -> Any:
        return None if update is None else update + jnp.asarray(decay, update.dtype) * trace

    def update(
        updates: optax.Updates, state: optax.TraceState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.TraceState]:
        del params
        trace = jax.tree.map(moved, updates, state.trace, is_leaf=_is_none)
        if nesterov:
            updates = jax.tree.map(moved, updates, trace, is_leaf=_is_none)
        return updates if nesterov else trace, optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


def _scale_by_rate(rate: Any) -> optax.GradientTransformation:
    """`optax.scale_by_learning_rate`, but it promotes no dtype."""
    theirs = optax.scale_by_learning_rate(rate)
    if callable(rate):
        return theirs

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        return jax.tree.map(lambda update: jnp.asarray(-rate, update.dtype) * update, updates), state

    return optax.GradientTransformation(theirs.init, update)


def _decayed_weights(weight_decay: Any, mask: Any) -> optax.GradientTransformation:
    """`optax.add_decayed_weights`, but it promotes no dtype, and takes gradients of None with a mask."""

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        # The only array in the state is the count of a schedule.
        rate = weight_decay(*jax.tree.leaves(state)) if callable(weight_decay) else weight_decay
        chosen = True if mask is None else mask(params) if callable(mask) else mask

        def decayed(update: Any, param: Any, chosen: bool) -> Any:
            if not chosen:
                return update
            # An infinite parameter stays as it is; its own decay would turn it into a NaN.
            finite = jnp.where(jnp.isfinite(param), param, jnp.zeros((), param.dtype))
            return update + jnp.asarray(rate, update.dtype) * finite

        def part(chosen: bool, updates: optax.Updates, params: optax.Params) -> optax.Updates:
            return jax.tree.map(
                lambda g, p: None if g is None else decayed(g, p, chosen), updates, params, is_leaf=_is_none
            )

        updates = jax.tree.map(part, chosen, updates, params)
        return updates, jax.tree.map(optax.safe_increment, state)

    return optax.GradientTransformation(optax.add_decayed_weights(weight_decay, mask).init, update)


def _guarded(inner: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """A chain that begins with `scale_by_mlbfgs`, in the accumulation dtype, without effect on a step
    that is skipped."""

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(_widened(params))

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        wide, (first, *others) = inner.update(updates, state, _widened(params), **extra_args)

        def kept(new: Any, old: Any) -> Any:  # the momentum of a leaf without a gradient stays
            return old if new is None else jnp.where(first.accepted, new, old)

        rest = jax.tree.map(kept, tuple(others), tuple(state[1:]), is_leaf=_is_none)
        result = jax.tree.map(
            lambda wide, given: kept(wide, 0).astype(jnp.asarray(given).dtype), wide, updates
        )
        return result, (first, *rest)

    return optax.GradientTransformationExtraArgs(init, update)


class _Tree(NamedTuple):
    """A tree of parameters as the core sees it: a list of real leaves, in blocks."""

    treedef: Any
    names: list[str]
    given: list[Any]
    """The leaves as the user has them."""
    leaves: list[Any]
    blocks: adapter.Blocks | None

    @classmethod
    def of(cls, params: optax.Params, blocks: adapter.BlockSpec) -> _Tree:
        """Flatten parameters; without any, as in a tree of placeholders, there are no blocks."""
        paths, treedef = jax.tree_util.tree_flatten_with_path(params)
        names = path_names([path for path, _ in paths])
        for name, (_, leaf) in zip(names, paths, strict=True):
            dtype = dtype_name(leaf) if hasattr(leaf, "dtype") else type(leaf).__name__
            if dtype not in (*adapter.LEAF_DTYPES, *_COMPLEX):
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
            A tree of another structure.
        """
        try:
            return self.treedef.flatten_up_to(updates)
        except (TypeError, ValueError) as error:
            rule = "must be a tree like that of `params`, with None for a parameter without a gradient"
            msg = f"`updates` {rule}, got {jax.tree.structure(updates)} for {self.treedef}"
            raise ValueError(msg) from error

    def check(self, state: MLBFGSState, grads: Sequence[Any | None], config: core.Config) -> None:
        """Raise ValueError unless the state belongs to these parameters, and gradients fit them.

        Shapes and dtypes of a state never change, so it cannot follow parameters whose shape or dtype has.
        """
        arrays = next(iter(adapter.leaf_arrays(state).values()), None)
        if arrays is not None and (held := list(named_leaves(arrays))) != self.names:
            here, there = set(self.names), set(held)
            rule = "must be the tree that `init` has seen"
            told = f"without {sorted(there - here)[:3]} and with {sorted(here - there)[:3]} in addition"
            msg = f"`params` {rule}, got one {told}"
            raise ValueError(msg)
        if self.leaves:
            check_params(self.names, self.given, self.unfolded(state), config)
        for name, given, leaf, grad in zip(self.names, self.given, self.leaves, grads, strict=True):
            if grad is None:
                continue
            real = as_real(grad)
            if real.shape != leaf.shape or not jnp.issubdtype(real.dtype, jnp.floating):
                msg = f"`updates` must be like the parameter, {_kind(given)}, at {name!r}, got {_kind(grad)}"
                raise ValueError(msg)

    def folded(self, state: core.State) -> MLBFGSState:
        """The state with trees in place of tuples."""
        count = self.treedef.num_leaves
        return MLBFGSState(*map_leaf_arrays(lambda arrays: self.treedef.unflatten(arrays[:count]), state))

    def unfolded(self, state: MLBFGSState) -> core.State:
        """The state with tuples in place of trees."""
        return core.State(*map_leaf_arrays(lambda tree: tuple(self.treedef.flatten_up_to(tree)), state))


def map_leaf_arrays(function: Callable[[Any], Any], state: Any, *others: Any) -> Any:
    """The state with `function` applied to all leaves' arrays of each kind, with those of other states."""
    found = [adapter.leaf_arrays(own) for own in (state, *others)]
    arrays = {name: function(*(own[name] for own in found)) for name in found[0]}
    own = {name: arrays.pop(name) for name in state.preconditioner}
    return state._replace(**arrays, preconditioner=own)


def path_names(paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """Keys joined by dots; without the attribute `value` of a variable, which NNX shows to `init` only."""
    children = Counter(path[:-1] for path in paths)
    boxed = jax.tree_util.GetAttrKey("value")
    plain = [path[:-1] if path[-1:] == (boxed,) and children[path[:-1]] == 1 else path for path in paths]
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path in plain]


def check_params(names: Sequence[str], params: Sequence[Any], state: core.State, config: core.Config) -> None:
    """Raise ValueError unless parameters are like those whose averages a state holds."""
    held = adapter.leaf_arrays(state)
    for entry in adapter.layout(config, list(map(as_real, params)), ()):
        if entry.leaf is None or entry.kind == "history":
            continue
        if entry.name not in held:
            msg = f"`state` must be of these settings, got one without {entry.name!r}"
            raise ValueError(msg)
        found = held[entry.name][entry.leaf]
        if (tuple(found.shape), dtype_name(found)) != (entry.shape, entry.dtype):
            rule = (
                f"must be as `init` has seen them, with averages in {_kind(found)} at {names[entry.leaf]!r}"
            )
            told = f"{_kind(params[entry.leaf])} (a state cannot change: `init` makes a new one)"
            msg = f"`params` {rule}, got {told}"
            raise ValueError(msg)


def named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by their names."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return dict(zip(path_names([path for path, _ in paths]), (leaf for _, leaf in paths), strict=True))


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


def _if(predicate: Any, part: Callable[[Any], Any], operand: Any) -> Any:
    """Decide on the device."""
    return lax.cond(predicate, part, lambda same: same, operand)


def as_real(leaf: Any) -> Any:
    """A leaf as an array of JAX (unless it is abstract), a complex one as pairs of reals."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        dtype = _COMPLEX.get(dtype_name(leaf))
        return leaf if dtype is None else jax.ShapeDtypeStruct((*leaf.shape, 2), dtype)
    leaf = jnp.asarray(leaf)
    return leaf if dtype_name(leaf) not in _COMPLEX else jnp.stack([jnp.real(leaf), jnp.imag(leaf)], axis=-1)


def from_real(values: Any, leaf: Any) -> Any:
    """The inverse of `as_real`, in the dtype of a leaf."""
    return _paired(values, leaf).astype(leaf.dtype)


def _paired(values: Any, leaf: Any) -> Any:
    """Pairs of reals as complex values where a leaf is complex."""
    if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return values
    return lax.complex(values[..., 0], values[..., 1])


def _kind(leaf: Any) -> str:
    return f"{dtype_name(leaf)} of shape {tuple(leaf.shape)}"


def _widened(tree: Any) -> Any:
    """Leaves of half precision in float32."""

    def widened(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or dtype_name(leaf) not in ("float16", "bfloat16"):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, accumulation_dtype(leaf))
        return jnp.astype(leaf, accumulation_dtype(leaf))

    return jax.tree.map(widened, tree)
