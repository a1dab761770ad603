"""Checks of what users give, before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mlbfgs_core as core
from mlbfgs_core.adapter import (
    LEAF_DTYPES,
    LEAF_NAMES,
    OF_MATRICES,
    RENAMED,
    SETTINGS,
    as_number,
    check_real,
    layout,
    settings_of_today,
)

from . import sharding
from .leaves import Member, real_shape
from .rows import ADDED_SINCE, ROWS, history_size_of, is_known, widths

__all__ = [
    "ADDED",
    "SETTINGS",
    "SWITCHES",
    "check_entry",
    "check_gradient",
    "check_groups",
    "check_hyperparameters",
    "check_params",
    "config_of",
    "make_plain",
    "match_names",
    "of_today",
    "settings_of",
    "warn_of_shapes",
]

NUMBERS = ("lr", "momentum", "weight_decay")
"""Names of the numbers that a group has in addition to its settings."""
_NUMBERS_AND_SETTINGS = (*NUMBERS, *SETTINGS)
SWITCHES = {"nesterov": False, "maximize": False, "decoupled_weight_decay": True, "capturable": False}
"""Options that are on or off, with their values for a state dict that lacks them."""
ADDED = {
    "shrinkage": 1.0,
    "factor_beta": 0.95,
    "precondition_frequency": 10,
    "max_preconditioner_dim": 2048,
}
"""Settings that older versions did not have, with the values that do what those versions did."""
_SHAPING = ("history_size", "history_dtype", "preconditioner")
"""Settings that decide which arrays a state has."""
_TOGETHER = tuple(
    entry.name
    for entry in layout(core.Config(preconditioner="none"), [torch.empty(0, device="meta")], ((0,),))
    if entry.leaf is not None
)
"""Names of the arrays that pairs need: a parameter has all of them or none."""
_DTYPES = (
    *(getattr(torch, name) for name in LEAF_DTYPES),
    torch.complex32,
    torch.complex64,
    torch.complex128,
)
_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""The dtype that a gradient may have instead of its parameter's: that of the averages."""


def check_hyperparameters(values: dict[str, Any]) -> dict[str, Any]:
    """The numbers among the hyperparameters, as Python's; the rate may be a tensor."""
    numbers = {}
    for name in NUMBERS:
        value = values[name]
        number = numbers[name] = check_real(name, as_number(name, value))
        if isinstance(value, Tensor) and name == "lr" and value.numel() == 1:
            continue
        if not isinstance(number, (int, float)):  # an array of this or of another library
            kind = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            msg = f"`{name}` must be a number, got {kind}"
            raise TypeError(msg)
    for name in SWITCHES:
        if not isinstance(values[name], bool):
            msg = f"`{name}` must be a bool, got {values[name]!r}"
            raise TypeError(msg)
    return numbers


def make_plain(group: dict[str, Any]) -> None:
    """Turn numbers of NumPy in a group, such as a scheduler may have computed, into Python's: only these can
    be read from a file without pickles."""
    for name in _NUMBERS_AND_SETTINGS:
        if isinstance(group.get(name), (np.number, np.ndarray)):
            group[name] = as_number(name, group[name])


def match_names(
    params: Sequence[Tensor], given: Sequence[str], unnamed: Sequence[str], known: Mapping[Tensor, str]
) -> list[str]:
    """A name for each parameter of a group that may have been edited, with or without its names.

    A parameter keeps the name by which it is `known`, as long as the group has that name. One that is not
    known takes the given name at its place, if there is one for each parameter, or else its name in
    `unnamed`.
    """
    present = set(given)
    kept = [known[param] if known.get(param) in present else None for param in params]
    taken = set(kept)
    if len(given) == len(params):
        names = zip(kept, given, unnamed, strict=True)
        return [own or (name if name not in taken else default) for own, name, default in names]
    if not known or any(param in known and own is None for param, own in zip(params, kept, strict=True)):
        rule = f"must hold a name for each of the group's {len(params)} parameters"
        msg = f"`param_names` {rule}, got {list(given)!r}"
        raise ValueError(msg)
    return [own or default for own, default in zip(kept, unnamed, strict=True)]


def check_params(params: Iterable[Any]) -> None:
    for index, param in enumerate(params):
        tensor = param[1] if isinstance(param, tuple) else param
        if isinstance(tensor, Tensor) and tensor.dtype not in _DTYPES:
            msg = f"`params`[{index}] must be of one of the dtypes {_DTYPES}, got {tensor.dtype}"
            raise TypeError(msg)


def check_groups(groups: Iterable[dict[str, Any]]) -> None:
    for group in groups:
        if missing := [name for name in SETTINGS if name not in group and name not in ADDED]:
            msg = f"`state_dict` must be one of MLBFGS, got groups without {missing[0]!r}"
            raise ValueError(msg)
        count, names = len(group["params"]), group.get("param_names")
        if names and len(names) != count:
            msg = f"`state_dict` must hold a name for each of a group's {count} parameters, got {names!r}"
            raise ValueError(msg)


