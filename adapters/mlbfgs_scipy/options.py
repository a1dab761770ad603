"""The options of a run, checked."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning

import mlbfgs_core as core
from mlbfgs_core.adapter import SETTINGS, Preset, check_old_names, check_real

__all__ = ["IN_USERS_CODE", "Options", "read_options"]

IN_USERS_CODE = 4
"""Stack frames from a function called by `minimize_mlbfgs` up to the caller of `scipy.optimize.minimize`."""


@dataclass(frozen=True)
class Options:
    """The options that `minimize_mlbfgs` documents, with their defaults, and the settings of the core."""

    config: core.Config
    preset: Preset | None
    tol: float | None = None
    maxiter: int | None = None
    gtol: float | None = None
    ftol: float = 0.0
    c1: float = 1e-4
    c2: float = 0.9
    maxls: int = 20
    eps: Any = float(np.sqrt(np.finfo(np.float64).eps))
    learning_rate: Any = None
    momentum: float | None = None
    disp: bool = False
    return_all: bool = False

    @property
    def most_iterations(self) -> int:
        """`maxiter`, or its default."""
        if self.maxiter is not None:
            return self.maxiter
        return 15000 if self.learning_rate is None else 1000

    @property
    def gradient_tolerance(self) -> float:
        """`gtol` or `tol`, or their default, which is minus infinity under noise: no gradient reaches it."""
        given = self.tol if self.gtol is None else self.gtol
        if given is not None:
            return given
        return 1e-5 if self.learning_rate is None else -math.inf

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        rate = self.learning_rate(iteration) if callable(self.learning_rate) else self.learning_rate
        check_real("learning_rate", rate)
        return float(rate)


def read_options(given: dict[str, Any]) -> Options:
    """Check options by name; an unknown name gives a warning and is ignored.

    Raises
    ------
    ValueError, TypeError
        For an option out of range or of the wrong kind.

    Warns
    -----
    OptimizeWarning
        For unknown names, as in SciPy's own methods.
    """
    known = {field.name for field in fields(Options)} - {"config"}
    unknown = [name for name in given if name not in known and name not in SETTINGS]
    check_old_names(unknown)
    if unknown:
        msg = f"Unknown solver options: {', '.join(unknown)}"
        warnings.warn(msg, OptimizeWarning, stacklevel=IN_USERS_CODE)
    given = {"preset": "lbfgs" if given.get("learning_rate") is None else "fit", **given}
    settings = {name: given[name] for name in ("preset", *SETTINGS) if name in given}
    options = Options(core.Config(**settings), **{name: given[name] for name in known if name in given})
    _check(options)
    return options


def _check(options: Options) -> None:
    if options.config.preconditioner == "kronecker":
        rule = "must be 'none' or 'diagonal', since a vector has no matrices"
        msg = f"`preconditioner` {rule}, got {options.config.preconditioner!r}"
        raise ValueError(msg)
    for name in ("tol", "gtol", "ftol"):
        _check_number(name, getattr(options, name), "must be finite and >= 0", lambda x: 0 <= x < math.inf)
    for name in ("c1", "c2"):
        _check_number(name, getattr(options, name), "must be in (0, 1)", lambda x: 0 < x < 1)
    if not options.c1 < options.c2:
        msg = f"`c1` must be less than `c2`, got {options.c1!r} and {options.c2!r}"
        raise ValueError(msg)
    _check_count("maxls", options.maxls, 1)
    if options.maxiter is not None:
        _check_count("maxiter", options.maxiter, 0)
    if not np.all(np.asarray(options.eps) > 0):
        msg = f"`eps` must be > 0, got {options.eps!r}"
        raise ValueError(msg)
    if options.learning_rate is not None and not callable(options.learning_rate):
        check_real("learning_rate", options.learning_rate)
    if options.momentum is not None:
        check_real("momentum", options.momentum)
        if options.learning_rate is None:
            msg = f"`momentum` needs a `learning_rate`, got {options.momentum!r} without one"
            raise ValueError(msg)


def _check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    if value is None and name in ("tol", "gtol"):
        return
    if not isinstance(value, Real):
        msg = f"`{name}` {rule}, got {value!r}"
        raise TypeError(msg)
    if not holds(float(value)):
        msg = f"`{name}` {rule}, got {value!r}"
        raise ValueError(msg)


def _check_count(name: str, value: object, least: int) -> None:
    rule = f"must be an int >= {least}"
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        msg = f"`{name}` {rule}, got {value!r}"
        raise TypeError(msg) from None
    if count < least:
        msg = f"`{name}` {rule}, got {value!r}"
        raise ValueError(msg)
