"""`MLBFGS`: a `torch.optim.Optimizer` over the core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import SETTINGS, BlockSpec

from . import sharding
from .arguments import (
    ADDED,
    SWITCHES,
    check_entry,
    check_groups,
    check_hyperparameters,
    check_params,
    config_of,
    make_plain,
    match_names,
    of_today,
    settings_of,
    warn_of_shapes,
)
from .binding import forget_misfits
from .checkpoint import contribution, outline, restore, take, whole
from .kernels import as_tensor, quiet
from .leaves import Member, place
from .memory import check_memory
from .owners import divide, gather
from .units import Partition, Unit

__all__ = ["MLBFGS"]

_CALL = 4
"""How far the user's call is from the body of `MLBFGS.step`, which PyTorch wraps, for warnings."""


class MLBFGS(Optimizer):
    """mL-BFGS: quasi-Newton training from momentum-averaged curvature pairs.

    Parameters
    ----------
    params : iterable of tensors, named tensors or groups
        As for `torch.optim.AdamW`. A group may carry its own `lr`, `momentum`, `weight_decay`,
        `maximize` and any setting. Groups whose settings agree share blocks, pairs and step length,
        whatever their `lr`; groups with other settings stand alone.
    lr : float or tensor, optional
        Root mean square of a step's changes, before momentum, with the default ``step_length="rms"``; by
        default 1e-3, or 0.1 with another `step_length`. A group without its own `lr` takes this one.
    momentum : float, optional
        Momentum on the direction; by default the preset's: 0 for "lbfgs" and "fit", else 0.9.
    weight_decay : float
        Parameters shrink by ``lr * weight_decay`` per step, as in AdamW; see `decoupled_weight_decay`.
    blocks : {"all", "layer", "parameter"} or callable
        Which parameters share curvature; a callable maps a parameter's name to a label. Names come
        from ``model.named_parameters()``.
    matrix_axes : mapping or callable, optional
        Which axes make the matrices of ``preconditioner="kronecker"``: for a parameter's name (a callable
        gets its shape, too) how many leading axes count stacked layers, and how many of the next form the
        rows, all others forming the columns; None for a parameter without a matrix. By default (0, 1): the
        first axis against the rest, which suits linear layers and convolutions.
    nesterov : bool, optional
        Whether the momentum looks ahead (Nesterov's), as in `torch.optim.SGD`, or is heavy-ball. The
        default preset looks ahead, the others do not.
    maximize : bool
        Maximize instead of minimizing.
    decoupled_weight_decay : bool
        False adds ``weight_decay`` times the parameter to the gradient instead, as in SGD: curvature
        then includes it.
    capturable : bool
        For steps captured in a CUDA graph: the host decides nothing, so every step does the work of a
        check and of a new pair, and masks what was not asked for. Under `torch.compile` it is always so.
    shard_group : torch.distributed.ProcessGroup, optional
        The processes over which parameters are divided, if each process constructs the optimizer with
        those that it owns, as `torch.distributed.optim.ZeroRedundancyOptimizer` does. Names begin with
        the owner's rank ("rank0.param2") where none are given. Sharded parameters (`DTensor`) and
        replicated ones need no group. Owned parameters take memory from the first step on, with or
        without a gradient: leave frozen ones out.
    preset : {"default", "paper", "formulas", "lbfgs", "fit"} or None
        The values of settings that are not given; see `mlbfgs_core.Config`.
    history_size, ..., history_dtype
        The settings of the method, as `mlbfgs_core.Config` explains them.

    Raises
    ------
    ValueError, TypeError
        Settings out of range, no parameters, parameters that are not floating-point or complex, that share
        memory or are expanded views, a `DTensor` held as summands or together with a `shard_group`.

    Notes
    -----
    A step whose gradients hold a NaN or an infinity changes nothing; `diagnostics` counts it, as it does
    where `torch.amp.GradScaler` found one. A parameter without a gradient does not move. Complex
    parameters count as pairs of reals. Memory: ``(2 * history_size + 6) * 4`` bytes per float32
    parameter with default settings and momentum (`mlbfgs_core.plan_memory` gives the exact figure
    without the momentum's array), and 4 more during a step, on a CPU also between steps. No step waits
    for a GPU, except the first after loading a state or after the set of parameters with gradients has
    changed. Changing `history_size`, `history_dtype`, the blocks or a parameter's shape during a run makes it
    forget its curvature, with a warning; the state follows its parameter to another dtype or device.

    The state of a `DTensor` is sharded like it, and inner products are summed over its mesh: one all-reduce
    of ``B * (2 * history_size + 1)`` numbers and up to 2 more for each of B blocks in a step, one more of B
    numbers with a preconditioner (2 B with a `shard_group` or a missing gradient), 2 more at a check, 3 at a
    new pair. All processes must take the same steps.

    References
    ----------
    Niu et al., TMLR 2023, arXiv:2307.13744. Difference from the paper: see `mlbfgs_core.Config`;
    ``preset="paper"`` is the published method with its authors' settings.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = MLBFGS(model.parameters(), lr=1e-3)
    >>> model(torch.ones(2, 3)).square().mean().backward()
    >>> optimizer.step()
    """

    _step_supports_amp_scaling = True
    """`torch.amp.GradScaler` passes on its scale and what it found, and leaves the gradients as they are."""

    @adapter.with_preset
    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | None = None,
        momentum: float | None = None,
        weight_decay: float = 0.0,
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
        blocks: BlockSpec = "all",
        matrix_axes: adapter.MatrixAxes = None,
        nesterov: bool | None = None,
        maximize: bool = False,
        decoupled_weight_decay: bool = True,
        capturable: bool = False,
        shard_group: Any = None,
    ) -> None:
        config = core.Config(**adapter.settings_in(locals()))
        defaults: dict[str, Any] = {
            "lr": adapter.default_rate(config.step_length) if lr is None else lr,
            "momentum": adapter.preset_momentum(preset) if momentum is None else momentum,
            "weight_decay": weight_decay,
            "nesterov": adapter.preset_nesterov(preset) if nesterov is None else nesterov,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
            "capturable": capturable,
            **vars(config),
        }
        defaults |= check_hyperparameters(defaults)
        self._blocks = blocks
        self._matrix_axes = matrix_axes
        self._shard_group = shard_group
        self._forget_units()
        super().__init__(params, defaults)
        self._names: dict[Tensor, str] = {}
        if shard_group is None:
            if not any(group["params"] for group in self.param_groups):
                msg = "`params` must hold at least one parameter, got none"
                raise ValueError(msg)
            self._partitions()
        else:  # the others' parameters are not known yet
            self._members(None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; its settings are checked first.

        Parameters
        ----------
        param_group : dict
            "params", and any hyperparameter or setting. With a "preset" of its own the group takes
            none of the optimizer's settings.
        """
        adapter.check_names(param_group, ("params", "param_names", "preset", *self.defaults))
        own = {name: param_group[name] for name in SETTINGS if name in param_group}
        group = dict(param_group)
        if "preset" in group:
            preset = group.pop("preset")
            group |= vars(core.Config(preset=preset, **own))
            group.setdefault("momentum", adapter.preset_momentum(preset))
            group.setdefault("nesterov", adapter.preset_nesterov(preset))
        else:
            group |= vars(core.Config(**{**{name: self.defaults[name] for name in SETTINGS}, **own}))
        numbers = check_hyperparameters({**self.defaults, **group})
        group.update({name: number for name, number in numbers.items() if name in group})
        params = group["params"]
        if not isinstance(params, (Tensor, set)):  # the base class refuses sets
            group["params"] = params = list(params)
        check_params([params] if isinstance(params, Tensor) else params)
        super().add_param_group(group)
        if hasattr(self, "_names"):  # the constructor checks all groups at once
            try:
                check_memory([(name, param) for name, param, _ in self._named()])
            except ValueError:
                self.param_groups.pop()
                raise
        self._forget_units()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model and returns the loss, once.

        Returns
        -------
        The closure's loss, or None.

        Raises
        ------
        RuntimeError
            A sparse gradient; a CUDA graph's capture without ``capturable=True``.
        TypeError, ValueError
            A gradient of another dtype or shape; parameters that have come to share memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._init_group()
        scale = getattr(self, "grad_scale", None)
        work = [(unit, unit.params(), unit.grads(scale)) for unit in self._units]
        work = [entry for entry in work if any(grad is not None for grad in entry[2])]
        with quiet():
            calls = [unit.call() for unit, _, _ in work]
            flags = [unit.asked(state) for (unit, _, _), (state, _) in zip(work, calls, strict=True)]
            seen = [
                method.project(
                    state,
                    params,
                    grads,
                    when_scaled=asked.scaled,
                    when_formed=asked.formed,
                    when_rows=asked.rows,
                )
                for (_, params, grads), (state, method), asked in zip(work, calls, flags, strict=True)
            ]
            resting = False
            for (unit, params, grads), (before, method), asked, own in zip(
                work, calls, flags, seen, strict=True
            ):
                finite, idle = self._verdict(seen, own.finite)
                observed = own._replace(finite=finite)
                update, factor, state = method.unscaled_step(
                    before,
                    params,
                    grads,
                    when_check=asked.check,
                    when_due=asked.due,
                    when_turned=asked.turned,
                    when_rows=asked.rows,
                    observed=observed,
                )
                if idle is not None:
                    resting = resting or (not isinstance(idle, Tensor) and bool(idle))
                    xp = method.kernels.xp
                    state = state._replace(
                        skipped=xp.where(idle, before.skipped, state.skipped),
                        accepted=xp.where(idle, before.accepted, state.accepted),
                    )
                unit.remember(state)
                unit.apply(params, update, factor, finite)
        if not resting:
            self._watch.see((unit.accepted for unit, _, _ in work), stacklevel=_CALL)
        return loss

    def diagnostics(self) -> list[core.Diagnostics]:
        """Figures of the last step, one record for each set of groups with common settings.

        The tensors in them are the optimizer's own; reading a value waits for the device. Before the first
        step they are those of a run that has learned nothing yet.
        """
        self._init_group()
        if not self._units and self._shard_group is None:
            return [core.diagnostics(part.fresh()) for part in self._partitions()]
        return [core.diagnostics(unit.state) for unit in self._units]

    def block_names(self) -> list[tuple[str, ...]]:
        """A short name for each block of each record in `diagnostics`, from the parameters' names."""
        self._init_group()
        parts = [unit.part for unit in self._units]
        if not parts and self._shard_group is None:
            parts = self._partitions()
        return [adapter.block_names([m.name for m in part.members], part.blocks) for part in parts]

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """The state, as `torch.optim.Optimizer` gives it.

        Notes
        -----
        Tensors are the optimizer's own, except those that share their memory with others or lie in another
        order, which are copied: the history of small parameters, and every tensor of small shards and of
        channels-last parameters.
        """
        for group in self.param_groups:
            make_plain(group)
        self._named()
        members = [member for unit in self._units for member in unit.part.members]
        # Other owners cannot be asked here, since they need not call this method.
        if self._shard_group is None and any(member.place != place(member.param) for member in members):
            self._init_group()
        result = super().state_dict()  # hooks may have put anything in it
        for key, entry in result.get("state", {}).items():
            if isinstance(entry, dict):
                result["state"][key] = {name: sharding.apart(value) for name, value in entry.items()}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; its tensors keep their dtypes, whatever the parameters' dtypes are.

        Raises
        ------
        ValueError
            A state of other parameters (another number or another shape), or of another optimizer, or one
            with parts that are no tensors. Nothing has changed then.
        """
        loaded: dict[str, Any] = {}
        params = [param for group in self.param_groups for param in group["params"]]
        names = {param: name for name, param, _ in self._named()}

        def capture(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            final = of_today(final)
            check_groups(final["param_groups"])
            warn_of_shapes(self.param_groups, final["param_groups"])
            loaded.update(final)
            keys = [key for group in final["param_groups"] for key in group["params"]]
            for key, param in zip(keys, params, strict=False):  # the base class compares the numbers
                check_entry(final["state"].get(key, {}), param, names[param])
            return final

        # The base class casts state to the parameter's dtype. Take what it was given, after every
        # hook, and put the uncast tensors in place.
        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        for key, param in zip(keys, params, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True).resolve_neg()
        self._forget_units()

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write parameters, state and momentum to a file that the adapters for other frameworks read too.

        Parameters
        ----------
        path : path-like
            A file, by convention ``*.safetensors``; an existing one is replaced once the new one is complete.

        Raises
        ------
        OSError, ImportError
            As `mlbfgs_core.save_state`.

        Notes
        -----
        Parameters are known by their names: pass ``model.named_parameters()``. Buffers of the model,
        hyperparameters and schedulers are not in the file. Waits for the device. With sharded parameters
        every process must call this: one tensor after the other is gathered, and the first process writes
        the file; for a state that one machine cannot hold, there is `torch.distributed.checkpoint`.

        Examples
        --------
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/run.safetensors"
        >>> model = torch.nn.Linear(3, 1)
        >>> MLBFGS(model.named_parameters()).save_state(path)
        >>> core.load_state(path)[0].names
        ('weight', 'bias')
        """
        self._init_group()  # parameters may have been moved or changed since the last step
        parts = self._knowing_all()
        group = parts[0].group if parts else None
        read = whole if sharding.is_first(group) else contribution
        snapshots = [take(part.config, part.members, part.blocks, self.state, read) for part in parts]
        sharding.once(group, partial(core.save_state, path, snapshots))

    @torch.no_grad()
    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Resume from a file of `save_state`, whichever adapter has written it.

        Parameters
        ----------
        path : path-like

        Raises
        ------
        ValueError
            A damaged file, or one of other parameters, blocks, shapes or dtypes; nothing has changed then.
        OSError, ImportError
            As `mlbfgs_core.load_state`.

        Notes
        -----
        Sets the parameters' values too. Hyperparameters and settings stay those of this optimizer.
        """
        parts = self._knowing_all()
        like = [take(part.config, part.members, part.blocks, {}, outline) for part in parts]
        loaded = core.load_state(path, like)
        label, restored = 0, []
        for part, snapshot in zip(parts, loaded, strict=True):
            restored += restore(snapshot, part.members, label)
            label += len(part.blocks)
        for member, value, entry in restored:
            member.write(value)
            self.state.pop(member.param, None)
            if entry:
                self.state[member.param] = entry
        self._forget_units()

    def _knowing_all(self) -> list[Partition]:
        """The partitions; this process must have all parameters or a part of each."""
        if self._shard_group is not None:
            rule = "must be None for a file of the whole run (see `state_dict`)"
            msg = f"`shard_group` {rule}, got {self._shard_group}"
            raise ValueError(msg)
        return self._partitions()

    def __getstate__(self) -> dict[str, Any]:
        self._named()
        return {
            **super().__getstate__(),
            "_blocks": self._blocks,
            "_matrix_axes": self._matrix_axes,
            "_shard_group": self._shard_group,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = {"_shard_group": None, "_matrix_axes": None, **state}  # of an older version
        super().__setstate__(state)
        self.__dict__.setdefault("_names", {})
        for group in (self.defaults, *self.param_groups):  # of an older version
            for name, value in (SWITCHES | ADDED).items():
                group.setdefault(name, value)
        self._forget_units()

    def _forget_units(self) -> None:
        self._watch = adapter.Watch("MLBFGS")
        self._units: list[Unit] = []
        self._signature: Any = None

    def _members(self, shards: Any) -> dict[tuple[core.Config, torch.device], list[Member]]:
        """All parameters, by settings and device; `shards` are the processes that sum over sharded ones."""
        named = self._named()
        check_memory([(name, param) for name, param, _ in named])
        if self._shard_group is None:  # else the others' names are not known
            adapter.check_matrix_axes(self._matrix_axes, [name for name, *_ in named])
        found: dict[tuple[core.Config, torch.device], list[Member]] = {}
        for name, param, group in named:
            sharding.check_placements(name, param, owned=self._shard_group is not None)
            config = config_of(settings_of(group))
            axes = adapter.axes_in(config, name, tuple(param.shape), self._matrix_axes)
            share, largest = sharding.share(param, shards), config.max_preconditioner_dim
            member = Member.of(name, param, group, share, axes, largest)
            found.setdefault((config, param.device), []).append(member)
        return found

    def _named(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """All parameters, each once, with their names and groups.

        Users edit groups during a run: parameters keep the names that they have had, and the state of those
        that are in no group any more is forgotten.
        """
        prefix = "" if self._shard_group is None else f"rank{dist.get_rank(self._shard_group)}."
        found: dict[Tensor, tuple[str, Tensor, dict[str, Any]]] = {}
        number = 0
        for group in self.param_groups:
            params, given = group["params"], group.get("param_names")
            names = [f"{prefix}param{number + i}" for i in range(len(params))]
            if given:
                names = match_names(params, given, names, self._names)
                if names != given:
                    group["param_names"] = names
            number += len(params)
            for name, param in zip(names, params, strict=True):
                found.setdefault(param, (name, param, group))
        self._names = {param: name for param, (name, _, _) in found.items()}
        for param in [key for key in self.state if isinstance(key, Tensor) and key not in found]:
            del self.state[param]
        return list(found.values())

    def _partitions(self) -> list[Partition]:
        """Groups of equal settings and device, with their parameters in blocks."""
        if self._shard_group is not None:
            return divide(self._members(None), self._blocks, self._shard_group)
        group = sharding.shard_group([param for group in self.param_groups for param in group["params"]])
        return [
            Partition.of(
                config,
                device,
                members,
                core.partition([member.name for member in members], self._blocks),
                group,
            )
            for (config, device), members in self._members(group).items()
        ]

    def _init_group(self) -> None:
        """Bind the core states of all parameters that have or had a gradient to `self.state`.

        torch.compile knows this method's name, and runs it while it traces.
        """
        for group in self.param_groups:
            make_plain(group)
        layout = [
            (
                id(group),
                settings_of(group),
                group["momentum"] != 0,
                tuple(group.get("param_names") or ()),
                list(map(place, group["params"])),
            )
            for group in self.param_groups
        ]
        given = [param.grad is None for group in self.param_groups for param in group["params"]]
        bound = all(unit.is_bound(self.state) for unit in self._units)
        if bound and (layout, given) == self._signature:
            return
        if self._shard_group is None:
            self._bind([part.active(self.state) for part in self._partitions()], bound)
        elif bound and self._units and layout == self._signature[0]:
            # Other owners may not have noticed any change, so they cannot be asked.
            self._bind([unit.part for unit in self._units], bound)
        else:
            self._bind(self._partitions(), bound=False, ask=partial(gather, self._shard_group))
        self._signature = (layout, given)

    def _bind(
        self, parts: Sequence[Partition], bound: bool, ask: Callable[[Any], list[Any]] | None = None
    ) -> None:
        """Make units from partitions; `ask` gathers what all owners know."""
        parts = [part for part in parts if part.blocks]
        known = [unit.part.key for unit in self._units] == [part.key for part in parts]
        if known and bound and not any(unit.splits() for unit in self._units):
            return
        forget_misfits(
            [(part.config, [[part.members[i] for i in block] for block in part.blocks]) for part in parts],
            self.state,
            ask,
        )
        before = self._units if self._shard_group is not None and ask is None else [None] * len(parts)
        units: list[Unit] = []
        for part, old in zip(parts, before, strict=True):
            numbers = None if old is None else old.coefficients()
            if ask is not None:
                numbers = part.agreed(self.state, ask)
            units.append(Unit(part, self.state, sum(len(unit.blocks) for unit in units), numbers))
        self._units = units

    def _verdict(self, seen: Sequence[adapter.Observation], own: Any) -> tuple[Any, Any]:
        """Whether the step is accepted; and, with a learning rate of 0, whether it is no step at all (else
        None). Both are tensors or arrays, as `own` is, a unit's own verdict.

        A step with a rate of 0 and gradients of zero is how `torch.distributed.checkpoint` makes an
        optimizer create its state: it must not count.
        """
        verdicts = [observation.finite for observation in seen]
        if getattr(self, "found_inf", None) is not None:
            verdicts.append(self.found_inf.reshape(()) == 0)
        finite = _all(verdicts, own)
        rates = [group["lr"] for group in self.param_groups]
        if any(not isinstance(rate, Tensor) and rate != 0 for rate in rates):
            return finite, None
        zeros = [observation.grad_square.sum() == 0 for observation in seen]
        zeros += [rate.reshape(()) == 0 for rate in rates if isinstance(rate, Tensor)]
        idle = _all(zeros, own)
        return finite & ~idle, idle


def _all(verdicts: Sequence[Any], like: Any) -> Any:
    """Whether all are true, as a tensor where `like` is one, and on its device, else as an array."""
    if len(verdicts) == 1:
        return verdicts[0]
    if not isinstance(like, Tensor):
        return np.asarray([bool(verdict) for verdict in verdicts]).all()
    return torch.stack([as_tensor(verdict).to(like.device, non_blocking=True) for verdict in verdicts]).all()