def warn_of_shapes(groups: Sequence[dict[str, Any]], loaded: Sequence[dict[str, Any]]) -> None:
    """Warn where loaded settings replace those that the user has chosen for the state's arrays."""
    usual = core.Config()
    for own, new in zip(groups, loaded, strict=False):  # the base class compares the numbers
        for name in _SHAPING:
            chosen = own[name] != getattr(usual, name)
            if chosen and name in new and new[name] != own[name]:
                told = f"`{name}`={new[name]!r} of the loaded state replaces {own[name]!r}"
                warnings.warn(f"MLBFGS: {told}; set it in `param_groups` to change it", stacklevel=7)
                return


def of_today(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with today's names for settings and arrays that an older version has written; the given
    one is not changed."""
    groups = [settings_of_today(group) for group in state_dict["param_groups"]]
    state = {
        key: {RENAMED.get(name, name): value for name, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "param_groups": groups, "state": state}


def check_entry(entry: Any, param: Tensor, name: str) -> None:
    """Raise ValueError unless a parameter's part of a state can be that of this parameter."""
    if not isinstance(entry, Mapping):
        msg = f"`state_dict` must hold a dictionary for {name!r}, got {type(entry).__name__}"
        raise ValueError(msg)
    for part in (*LEAF_NAMES, "momentum_buffer", *ROWS):
        value = entry.get(part)
        if part not in entry or isinstance(value, Tensor) or (part in ROWS and _numbers(value)):
            continue
        msg = f"`state_dict` must hold a tensor as {part!r} of {name!r}, got {type(value).__name__}"
        raise ValueError(msg)
    arrays = [part for part in (*LEAF_NAMES, "momentum_buffer") if part in entry]
    shape = real_shape(param)
    for part in arrays:
        got = tuple(entry[part].shape)
        if part in OF_MATRICES:
            if len(got) != 3 or got[1] != got[2]:
                rule = f"must hold a stack of square matrices as {part!r}"
                msg = f"`state_dict` {rule}, got one of shape {got} for {name!r}"
                raise ValueError(msg)
            continue
        got = got[2:] if part == "history" and len(got) > 1 else got
        if got != shape:
            msg = f"`state_dict` must hold a {part!r} of the shape {shape} of {name!r}, got {got}"
            raise ValueError(msg)
        if sharding.is_sharded(param) and not sharding.is_sharded(entry[part]):
            rule = "sharded like its parameter (see torch.distributed.checkpoint.state_dict)"
            msg = f"`state_dict` must hold a {part!r} {rule}, got a plain tensor of shape {got} for {name!r}"
            raise ValueError(msg)
    arrays = [part for part in arrays if part != "momentum_buffer"]
    if not arrays and not is_known(entry):
        return
    # The settings, which come with the state, decide which arrays there are; but some only come together.
    needed = ROWS if set(_TOGETHER).isdisjoint(arrays) else (*_TOGETHER, *ROWS)
    if missing := [part for part in needed if part not in entry]:
        told = arrays[0] if arrays else ROWS[0]
        msg = f"`state_dict` must hold {missing[0]!r} beside a {told!r}, got {sorted(entry)} for {name!r}"
        raise ValueError(msg)
    for part, width in widths(history_size_of(entry)).items():
        got = tuple(torch.as_tensor(entry[part]).shape)
        if got not in ((width,), (width - ADDED_SINCE[part],)):
            msg = f"`state_dict` must hold {part!r} of the shape {(width,)}, got {got} for {name!r}"
            raise ValueError(msg)


def _numbers(value: Any) -> bool:
    """Whether it is what a tensor of numbers becomes in a file without tensors."""
    return isinstance(value, (list, tuple)) and all(isinstance(number, (int, float)) for number in value)


def check_gradient(member: Member) -> None:
    """Raise unless a parameter's gradient is dense, and of its dtype (or the averages') and shape."""
    param, name = member.param, member.name
    grad: Any = param.grad
    if grad.dtype is param.dtype and grad.shape == param.shape and grad.layout is torch.strided:
        return
    if grad.layout != torch.strided:
        msg = f"MLBFGS does not support sparse gradients, got {grad.layout} for {name!r}"
        raise RuntimeError(msg)
    if grad.dtype is not param.dtype and grad.dtype is not _WIDER.get(param.dtype):
        allowed = [dtype for dtype in (param.dtype, _WIDER.get(param.dtype)) if dtype is not None]
        told = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        kind = str(grad.dtype).removeprefix("torch.")
        msg = f"`params` must have gradients of the dtype {told}, got {kind} for {name!r}"
        raise TypeError(msg)
    if grad.shape != param.shape:
        shapes = f"the shape {tuple(param.shape)}, got {tuple(grad.shape)}"
        msg = f"`params` must have gradients of {shapes} for {name!r}"
        raise ValueError(msg)


def settings_of(group: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, _hashable(group[name])) for name in SETTINGS)


@lru_cache(maxsize=128)
def config_of(settings: tuple[tuple[str, Any], ...]) -> core.Config:
    return core.Config(**dict(settings))


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
