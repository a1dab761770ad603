"""Get the records of anything that has diagnostics, their names, and copies of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import array_api_compat as compat
import numpy as np
import numpy.typing as npt

import mlbfgs_core as core

__all__ = ["Array", "copied", "figures_of", "labels", "on_host"]

Array = Any


def figures_of(source: Any) -> list[core.Diagnostics]:
    """The records of an optimizer, a result or a state; no value is read.

    Parameters
    ----------
    source : optimizer, state, result or records
        An `MLBFGS` of any adapter, an optax state that holds an `MLBFGSState`, SciPy's result of
        `minimize_mlbfgs`, a `mlbfgs_core.State`, a `mlbfgs_core.Diagnostics` or a sequence of them.

    Returns
    -------
    list of Diagnostics
        One for each unit; empty for an optimizer before its first step.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        For an optax state without an `MLBFGSState`.
    """
    jax = sys.modules.get("mlbfgs_jax")  # code that has its states has imported it
    own = getattr(source, "diagnostics", None)
    if isinstance(source, core.Diagnostics):
        return [source]
    if isinstance(source, core.State) and not (jax and isinstance(source, jax.MLBFGSState)):
        return [core.diagnostics(source)]
    if callable(own):
        return list(own())
    if own is not None:
        source = own
    if isinstance(source, (list, tuple)) and all(isinstance(part, core.Diagnostics) for part in source):
        return list(source)
    if jax is not None and isinstance(source, (tuple, list, dict)):
        return list(jax.diagnostics(source))
    kinds = "an MLBFGS, a state of optax, a result of minimize_mlbfgs, or Diagnostics"
    msg = f"`source` must be {kinds}, got {type(source).__name__} (a wrapped optimizer: give the inner one)"
    raise TypeError(msg)


def labels(
    source: Any, figures: Sequence[core.Diagnostics], names: Sequence[str] | None = None
) -> list[list[str]]:
    """A name for each block of each unit: those given, otherwise the optimizer's, otherwise numbers.

    With several units the names begin with "unit0/", "unit1/", ...

    Raises
    ------
    ValueError
        If the number of `names` is not that of the blocks.
    """
    counts = [int(record.gamma.shape[0]) for record in figures]
    own = getattr(source, "block_names", None)
    if names is not None:
        flat = list(names)
    elif callable(own):
        flat = [name for unit in own() for name in unit]
    else:
        flat = [name for count in counts for name in _numbered(count)]
    if len(flat) != sum(counts):
        msg = f"`names` must be one for each of {sum(counts)} blocks, got {flat}"
        raise ValueError(msg)
    result, place = [], 0
    for number, count in enumerate(counts):
        prefix = f"unit{number}/" if len(counts) > 1 and names is None else ""
        result.append([prefix + name for name in flat[place : place + count]])
        place += count
    return result


def copied(value: Any) -> Any:
    """A copy on the array's device, which later steps neither overwrite nor free; numbers as they are."""
    if isinstance(value, (int, float)):
        return value
    if compat.is_torch_array(value):
        return value.detach().clone()
    if compat.is_cupy_array(value):
        return value.copy()
    return compat.array_namespace(value).asarray(value, copy=True)


def on_host(value: Any) -> npt.NDArray[Any]:
    """The value as a NumPy array; this waits for the device."""
    if compat.is_torch_array(value):
        return np.asarray(value.detach().cpu())
    if compat.is_cupy_array(value):
        return np.asarray(value.get())
    return np.asarray(value)


def _numbered(count: int) -> list[str]:
    return ["all"] if count == 1 else [f"block{number}" for number in range(count)]
