"""One core state over the parameters in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import LEAF_COUNTS, OF_MATRICES, Blocks, pack

from .arguments import check_writable
from .backends import Backend, CudaFlags, HostFlags, as_numpy
from .layout import Array, Leaf, Member, real

__all__ = ["Unit", "Work"]


class Work(NamedTuple):
    """A step of a unit between its two halves."""

    params: list[Array]
    grads: list[Array | None]
    seen: adapter.Observation
    asked: adapter.Upcoming


class Unit:
    """The core's state, and the momentum, of parameters in one place.

    Attributes
    ----------
    backend : Host or Cuda
    members : tuple of Member
        The parameters with their names and layouts.
    blocks : tuple of tuples of int
        Indices of members.
    """

    _method: core.Method

    def __init__(self, backend: Backend, config: core.Config, members: Sequence[Member], blocks: Blocks):
        self.backend = backend
        self.members = tuple(members)
        self.blocks = blocks
        self._config = config
        self._momentum: list[Array] | None = None
        self._flags: HostFlags | CudaFlags | None = None
        self._sent = False
        self.accepted: bool | None = None
        """Whether the last gradient whose verdict the host knows was finite; None if none is known."""
        self._lay(self._packed([member.kind for member in members]))
        with backend.on():
            self._state = self._method.init([leaf.like() for leaf in self._leaves])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(member.name for member in self.members)

    @property
    def params(self) -> tuple[Array, ...]:
        """The parameters."""
        return tuple(member.array for member in self.members)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Indices of the members that lie side by side in one leaf of the core."""
        return [leaf.indices for leaf in self._leaves]

    @property
    def config(self) -> core.Config:
        """The settings; new ones hold from the next step on."""
        return self._config

    @config.setter
    def config(self, config: core.Config) -> None:
        self._config = config
        self._method = replace(self._method, config=config)
        self._sent = False

    def check(self, *, writes: bool) -> None:
        """Raise ValueError where a parameter is no longer what it was when it was given, or where it
        `writes` to one that has been made read-only."""
        for member in self.members:
            member.check()
            if writes:
                check_writable(member.name, member.array)

    def diagnostics(self) -> core.Diagnostics:
        """Figures of the last step."""
        with self.backend.on():
            return core.diagnostics(self._state)

    def constant(self, value: bool) -> Array:
        """A 0-d array in the place of the parameters."""
        with self.backend.on():
            return self.backend.xp.full((), value, dtype=self.backend.xp.bool)

    def remember_momentum(self) -> None:
        """Allocate the momentum's buffers, unless they are there."""
        if self._momentum is None:
            xp, likes = self.backend.xp, [leaf.like() for leaf in self._leaves]
            with self.backend.on():
                self._momentum = [
                    xp.zeros(like.shape, dtype=getattr(xp, adapter.accumulation_dtype(like)))
                    for like in likes
                ]

    def project(self, grads: Sequence[Array | None], maximize: bool) -> Work:
        """The first half of a step, which changes nothing."""
        self._split([grad is None for grad in grads])
        with self.backend.on():
            params = [leaf.params() for leaf in self._leaves]
            given = [_gathered(leaf, grads, maximize) for leaf in self._leaves]
            asked = self._asked()
            seen = self._method.project(
                self._state,
                params,
                given,
                when_scaled=asked.scaled,
                when_formed=asked.formed,
                when_rows=asked.rows,
            )
        return Work(params, given, seen, asked)

    def advance(
        self, work: Work, finite: Array, lr: Any, momentum: float, weight_decay: float, nesterov: bool
    ) -> None:
        """The second half of a step, without effect where `finite` (0-d) is false."""
        kernels = self.backend.kernels
        with self.backend.on():
            updates, factor, self._state = self._method.unscaled_step(
                self._state,
                work.params,
                work.grads,
                when_check=work.asked.check,
                when_due=work.asked.due,
                when_turned=work.asked.turned,
                when_rows=work.asked.rows,
                observed=work.seen._replace(finite=finite),
            )
            self._ask()
            if self._flags.at_once:
                self.accepted = bool(self._state.accepted)
            for index, (leaf, param, update) in enumerate(
                zip(self._leaves, work.params, updates, strict=True)
            ):
                if update is None:
                    continue
                length, rate = kernels.to_leaf(factor, update.dtype), self.backend.rate(lr, update.dtype)
                buffer = None if self._momentum is None else self._momentum[index]
                end = adapter.StepEnd(length, rate, momentum, weight_decay, nesterov)
                kernels.apply(param, update, buffer, end, finite)
                if not leaf.is_view:
                    leaf.write(param)

    def export(self) -> tuple[core.State, list[Array] | None]:
        """The state and the momentum with one leaf for each parameter, in the order of its axes.

        Returns
        -------
        state : State
            A complex parameter has a last axis of 2. Arrays are views of this unit's own; None where a
            parameter has none of the kind.
        momentum : list of arrays or None
            One buffer for each parameter; None where there is no momentum.
        """
        place = {index: number for number, leaf in enumerate(self._leaves) for index in leaf.indices}
        with self.backend.on():
            state = self._moved(self._state, self._spread, [place[i] for i in range(len(place))])
        return state, None if self._momentum is None else list(self._spread(self._momentum))

    def restore(
        self,
        state: core.State,
        momentum: Sequence[Array] | None,
        groups: Sequence[tuple[int, ...]] | None = None,
    ) -> None:
        """Continue from what `export` gave, of a unit with the same parameters, blocks and settings.

        Parameters
        ----------
        state, momentum
            Arrays of NumPy or CuPy, which are copied.
        groups : sequence of tuples of int, optional
            That unit's `groups`; by default parameters that have been observed equally often lie together.
        """
        backend = self.backend
        with backend.on():
            if groups is None:
                counts = zip(*(getattr(state, name).tolist() for name in LEAF_COUNTS), strict=True)
                kinds = [(m.kind, own) for m, own in zip(self.members, counts, strict=True)]
                groups = self._packed(kinds)
            self._lay(groups)
            numbers = {name: backend.asarray(x).copy() for name, x in adapter.coefficients(state).items()}
            first = [leaf.indices[0] for leaf in self._leaves]
            self._state = self._moved(state._replace(**numbers), self._gathered, first)
            self._momentum = None if momentum is None else list(self._gathered(momentum))
        self._sent = False

    def snapshot(self) -> core.Snapshot:
        """The parameters and what is remembered of them, on the host; views if they lie there already."""

        with self.backend.on():
            state, momentum = self.export()
            arrays = {
                name: tuple(None if array is None else as_numpy(array) for array in own)
                for name, own in adapter.leaf_arrays(state).items()
            }
            numbers = {name: as_numpy(x) for name, x in adapter.coefficients(state).items()}
            return core.Snapshot(
                names=self.names,
                blocks=self.blocks,
                state=adapter.with_leaf_arrays(state, arrays)._replace(**numbers),
                params=tuple(as_numpy(real(member.array)) for member in self.members),
                momentum=(None,) * len(self.members) if momentum is None else tuple(map(as_numpy, momentum)),
            )

    def resume(self, snapshot: core.Snapshot) -> None:
        """Continue from a `snapshot` of the same names, blocks, shapes and dtypes, in this order."""
        momentum = None
        if self._momentum is not None:
            momentum = [
                np.zeros(param.shape, adapter.accumulation_dtype(param)) if buffer is None else buffer
                for buffer, param in zip(snapshot.momentum, snapshot.params, strict=True)
            ]
        self.restore(snapshot.state, momentum)
        with self.backend.on():
            for member, value in zip(self.members, snapshot.params, strict=True):
                real(member.array)[...] = self.backend.asarray(value)

    def _packed(self, kinds: Sequence[Any]) -> list[tuple[int, ...]]:
        """Groups of members for the leaves: small ones of a kind lie together."""
        sizes = [member.size for member in self.members]
        own = [None if size > self.backend.small else kind for size, kind in zip(sizes, kinds, strict=True)]
        return pack(sizes, own, self.blocks)[0]

    def _lay(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Form a leaf from each group, and the method for the blocks of leaves."""
        block_of = {index: number for number, block in enumerate(self.blocks) for index in block}
        self._leaves = [Leaf(self.members, group) for group in groups]
        numbers = [block_of[group[0]] for group in groups]
        blocks = tuple(
            tuple(i for i, own in enumerate(numbers) if own == number) for number in range(len(self.blocks))
        )
        matrices = [leaf.matrix for leaf in self._leaves]
        self._method = core.Method(self._config, blocks, self.backend.kernels, matrices=matrices)

    def _split(self, missing: Sequence[bool]) -> None:
        """Separate members with a gradient from those without, in leaves that hold both."""
        parts = [_parted(leaf.indices, missing) for leaf in self._leaves]
        if all(len(groups) == 1 for groups in parts):
            return
        xp, leaves = self.backend.xp, self._leaves

        def divided(arrays: Sequence[Array | None], *, stacks: bool = False) -> list[Array | None]:
            result: list[Array | None] = []
            for leaf, array, groups in zip(leaves, arrays, parts, strict=True):
                if array is None or len(groups) == 1:
                    result += [array] * len(groups)
                    continue
                own = dict(zip(leaf.indices, leaf.stacks(array) if stacks else leaf.cut(array), strict=True))
                axis = 0 if stacks else -1
                result += [xp.concat([own[i] for i in group], axis=axis) for group in groups]
            return result

        with self.backend.on():
            repeated = [number for number, groups in enumerate(parts) for _ in groups]
            self._state = self._moved(self._state, divided, repeated)
            if self._momentum is not None:
                self._momentum = divided(self._momentum)
        self._lay([tuple(group) for groups in parts for group in groups])

    def _moved(
        self, state: core.State, function: Callable[..., Sequence[Array | None]], source: Sequence[int]
    ) -> core.State:
        """A state of other leaves: `function` makes its arrays from those of all leaves, which may be
        `stacks` of square matrices, and `source` gives the leaf from which each count comes."""
        arrays = {
            name: tuple(function(own, stacks=name in OF_MATRICES))
            for name, own in adapter.leaf_arrays(state).items()
        }
        counts = {}
        for name in LEAF_COUNTS:
            own = getattr(state, name)
            counts[name] = self.backend.xp.stack([own[number, ...] for number in source])
        return adapter.with_leaf_arrays(state, arrays)._replace(**counts)

    def _spread(self, arrays: Sequence[Array | None], *, stacks: bool = False) -> tuple[Array | None, ...]:
        """One array per leaf as one per member; None where a leaf has none."""
        own: dict[int, Array | None] = {}
        for leaf, array in zip(self._leaves, arrays, strict=True):
            parts: Sequence[Array | None] = [None] * len(leaf.indices)
            if array is not None:
                parts = leaf.stacks(array) if stacks else leaf.spread(array)
            own.update(zip(leaf.indices, parts, strict=True))
        return tuple(own[i] for i in range(len(own)))

    def _gathered(self, arrays: Sequence[Array | None], *, stacks: bool = False) -> tuple[Array | None, ...]:
        """One array per member as one per leaf, each a contiguous copy; None where members have none."""
        result: list[Array | None] = []
        for leaf in self._leaves:
            if arrays[leaf.indices[0]] is None:
                result.append(None)
                continue
            own = [self.backend.asarray(arrays[i]) for i in leaf.indices]
            result.append((leaf.stacked(own) if stacks else leaf.gather(own)).copy())
        return tuple(result)

    def _asked(self) -> adapter.Upcoming:
        """What this step is to do."""
        taken = self._sent  # else nothing is known of the step before
        if not taken:
            self._ask()
        *upcoming, accepted = self._flags.read()
        self.accepted = accepted if taken else None
        return adapter.Upcoming(*upcoming)

    def _ask(self) -> None:
        """Let the state say what the next step is to do, and whether it has accepted the last gradient."""
        flags = self.backend.xp.concat([self._method.upcoming(self._state), self._state.accepted[None]])
        if self._flags is None:
            self._flags = self.backend.flags(flags.shape[0])
        self._flags.send(flags)
        self._sent = True


def _parted(indices: Sequence[int], missing: Sequence[bool]) -> list[list[int]]:
    groups = [[i for i in indices if missing[i] == flag] for flag in (False, True)]
    return [group for group in groups if group]


def _gathered(leaf: Leaf, grads: Sequence[Array | None], maximize: bool) -> Array | None:
    own = [grads[i] for i in leaf.indices]
    if own[0] is None:
        return None
    flat = leaf.gather(own)
    return -flat if maximize else flat
