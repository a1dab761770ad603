"""An optimizer's memory as a flat dictionary of arrays, numbers and strings, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_cupy_array

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.adapter import LEAF_COUNTS, RENAMED, accumulation_dtype, dtype_name

from .layout import Array
from .unit import Unit

__all__ = ["Loaded", "check_shapes", "decode", "encode"]

_NUMBERS = ("lr", "momentum", "weight_decay", "nesterov")
_BUFFER = "momentum_buffer"

Groups = list[tuple[int, ...]]


class Loaded(NamedTuple):
    """What a dictionary holds."""

    config: core.Config
    numbers: dict[str, Any]
    parts: list[tuple[core.State, Sequence[Array] | None, Groups]]
    """What `Unit.restore` takes, for each unit."""


def check_shapes(argument: str, new: core.Config, units: Sequence[Unit]) -> None:
    """Raise ValueError where settings ask for a state of other shapes or dtypes than the units'."""
    owns = {accumulation_dtype(member.like) for unit in units for member in unit.members}

    def fixed(config: core.Config) -> dict[str, Any]:
        dtypes = sorted({config.history_dtype or own for own in owns})
        factors = config.preconditioner == "kronecker"
        return {
            "history_size": config.history_size,
            "history_dtype": ", ".join(dtypes),
            "preconditioner": config.preconditioner,
            **({"max_preconditioner_dim": config.max_preconditioner_dim} if factors else {}),
        }

    kept = fixed(units[0].config)
    for name, value in fixed(new).items():
        if value != kept[name]:
            msg = (
                f"`{argument}` must keep {name} at {kept[name]}, which fixes the state's arrays, got {value}"
            )
            raise ValueError(msg)


