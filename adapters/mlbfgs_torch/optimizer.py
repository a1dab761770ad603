"""`MLBFGS`: a `torch.optim.Optimizer` over the core."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import lru_cache
from typing import Any, NamedTuple, Unpack

import array_api_compat.torch as xp
import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

import mlbfgs_core as core
from mlbfgs_core.blocks import Blocks, BlockSpec
from mlbfgs_core.state import LEAF_DTYPES

from .binding import Flags, bind, store

__all__ = ["MLBFGS"]

_SETTINGS = tuple(field.name for field in fields(core.Config))
_LEAF_DTYPES = tuple(getattr(torch, name) for name in LEAF_DTYPES)
# Values handled at a time: several times a CPU's cores' caches, all but the largest leaves of a GPU.
_TILE = {"cpu": 2**18}
_DEVICE_TILE = 2**26


class MLBFGS(Optimizer):
    """mL-BFGS: quasi-Newton training from momentum-averaged curvature pairs.

    Parameters
    ----------
    params : iterable of tensors, named tensors or groups
        As for `torch.optim.AdamW`. A group may carry its own `lr`, `momentum`, `weight_decay`,
        `maximize` and any setting. Groups whose settings agree share blocks, pairs and step length,
        whatever their `lr`; groups with other settings stand alone.
    lr : float or tensor
        Length of a step, before momentum, with the default ``step_length="unit"``.
    momentum : float, optional
        Heavy-ball momentum on the direction; by default that of the preset, 0.9 or (for "lbfgs" and
        "fit") 0.
    weight_decay : float
        Decoupled, as in AdamW: parameters shrink by ``lr * weight_decay`` per step.
    blocks : {"all", "layer", "parameter"} or callable
        Which parameters share curvature; a callable maps a parameter's name to a label. Names come
        from ``model.named_parameters()``.
    maximize : bool
        Climb instead of descending.
    **settings
        Settings of `mlbfgs_core.Config` by name: `history_size`, `update_every`, `preset`, ...

    Raises
    ------
    ValueError, TypeError
        Settings out of range, no parameters, parameters that are not real floating-point.

    Notes
    -----
    A step whose gradients hold a NaN or an infinity changes nothing; `diagnostics` counts it. A
    parameter without a gradient keeps still. Memory: ``(2 * history_size + 6) * 4`` bytes per float32
    parameter with default settings and momentum (`mlbfgs_core.plan_memory` gives the exact
    figure without the momentum's array). No step waits for a GPU.

    References
    ----------
    Niu et al., TMLR 2023, arXiv:2307.13744. Difference from the paper: see `mlbfgs_core.Config`;
    ``preset="paper"`` is the published method.

    Examples
    --------
    >>> model = torch.nn.Linear(3, 1)
    >>> optimizer = MLBFGS(model.parameters(), lr=0.1)
    >>> model(torch.ones(2, 3)).square().mean().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        *,
        blocks: BlockSpec = "all",
        maximize: bool = False,
        **settings: Unpack[core.Settings],
    ) -> None:
        config = core.Config(**settings)
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": core.preset_momentum(config.preset) if momentum is None else momentum,
            "weight_decay": weight_decay,
            "maximize": maximize,
            **{name: getattr(config, name) for name in _SETTINGS},
        }
        _check_hyperparameters(defaults)
        self._blocks = blocks
        self._units: list[_Unit] = []
        super().__init__(params, defaults)
        self._partitions()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; its settings are checked first.

        Parameters
        ----------
        param_group : dict
            "params", and any hyperparameter or setting. With a "preset" of its own the group takes
            none of the optimizer's settings.
        """
        own = {name: param_group[name] for name in _SETTINGS if name in param_group}
        inherited = {} if "preset" in own else {name: self.defaults[name] for name in _SETTINGS}
        config = core.Config(**{**inherited, **own})
        group = {**param_group, **{name: getattr(config, name) for name in _SETTINGS}}
        if "preset" in own and "momentum" not in group:
            group["momentum"] = core.preset_momentum(config.preset)
        _check_hyperparameters({**self.defaults, **group})
        params = group["params"]
        if not isinstance(params, (Tensor, set)):  # the base class refuses sets
            group["params"] = params = list(params)
        _check_params([params] if isinstance(params, Tensor) else params)
        super().add_param_group(group)
        self._units = []

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
            A sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        units = self._bound_units()
        work = [(unit, unit.params(), unit.grads()) for unit in units]
        work = [(unit, params, grads) for unit, params, grads in work if any(g is not None for g in grads)]
        seen = [
            core.project(unit.config, unit.state, params, grads, blocks=unit.blocks, kernels=unit.kernels)
            for unit, params, grads in work
        ]
        for (unit, params, grads), observation in zip(work, seen, strict=True):
            others = [other.finite.to(observation.finite.device) for other in seen]
            finite = torch.stack(others).all() if len(others) > 1 else observation.finite
            check, due = unit.flags.read()
            update, state = core.step(
                unit.config,
                unit.state,
                params,
                grads,
                blocks=unit.blocks,
                kernels=unit.kernels,
                when_check=check,
                when_due=due,
                observation=observation._replace(finite=finite),
            )
            store(unit.state, state)
            unit.flags.send(state)
            self._apply(unit, update, finite)
        return loss

    def diagnostics(self) -> list[core.Diagnostics]:
        """Figures of the last step, one record for each set of groups with common settings.

        The tensors in them are the optimizer's own; reading a value waits for the device.
        """
        return [core.diagnostics(unit.state) for unit in self._bound_units()]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; its tensors keep their dtypes, whatever the parameters' dtypes are."""
        loaded: dict[str, Any] = {}

        def capture(_: Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)

        # The base class casts state to the parameter's dtype. Take what it was given, after every
        # hook, and put the uncast tensors in place.
        handle = self.register_load_state_dict_pre_hook(capture)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        params = [param for group in self.param_groups for param in group["params"]]
        keys = [key for group in loaded["param_groups"] for key in group["params"]]
        for key, param in zip(keys, params, strict=True):
            for name, value in loaded["state"].get(key, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][name] = value.detach().clone().to(param.device)
        self._units = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_blocks": self._blocks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._units = []

    def _partitions(self) -> list[_Partition]:
        """Groups of equal settings and device, with their parameters in blocks."""
        if not any(group["params"] for group in self.param_groups):
            msg = "`params` must hold at least one parameter, got none"
            raise ValueError(msg)
        members: dict[Any, list[_Member]] = {}
        number = 0
        for group in self.param_groups:
            names = group.get("param_names") or [f"param{number + i}" for i in range(len(group["params"]))]
            config = _config(tuple((name, _hashable(group[name])) for name in _SETTINGS))
            for name, param in zip(names, group["params"], strict=True):
                members.setdefault((config, param.device), []).append(_Member(name, param, group))
                number += 1
        return [
            _Partition(config, part, core.partition([member.name for member in part], self._blocks))
            for (config, _), part in members.items()
        ]

    def _bound_units(self) -> list[_Unit]:
        """The core states of all parameters that have had a gradient, bound to `self.state`."""
        parts = [part.active(self.state) for part in self._partitions()]
        parts = [part for part in parts if part.members]
        if [unit.key for unit in self._units] != [part.key for part in parts]:
            self._units = [_Unit(part, self.state) for part in parts]
        for unit, part in zip(self._units, parts, strict=True):
            unit.members = part.members
        return self._units

    def _apply(self, unit: _Unit, update: Sequence[Tensor | None], finite: Tensor) -> None:
        """Momentum, weight decay and learning rate, all of them only where the step is accepted."""
        accepted = finite.to(unit.state.gamma.dtype)
        for member, direction in zip(unit.members, update, strict=True):
            if direction is None:
                continue
            param, group = member.param, member.group
            rate = accepted * group["lr"]
            if group["momentum"] != 0:
                entry = self.state[param]
                if "momentum_buffer" not in entry:
                    entry["momentum_buffer"] = torch.zeros_like(entry["mean_params"])
                buffer = entry["momentum_buffer"]
                buffer.mul_(1 + accepted * (group["momentum"] - 1)).add_(direction)
                direction = buffer
            if group["weight_decay"] != 0:
                param.mul_((1 - rate * group["weight_decay"]).to(param.dtype))
            if direction.dtype == param.dtype:
                param.addcmul_(direction, rate.to(param.dtype), value=-1)
            else:
                param.sub_(direction * rate)


