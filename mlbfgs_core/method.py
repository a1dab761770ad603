"""`Method`: the verbs of mL-BFGS over a state, together with the settings and kernels that they use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from . import bases, history, observation
from .blocks import Blocks, one_block, validate_blocks
from .call import Call, Reduce, When, identity, run_if, stack
from .config import Config
from .direction import direction, scaled
from .kernels import Kernels
from .observation import Observation
from .preconditioner import FactorSums, is_basis_step, preconditioner_of
from .scales import is_scaled
from .schedule import Upcoming, is_check, is_due, next_pair
from .state import (
    LEAF_DTYPES,
    Matrices,
    State,
    accumulation_dtype,
    dtype_name,
    has_rows,
    init,
    leaf_count,
    leaf_shapes,
)
from .window import turn_window

__all__ = ["Method"]

Array = Any


@dataclass(frozen=True)
class Method:
    """mL-BFGS with given settings, for leaves in given blocks.

    Parameters
    ----------
    config : Config
    blocks : tuple of tuples of int, optional
        For each block the indices of its leaves, from `partition`; by default one block of all leaves.
    kernels : Kernels, optional
        The operations on parameter-sized arrays; by default plain array-API ones.
    reduce : callable, optional
        Sums an array of coefficients over all shards; by default the identity. It is called once in a
        step, once more with a preconditioner or a missing gradient, twice at a check or a refresh, which
        share the inner products of the pair, and once more at a refresh.
    shares : sequence of float, optional
        For each leaf the part of its inner products that this shard adds, by default 1. If several shards
        hold copies of a leaf, their shares sum to 1: for instance, 1 on one of them and 0 on the others.
    matrices : sequence of Matrix or None, optional
        For each leaf how its values form matrices, which a Kronecker preconditioner needs when the state is
        made; by default the first axis are rows and all others columns. See `adapter.matrices_in`.
    factor_sums : sequence of (callable or None, callable or None), optional
        For each leaf that holds a block of larger matrices: what adds up its left factor, and its right one,
        over the shards that hold other parts of the same rows, or of the same columns. It is called when
        bases are formed and turned, and returns a new array.

    Raises
    ------
    ValueError, TypeError
        From each method: leaves that do not match the state, before anything has changed.

    Notes
    -----
    Methods are pure functions of a state, which they consume unless they say otherwise: use the state that is
    returned. They may be called in a compiled function, and one `Method` may serve any number of states.

    References
    ----------
    Niu et al. 2023, Algorithm 1.

    Examples
    --------
    Gradient descent turns into a quasi-Newton method on ``f(x) = x.A x / 2``.

    >>> import numpy as np
    >>> method, x = Method(Config(preset="lbfgs")), np.asarray([1.0, 1.0])
    >>> state = method.init([x])
    >>> for _ in range(4):
    ...     update, state = method.step(state, [x], [np.asarray([1.0, 3.0]) * x])
    ...     x = x - 0.5 * update[0]
    >>> int(state.pairs[0])
    3
    """

    config: Config
    blocks: Blocks | None = None
    kernels: Kernels | None = None
    reduce: Reduce | None = None
    shares: Sequence[float] | None = None
    matrices: Matrices | None = None
    factor_sums: Sequence[FactorSums | None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, Config):
            msg = f"`config` must be a Config, got {type(self.config).__name__}"
            raise TypeError(msg)
        if self.blocks is not None:
            validate_blocks(self.blocks, sum(len(block) for block in self.blocks))

    def init(self, leaves: Sequence[Array], xp: Any = None) -> State:
        """The state before the first step.

        Parameters
        ----------
        leaves : sequence of arrays
            Parameters, or anything with a `shape` and a `dtype` (such as ``jax.ShapeDtypeStruct``):
            float16, bfloat16, float32 or float64.
        xp : array namespace, optional
            By default that of the kernels, or of the leaves; must be given for abstract leaves.

        Returns
        -------
        State
            On the leaves' device. Averages are float32 (float64 for float64 leaves), counters int32.

        Raises
        ------
        TypeError
            A leaf that is not of a real floating-point dtype.
        ValueError
            No leaves, leaves on several devices (give each device its own state), blocks that are no
            partition of them, or a namespace without the history's dtype.

        Notes
        -----
        Allocates ``plan_memory(config, leaves, blocks).total`` bytes.

        Examples
        --------
        >>> import numpy as np
        >>> Method(Config(history_size=3)).init([np.zeros((4, 2))]).history[0].shape
        (2, 3, 4, 2)
        """
        return init(self.config, leaves, self.blocks, xp, kernels=self.kernels, matrices=self.matrices)

    def project(
        self,
        state: State,
        params: Sequence[Array],
        grads: Sequence[Array | None],
        *,
        when_scaled: When = None,
        when_formed: When = None,
        when_rows: bool | None = None,
    ) -> Observation:
        """Everything a step must know about its gradient before it may write: one pass, one reduction.

        Parameters
        ----------
        state : State
            Not consumed.
        params, grads : sequence of arrays
            One per leaf; a gradient may be None.
        when_scaled, when_formed, when_rows : optional
            As in `step`.

        Returns
        -------
        Observation
            A gradient whose square overflows counts as non-finite: in float32 one with a norm of 1.8e19,
            if the run's first gradient was ordinary (`State.grad_scale` is 1).

        Notes
        -----
        Reads ``2 m + 1`` values per parameter, one more for the diagonal preconditioner, one for an adaptive
        schedule and three for ``step_length="clip"``; reduces the same count of numbers for each block.

        Examples
        --------
        >>> import numpy as np
        >>> method, x = Method(Config(preset="lbfgs")), np.asarray([1.0, 2.0])
        >>> method.project(method.init([x]), [x], [3 * x]).grad_square
        array([45.])
        """
        call = self._call(state, params=params, grads=grads)
        return observation.project(
            call,
            state,
            params,
            grads,
            when_scaled=when_scaled,
            when_formed=when_formed,
            when_rows=when_rows,
        )

    def observe(
        self,
        state: State,
        params: Sequence[Array],
        grads: Sequence[Array | None],
        *,
        observed: Observation | None = None,
        when: When = None,
    ) -> State:
        """Add parameters and gradients to the averages; at a check, ask whether a pair is due.

        Parameters
        ----------
        state : State
        params, grads : sequence of arrays
            `theta` and the gradient at `theta`, both from before the update; a gradient may be None.
        observed : Observation, optional
            What `project` returned for the same arguments; by default `project` is called here.
        when : None, bool or callable
            What decides whether the check runs; see `step`.

        Returns
        -------
        State
            ``state.due`` tells whether this step's `refresh` takes a pair, ``state.accepted`` whether the
            gradient was finite; if it was not, nothing else changes except the counter `skipped`.

        Notes
        -----
        Reads 4 and writes 2 values per parameter (with the diagonal preconditioner 6 and 3); a check reads 4
        to 5 more.

        References
        ----------
        Niu et al. 2023, Algorithm 1, the momentum updates ``M <- beta M + (1 - beta) x``. Difference
        from the paper: with ``beta=None`` the plain mean over the window.

        Examples
        --------
        >>> import numpy as np
        >>> method, x = Method(Config(preset="lbfgs")), np.asarray([1.0, 2.0])
        >>> state = method.observe(method.init([x]), [x], [3 * x])
        >>> bool(state.due), state.mean_grads[0]
        (True, array([3., 6.]))
        """
        call = self._call(state, params=params, grads=grads)
        if observed is None:
            observed = observation.project(call, state, params, grads)
        state, seen = observation.observe(call, state, params, observed)
        return next_pair(call, state, seen.roots, when)[0] if self.config.is_adaptive else state

    def refresh(self, state: State, due: Array | bool) -> State:
        """Take the pair of this window and the previous one, and form the new inverse Hessian.

        Parameters
        ----------
        state : State
            The state that `observe` returned.
        due : bool or 0-d bool array
            Where false, the state stays as it is; ``state.due`` is what the schedule asks for.

        Returns
        -------
        State
            With the window closed. A pair without usable curvature is counted instead of stored.

        Notes
        -----
        Reads ``2 m`` values per parameter, and moves about 22 more: inner products, the new row, the
        exchange of averages. Reduces three times, ``B * (4 m + 7)`` numbers in all. Without pairs
        (``history_size=0``) the state stays as it is.

        References
        ----------
        Niu et al. 2023, Algorithm 1: ``s = M_theta(t) - M_theta(t')``, ``y = M_g(t) - M_g(t')``, damping,
        push. Difference from the paper: both members are divided by ``|s|``, which leaves `H` as it is.

        Examples
        --------
        >>> import numpy as np
        >>> method, x = Method(Config(preset="lbfgs")), np.asarray([1.0, 2.0])
        >>> state = method.init([x])
        >>> for point in (x, 2 * x):
        ...     state = method.observe(state, [point], [3 * point])
        ...     state = method.refresh(state, state.due)
        >>> state.mu
        array([3.])
        """
        if not self.config.takes_pairs:
            return state
        call = self._call(state)
        due = call.xp.ones_like(state.due) & due
        return turn_window(call, history.refresh(call, state, None, None, due)[0], due)

    def direction(
        self, state: State, grads: Sequence[Array | None], params: Sequence[Array] | None = None
    ) -> tuple[list[Array | None], State]:
        """The direction ``H g`` for any gradient, with the length that the settings ask for.

        Parameters
        ----------
        state : State
        grads : sequence of arrays
            One per leaf, or None.
        params : sequence of arrays, optional
            Needed with ``step_length="clip"``, whose first lengths are relative to their norm.

        Returns
        -------
        update : list of arrays
        state : State

        Notes
        -----
        ``H = R^T (gamma I + B^T C B) R``: reads the history twice. The figures of `d` come from
        coefficients: ``d.g = gamma |z|^2 + b.c``, and without a preconditioner
        ``|d|^2 = gamma^2 |g|^2 + 2 gamma b.c + c.G c``.

        References
        ----------
        Byrd, Nocedal & Schnabel 1994 for the compact form. Difference from the paper: its steps have no
        length control (``step_length="none"``).

        Examples
        --------
        >>> import numpy as np
        >>> method = Method(Config(step_length="unit", preconditioner="none"))
        >>> x = np.asarray([3.0, 4.0])
        >>> method.direction(method.init([x]), [x])[0][0]
        array([0.6, 0.8])
        """
        call = self._call(state, params=params, grads=grads)
        seen = observation.project(call, state, params, grads, observed=True)
        update, factor, state = direction(call, state, seen)
        return scaled(call, grads, update, factor), state

    def step(
        self,
        state: State,
        params: Sequence[Array],
        grads: Sequence[Array | None],
        *,
        when_check: When = None,
        when_due: When = None,
        when_scaled: When = None,
        when_formed: When = None,
        when_turned: When = None,
        when_rows: bool | None = None,
        observed: Observation | None = None,
    ) -> tuple[list[Array | None], State]:
        """One step: project, observe, refresh if due, direction; the history is read twice.

        Parameters
        ----------
        state : State
        params : sequence of arrays
            The leaves given to `init`, with their present values.
        grads : sequence of arrays
            The gradient at `params`, of the same shapes and dtypes. None where there is none: that leaf
            does not move.
        when_check, when_due : None, bool or callable
            What decides whether the check or the refresh runs. None: both always run, and what is not
            asked for is masked. A bool: the caller knows, for instance from `upcoming`. A function
            ``(predicate, part, operand) -> result``, such as a wrapper of ``jax.lax.cond``. A part that
            runs unasked changes nothing; one that is asked for must run.
        when_scaled : None, bool or callable
            The same for the gradients' scale, which the very first gradient determines; see
            `mlbfgs_core.adapter.is_scaled`. With None each step reads the gradient once more, and unless
            this is False it also multiplies it (which a compiler fuses).
        when_formed, when_turned : None, bool or callable
            The same for the bases of a Kronecker preconditioner: formed before the first step, by
            eigenvectors, and turned after later ones. With None both happen at each step, which is slow. A
            run whose bases are never formed starts from the parameters' own coordinates.
        when_rows : None or bool
            False: the caller knows that no stored pair says anything, so they are not read. This saves the
            two passes over the history as long as there is no pair, or noise has drowned all of them.
        observed : Observation, optional
            What `project` returned for the same arguments, which are then not checked again; a caller with
            several states may replace its `finite` by whether all of them are finite.

        Returns
        -------
        update : list of arrays
            `d`, of the gradients' shapes and dtypes, to be *subtracted*; None where the gradient is
            None; zero on a skipped step.
        state : State
            ``state.accepted`` and ``state.due`` are false where the gradient was non-finite: everything else
            except the counter `skipped` is then as it was.

        Notes
        -----
        Moves ``4 m`` values per parameter for the two passes over the history and, with default
        settings, about 18 more (9 without preconditioner and adaptive schedule). A refresh adds about
        ``2 m + 22``.
        """
        update, factor, state = self.unscaled_step(
            state,
            params,
            grads,
            when_check=when_check,
            when_due=when_due,
            when_scaled=when_scaled,
            when_formed=when_formed,
            when_turned=when_turned,
            when_rows=when_rows,
            observed=observed,
        )
        return scaled(self._call(state), grads, update, factor), state

    def unscaled_step(
        self,
        state: State,
        params: Sequence[Array],
        grads: Sequence[Array | None],
        *,
        when_check: When = None,
        when_due: When = None,
        when_scaled: When = None,
        when_formed: When = None,
        when_turned: When = None,
        when_rows: bool | None = None,
        observed: Observation | None = None,
    ) -> tuple[list[Array | None], Array, State]:
        """`step` for a caller that multiplies the update by a factor anyway, as `Kernels.apply` does.

        Parameters
        ----------
        state, params, grads, when_check, when_due, when_scaled, when_formed, when_turned, when_rows, observed
            As in `step`.

        Returns
        -------
        update : list of arrays
            In the accumulation dtype; None where the gradient is None.
        factor : array
            0-d: ``update * factor`` is what `step` returns; zero on a skipped step.
        state : State

        Notes
        -----
        Moves 2 values per parameter less than `step`.

        Examples
        --------
        >>> import numpy as np
        >>> method, x = Method(Config()), np.asarray([3.0, 4.0])
        >>> update, factor, _ = method.unscaled_step(method.init([x]), [x], [x])
        >>> round(float(np.sqrt(np.mean((update[0] * factor) ** 2))), 6)
        1.0
        """
        if observed is None:
            observed = self.project(
                state,
                params,
                grads,
                when_scaled=when_scaled,
                when_formed=when_formed,
                when_rows=when_rows,
            )
        call = self._call(state)
        state, seen = observation.observe(call, state, params, observed)
        rows = seen.rows
        if self.config.takes_pairs:
            state, pair = next_pair(call, state, seen.roots, when_check, when_due)
            due = state.due

            def part(operand: tuple[State, Array]) -> tuple[State, Array | None]:
                return history.refresh(call, operand[0], seen, pair, due)

            state, rows = run_if(when_due, due, part, (state, rows))
            state = turn_window(call, state, due) if when_due is not False else state
            if when_due is not False:  # the new pair may say something
                when_rows = None
        update, factor, state = direction(call, state, seen._replace(rows=rows), when_rows)
        # The rows that are turned have been read by the direction.
        accepted = call.kernels.after(state.accepted, factor)
        return update, factor, bases.turn(call, state, accepted, when_turned, when_rows)

    def turn_bases(self, state: State) -> State:
        """Give a Kronecker preconditioner new bases where the schedule asks for them, which `step` does at
        its end; for those who call the other verbs one by one.

        Parameters
        ----------
        state : State
            After an accepted gradient.

        Returns
        -------
        State
            The stored pairs are turned along, so that the inverse Hessian's middle `H'` stays what it is.

        Notes
        -----
        For matrices of a x b about ``8 (a^3 + b^3)`` operations, and ``4 m a b (a + b)`` for the pairs.

        References
        ----------
        Vyas et al. 2024 (SOAP), Algorithm 4.
        """
        return bases.turn(self._call(state), state, state.accepted, None)

    def upcoming(self, state: State) -> Array:
        """What the next accepted step is to do: (6,) array of bool, in the order of `adapter.Upcoming`.

        A host that copies it without waiting can hand each of them to the next `step`, as `when_check` and so
        on: it depends only on steps that are already done.
        """
        config, xp, window = self.config, array_namespace(state.window), state.window + 1
        step, matrices = state.step + 1, preconditioner_of(config).has_matrices
        flags = Upcoming(
            check=is_check(config, window, state),
            due=is_due(config, window, state),
            formed=(step == 1) & matrices,
            turned=is_basis_step(config, step) & matrices,
            scaled=is_scaled(state, xp),
            rows=xp.any(has_rows(state, xp)),
        )
        return stack(flags, xp)

    def _call(self, state: State, **leaves: Sequence[Array | None] | None) -> Call:
        """What the parts of a step work with, after the arguments have been checked."""
        count = leaf_count(state)
        blocks = one_block(count) if self.blocks is None else self.blocks
        if len(blocks) != state.gamma.shape[0]:
            msg = f"`blocks` must be the state's {state.gamma.shape[0]} blocks, got {len(blocks)}"
            raise ValueError(msg)
        if leaves:
            validate_blocks(blocks, count)
            if self.shares is not None and len(self.shares) != count:
                msg = f"`shares` must hold a number for each of {count} leaves, got {len(self.shares)}"
                raise ValueError(msg)
            _check_leaves(state, leaves.get("params"), leaves["grads"])
        xp = array_namespace(state.gamma) if self.kernels is None else self.kernels.xp
        kernels = Kernels(xp) if self.kernels is None else self.kernels
        return Call(
            self.config,
            blocks,
            kernels,
            self.reduce or identity,
            self.shares,
            xp,
            state.gamma.dtype,
            self.factor_sums,
        )


def _check_leaves(state: State, params: Any, grads: Any) -> None:
    """Raise ValueError or TypeError unless parameters and gradients fit the state's leaves."""
    count = leaf_count(state)
    shapes = leaf_shapes(state)
    for name, arrays in (("params", params), ("grads", grads)):
        if arrays is None:
            continue
        if len(arrays) != count:
            msg = f"`{name}` must hold {count} leaves, got {len(arrays)}"
            raise ValueError(msg)
        for index, (array, shape) in enumerate(zip(arrays, shapes, strict=True)):
            if array is None:
                if name == "params":
                    msg = f"`params`[{index}] must be an array, got None"
                    raise TypeError(msg)
                continue
            if shape is not None and tuple(array.shape) != shape:
                msg = f"`{name}`[{index}] must have the shape {shape}, got {tuple(array.shape)}"
                raise ValueError(msg)
            if dtype_name(array) not in LEAF_DTYPES:
                msg = f"`{name}`[{index}] must be of a real floating-point dtype, got {array.dtype}"
                raise TypeError(msg)
    if all(grad is None for grad in grads):
        msg = "`grads` must hold at least one array, got only None"
        raise ValueError(msg)
    for index, (param, grad) in enumerate(zip(params or (), grads, strict=False)):
        if grad is None:
            continue
        own, wider = dtype_name(param), accumulation_dtype(param)
        if tuple(param.shape) != tuple(grad.shape):
            msg = f"`grads`[{index}] must have the shape {tuple(param.shape)}, got {tuple(grad.shape)}"
            raise ValueError(msg)
        if dtype_name(grad) not in (own, wider):
            rule = f"must have the parameter's dtype {own}"
            rule += "" if wider == own else f" or {wider}"
            msg = f"`grads`[{index}] {rule}, got {dtype_name(grad)}"
            raise TypeError(msg)