def encode(units: Sequence[Unit], hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of all that the units remember, under flat names."""
    result: dict[str, Any] = {
        name: value.copy() if hasattr(value, "dtype") else value for name, value in hyperparameters.items()
    }
    result["settings"] = json.dumps(vars(units[0].config), default=float)
    for number, unit in enumerate(units):
        state, momentum = unit.export()
        numbers = adapter.coefficients(state)
        named: dict[str, Any] = adapter.leaf_arrays(state) | {n: numbers.pop(n) for n in LEAF_COUNTS}
        if momentum is not None:
            named[_BUFFER] = momentum
        arrays = {
            f"{field}/{name}": x
            for field in named
            for name, x in zip(unit.names, named[field], strict=True)
            if x is not None
        }
        arrays |= {f"unit{number}/{name}": x for name, x in numbers.items()}
        with unit.backend.on():
            result |= {name: unit.backend.asarray(array).copy() for name, array in arrays.items()}
        result[f"unit{number}/blocks"] = json.dumps(_named(unit, unit.blocks))
        result[f"unit{number}/leaves"] = json.dumps(_named(unit, unit.groups))
    return result


def decode(given: Mapping[str, Any], units: Sequence[Unit]) -> Loaded:
    """What a dictionary holds for these units, all of it checked.

    Raises
    ------
    TypeError
        It is no mapping.
    ValueError
        An entry is missing, unknown, or of another shape or dtype than the units' own.
    """
    if not isinstance(given, Mapping):
        msg = f"`state_dict` must be a mapping, got {type(given).__name__}"
        raise TypeError(msg)
    given = _of_today(given, units)
    config = _config(given)
    check_shapes("state_dict", config, units)
    buffers = any(name.startswith(f"{_BUFFER}/") for name in given)
    kinds: dict[str, Any] = {}
    for number, unit in enumerate(units):
        kinds |= {name: kind for name, _, _, kind in _entries(number, unit, config, buffers)}
    texts = [f"unit{number}/{word}" for number in range(len(units)) for word in ("blocks", "leaves")]
    expected = {"settings", *_NUMBERS, *texts, *kinds}
    for name in sorted(expected ^ set(given)):
        rule, got = ("hold", "no such entry") if name in expected else ("not hold", "that entry")
        msg = f"`state_dict` must {rule} {name!r}, got {got}"
        raise ValueError(msg)
    for name, kind in kinds.items():
        _check(name, given[name], kind)
    numbers = {name: _number(given[name]) for name in _NUMBERS}
    if numbers["momentum"] and not buffers:
        msg = f"`state_dict` must hold buffers for a momentum of {numbers['momentum']!r}, got none"
        raise ValueError(msg)
    if numbers["nesterov"] not in (0, 1):
        msg = f"`state_dict` must hold 0 or 1 as 'nesterov', got {numbers['nesterov']!r}"
        raise ValueError(msg)
    return Loaded(config, numbers, [_part(i, unit, config, given, buffers) for i, unit in enumerate(units)])


def _part(
    number: int, unit: Unit, config: core.Config, given: Mapping[str, Any], buffers: bool
) -> tuple[core.State, Sequence[Array] | None, Groups]:
    """What `Unit.restore` takes."""
    blocks = _listed(given, f"unit{number}/blocks")
    if [sorted(block) for block in blocks] != [sorted(block) for block in _named(unit, unit.blocks)]:
        msg = f"`state_dict` must be of the blocks {_named(unit, unit.blocks)}, got {blocks}"
        raise ValueError(msg)
    leaves = _listed(given, f"unit{number}/leaves")
    kind = {unit.names[i]: (n, unit.members[i].kind) for n, block in enumerate(unit.blocks) for i in block}
    once = sorted(name for leaf in leaves for name in leaf) == sorted(unit.names)
    if not once or any(len({kind[name] for name in leaf}) != 1 for leaf in leaves):
        rule = "hold each parameter once, beside others of its block, dtype and matrices,"
        msg = f"`state_dict` must {rule} in 'unit{number}/leaves', got {leaves}"
        raise ValueError(msg)
    numbers: dict[str, Any] = {}
    arrays: dict[str, dict[int, Array]] = {}
    for name, field, leaf, _ in _entries(number, unit, config, buffers):
        if leaf is None:
            numbers[field] = given[name]
        else:
            arrays.setdefault(field, {})[leaf] = given[name]
    state, _ = unit.export()
    fields = (*adapter.leaf_arrays(state), *LEAF_COUNTS, *([_BUFFER] if buffers else []))
    listed = {field: tuple(map(arrays.get(field, {}).get, range(len(unit.names)))) for field in fields}
    momentum = listed.pop(_BUFFER, None)
    with unit.backend.on():
        for name in LEAF_COUNTS:
            numbers[name] = unit.backend.xp.stack([unit.backend.asarray(count) for count in listed.pop(name)])
    place = {name: index for index, name in enumerate(unit.names)}
    state = adapter.with_leaf_arrays(state, listed)._replace(**numbers)
    return state, momentum, [tuple(place[name] for name in leaf) for leaf in leaves]


def _entries(
    number: int, unit: Unit, config: core.Config, buffers: bool
) -> Iterator[tuple[str, str, int | None, tuple[tuple[int, ...], str]]]:
    """What a dictionary holds of a unit: the name of each array, its field, the index of its parameter (None
    if it belongs to none), its shape and dtype."""
    likes = [member.like for member in unit.members]
    entries = list(adapter.layout(config, likes, unit.blocks, [member.matrix for member in unit.members]))
    if buffers:
        entries += [
            adapter.Entry(_BUFFER, i, like.shape, accumulation_dtype(like), "")
            for i, like in enumerate(likes)
        ]
    for entry in entries:
        if entry.name in LEAF_COUNTS:
            for index, name in enumerate(unit.names):
                yield f"{entry.name}/{name}", entry.name, index, ((), entry.dtype)
        else:
            own = f"unit{number}/{entry.name}"
            if entry.leaf is not None:
                own = f"{entry.name}/{unit.names[entry.leaf]}"
            yield own, entry.name, entry.leaf, (entry.shape, entry.dtype)


def _of_today(given: Mapping[str, Any], units: Sequence[Unit]) -> dict[str, Any]:
    """A dictionary with the names that arrays have today, if an older version has written it."""
    result: dict[str, Any] = {}
    for name in given:
        first, slash, rest = name.partition("/")
        last = RENAMED.get(rest, rest) if first.startswith("unit") else rest
        result[RENAMED.get(first, first) + slash + last] = given[name]
    for number in range(len(units)):  # older versions had no `grad_scale`
        if f"unit{number}/length" in given:
            result.setdefault(f"unit{number}/grad_scale", given[f"unit{number}/length"] * 0 + 1)
    return result


def _named(unit: Unit, groups: Sequence[Sequence[int]]) -> list[list[str]]:
    return [[unit.names[i] for i in group] for group in groups]


def _text(given: Mapping[str, Any], name: str) -> str:
    if name not in given:
        msg = f"`state_dict` must hold {name!r}, got no such entry"
        raise ValueError(msg)
    value = given[name]
    return value if isinstance(value, str) else str(np.asarray(value).item())


def _listed(given: Mapping[str, Any], name: str) -> list[list[str]]:
    text = _text(given, name)
    try:
        return [[str(word) for word in group] for group in json.loads(text)]
    except (TypeError, ValueError) as error:
        msg = f"`state_dict` must hold lists of names as {name!r}, got {text!r}"
        raise ValueError(msg) from error


def _config(given: Mapping[str, Any]) -> core.Config:
    text = _text(given, "settings")
    try:
        settings = {n: tuple(v) if isinstance(v, list) else v for n, v in json.loads(text).items()}
        return core.Config(**adapter.settings_of_today(settings))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        msg = f"`state_dict` must hold valid 'settings', got {text!r}"
        raise ValueError(msg) from error


def _number(value: Any) -> Any:
    """A Python number, or a copy of a CuPy array."""
    return value.copy() if is_cupy_array(value) else np.asarray(value).item()


def _kind(array: Array) -> tuple[tuple[int, ...], str]:
    return tuple(array.shape), dtype_name(array)


def _check(name: str, value: Any, kind: tuple[tuple[int, ...], str]) -> None:
    if not (isinstance(value, (np.ndarray, np.generic)) or is_cupy_array(value)):
        msg = f"`state_dict` must hold an array as {name!r}, got {type(value).__name__}"
        raise ValueError(msg)
    if _kind(value) != kind:
        rule = f"must hold {name!r} of the shape {kind[0]} and the dtype {kind[1]}"
        msg = f"`state_dict` {rule}, got {tuple(value.shape)} and {dtype_name(value)}"
        raise ValueError(msg)