class _Member(NamedTuple):
    name: str
    param: Tensor
    group: dict[str, Any]


class _Partition(NamedTuple):
    """Parameters with common settings and device, in blocks."""

    config: core.Config
    members: list[_Member]
    blocks: Blocks

    @property
    def key(self) -> tuple[Any, ...]:
        return self.config, tuple(id(member.param) for member in self.members), self.blocks

    def active(self, memory: dict[Tensor, Any]) -> _Partition:
        """Only the parameters that have a gradient now or have had one."""
        kept = [
            i
            for i, m in enumerate(self.members)
            if m.param.grad is not None or "history" in memory.get(m.param, ())
        ]
        if len(kept) == len(self.members):
            return self
        place = {index: new for new, index in enumerate(kept)}
        blocks = [tuple(place[i] for i in block if i in place) for block in self.blocks]
        return _Partition(self.config, [self.members[i] for i in kept], tuple(b for b in blocks if b))


class _Unit:
    """One core state: a partition bound to the parameters' memory."""

    def __init__(self, part: _Partition, memory: dict[Tensor, dict[str, Any]]) -> None:
        self.key = part.key
        self.config, self.members, self.blocks = part
        self.state = bind(part.config, [member.param for member in part.members], part.blocks, memory)
        self.kernels = core.Kernels(xp, _TILE.get(self.state.gamma.device.type, _DEVICE_TILE))
        self.flags = Flags(part.config, self.state)

    def params(self) -> list[Tensor]:
        return [member.param.detach() for member in self.members]

    def grads(self) -> list[Tensor | None]:
        return [_gradient(member) for member in self.members]


def _gradient(member: _Member) -> Tensor | None:
    grad = member.param.grad
    if grad is None:
        return None
    if grad.layout != torch.strided:
        msg = f"MLBFGS does not support sparse gradients, got {grad.layout} for {member.name!r}"
        raise RuntimeError(msg)
    return grad.neg() if member.group["maximize"] else grad.detach()


@lru_cache(maxsize=128)
def _config(settings: tuple[tuple[str, Any], ...]) -> core.Config:
    return core.Config(**dict(settings))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check_hyperparameters(values: dict[str, Any]) -> None:
    for name, rule, upper in (
        ("lr", "must be finite and >= 0", math.inf),
        ("momentum", "must be in [0, 1)", 1.0),
        ("weight_decay", "must be finite and >= 0", math.inf),
    ):
        value = values[name]
        if isinstance(value, Tensor):
            if name != "lr" or value.numel() != 1:
                msg = f"`{name}` must be a number, got a tensor of shape {tuple(value.shape)}"
                raise TypeError(msg)
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            msg = f"`{name}` must be a number, got {value!r}"
            raise TypeError(msg)
        if not 0 <= value < upper:
            msg = f"`{name}` {rule}, got {value!r}"
            raise ValueError(msg)
    if not isinstance(values["maximize"], bool):
        msg = f"`maximize` must be a bool, got {values['maximize']!r}"
        raise TypeError(msg)


def _check_params(params: Iterable[Any]) -> None:
    for index, param in enumerate(params):
        tensor = param[1] if isinstance(param, tuple) else param
        if isinstance(tensor, Tensor) and tensor.dtype not in _LEAF_DTYPES:
            msg = f"`params`[{index}] must be of one of the dtypes {_LEAF_DTYPES}, got {tensor.dtype}"
            raise TypeError(msg)
