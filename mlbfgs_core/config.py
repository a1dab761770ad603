"""Every hyperparameter of the method, validated once."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Final, Literal, NamedTuple, TypeVar

import numpy as np

from .presets import Preset, preset_of
from .suggestions import RENAMED_SETTINGS, is_misplaced, unknown_setting

__all__ = [
    "SETTINGS",
    "Config",
    "PreconditionerName",
    "StepLength",
    "as_number",
    "check_names",
    "check_old_names",
    "check_real",
    "is_zero",
    "settings_in",
    "settings_of_today",
    "with_preset",
]

PreconditionerName = Literal["none", "diagonal", "kronecker"]
StepLength = Literal["rms", "unit", "clip", "none"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_PRECONDITIONERS: Final = ("none", "diagonal", "kronecker")
_STEP_LENGTHS: Final = ("rms", "unit", "clip", "none")
_HISTORY_DTYPES: Final = ("bfloat16", "float16", "float32", "float64")


class _Range(NamedTuple):
    """Which real numbers an argument may be."""

    rule: str
    low: float
    high: float
    open_above: bool = True


# Only numbers of Python and NumPy are tested for their range, so that a traced hyperparameter passes through.
_INTEGERS: Final = {
    "history_size": 0,
    "update_every": 1,
    "check_every": 1,
    "precondition_frequency": 1,
    "max_preconditioner_dim": 1,
}
"""The least value of each."""
_POSITIVE: Final = _Range("must be finite and >= 0", 0.0, math.inf)
_FRACTION: Final = _Range("must be in [0, 1)", 0.0, 1.0)
_PART: Final = _Range("must be in [0, 1]", 0.0, 1.0, open_above=False)
_REALS: Final = {
    "signal_to_noise": _POSITIVE,
    "noise_floor": _POSITIVE,
    "beta": _Range("must be None or in [0, 1)", 0.0, 1.0),
    "min_cosine": _FRACTION,
    "shrinkage": _PART,
    "clip_factor": _Range("must be finite and >= 1", 1.0, math.inf),
    "preconditioner_power": _PART,
    "preconditioner_beta": _FRACTION,
    "factor_beta": _FRACTION,
    "momentum": _FRACTION,
    "learning_rate": _POSITIVE,
    "lr": _POSITIVE,
    "weight_decay": _POSITIVE,
}


class _Default:
    """A default in a signature, which looks like its value; an argument that is one counts as not given."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return bool(self.value == (other.value if isinstance(other, _Default) else other))

    def __hash__(self) -> int:
        return hash(self.value)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


def check_old_names(names: Iterable[str]) -> None:
    """Raise TypeError if a setting goes by the name that it had in an older version."""
    for name in names:
        if name in RENAMED_SETTINGS:
            raise TypeError(unknown_setting(name, ()))


def check_names(names: Iterable[str], known: Sequence[str]) -> None:
    """Raise TypeError if one of these names, which may be anything, is meant as a setting, and is none."""
    for name in names:
        if is_misplaced(name, known):
            raise TypeError(unknown_setting(name, known))


def with_preset(function: _Function, *, marked: bool = False) -> _Function:
    """Let a function name all settings with their defaults; those that are not given come from its preset.

    Its settings and options are keyword-only, and `preset` is one of them.

    Parameters
    ----------
    function : callable
    marked : bool
        Whether the signature shows defaults that are known again when they are handed back, which
        `optax.inject_hyperparams` does. Tools that read the types of defaults need plain ones.

    Notes
    -----
    Some tools, such as jsonargparse, call with every argument that a signature has. So where all settings are
    given in addition to a preset, those that equal their default count as not given.

    Raises
    ------
    TypeError
        From the function: an unknown setting.
    """
    signature = inspect.signature(function, eval_str=True)
    options = [
        own.name for own in signature.parameters.values() if own.kind is inspect.Parameter.KEYWORD_ONLY
    ]

    settings = [name for name in signature.parameters if name not in ("self", "params")]

    @functools.wraps(function)
    def filled(*args: Any, **kwargs: Any) -> Any:
        given = {name: value for name, value in kwargs.items() if not isinstance(value, _Default)}
        for name in given:
            if name not in signature.parameters:
                raise TypeError(unknown_setting(name, settings))
        if given.get("preset") is not None and given.keys() >= set(SETTINGS):
            given = {name: value for name, value in given.items() if not is_default(name, value)}
        return function(*args, **{**preset_of(given.get("preset")).settings, **given})

    def is_default(name: str, value: object) -> bool:
        plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
        return name in SETTINGS and plain and value == signature.parameters[name].default

    if not marked:
        return filled  # type: ignore[return-value]
    filled.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            own.replace(default=_Default(own.default)) if own.name in options else own
            for own in signature.parameters.values()
        ]
    )
    return filled  # type: ignore[return-value]


def settings_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `Config` among a function's arguments, such as its ``locals()``."""
    return {field.name: arguments[field.name] for field in fields(Config)}


@dataclass(frozen=True, init=False)
class Config:
    """The settings of mL-BFGS; a preset fills in what is not given.

    Parameters
    ----------
    preset : {"default", "paper", "formulas", "lbfgs", "fit"} or None
        "paper" is the published method with the settings that its authors used, "formulas" the published
        formulas and nothing else, "lbfgs" textbook L-BFGS at every step; "fit" suits quadratics and
        full-batch fits. Settings that are given win over the preset's.
    history_size : int
        Curvature pairs kept for each block, `m`. Memory is ``2 * m`` values per parameter. With 0 there are
        no pairs, and none of their memory and cost: what is left is the preconditioned gradient with the
        control of its length.
    update_every : int
        Steps from one curvature pair to the next, `T`: exactly `T` with ``adaptive=False``, at most
        `T` with ``adaptive=True``. With ``T=1``, ``adaptive=False`` and ``step_length="none"`` the
        very first direction is at most 1 long, as in other implementations of L-BFGS.
    adaptive : bool
        Take a pair as soon as it stands out of the gradient noise.
    check_every : int or None
        Steps between two tests of whether a pair does; a positive test acts at the next step. None: 2, or
        10 with the Kronecker preconditioner, for which a test multiplies matrices.
    signal_to_noise : float
        The factor by which ``|y|^2`` must exceed the noise expected in it.
    noise_floor : float
        A pair's curvature `mu` must exceed this many of its standard deviations at a test, and no
        stored pair has less.
    beta : float or None
        Decay of the exponential moving averages of parameters and gradients. ``None``: the plain
        mean over the steps since the last pair.
    min_cosine : float
        Least cosine of the angle between `s` and the stored `y`; 0 turns the floor off.
    shrinkage : float
        With an adaptive schedule the part of `y` orthogonal to `s` is multiplied by the part of ``|y|^2``
        that is not gradient noise. A pair that is noise says nothing. Where far more noise is expected than
        ``|y|^2``, so that it cannot have been noise, up to this is kept: this much from 2.5 times on. 1
        leaves every `y` as it is.
    damping : (float, float, float) or None
        The paper's ``(sigma_L, sigma_H, tau_0)``; ``None`` turns it off.
    step_length : {"rms", "unit", "clip", "none"}
        Scale the direction over all blocks to root mean square 1 over the parameters that have a gradient,
        so that one learning rate, about 1e-3, serves models of every size ("unit": to length 1), or limit
        it to `clip_factor` times its own running length ("clip"), or leave it ("none").
    clip_factor : float
        See `step_length`.
    preconditioner : {"none", "diagonal", "kronecker"}
        The coordinates in which the method runs. "diagonal": scaled by the running mean square of gradients,
        as in Adam. "kronecker": the same in the eigenbases of the rows and columns of each weight, as in
        SOAP; vectors keep the diagonal. "none": the parameters' own, as published.
    preconditioner_power : float
        Power `p` of the diagonal ``(mean square gradient)^(p/2)``; with 1 it is Adam's.
    preconditioner_beta : float
        Decay of the mean square gradient.
    factor_beta : float
        Decay of the Kronecker factors, whose eigenvectors are the bases.
    precondition_frequency : int
        Steps from one basis to the next, by a power iteration and a QR decomposition. The first basis is
        formed from the first gradient; at the beginning there are more, after steps 2, 4 and 7.
    max_preconditioner_dim : int
        A side of a weight that is longer keeps its own coordinates, and needs no factor.
    history_dtype : str or None
        Storage of the pairs: "bfloat16", "float16", "float32" or "float64"; ``None``: that of the
        averages (float32, or float64 for float64 parameters).

    Raises
    ------
    TypeError
        An unknown setting, or one of the wrong kind.
    ValueError
        A setting out of range.

    Notes
    -----
    Difference from the paper: the cosine floor, the shrinkage, the adaptive schedule, interval means, the
    fixed root mean square and the preconditioner are not in it; ``preset="paper"`` and
    ``preset="formulas"`` have none of them. The paper's formulas leave ``beta``, ``T``, the damping and the
    step length open. "paper" takes what is common to the three recipes that the authors published with
    their code, for ResNet-18 and DeiT on CIFAR-100 and ResNet-50 on ImageNet: ``T = 50``, ``beta = 0.999``,
    damping ``(0.01, 1.5, 0.99)``, 10 pairs, a direction of length 1 over all blocks, heavy-ball momentum
    0.9 and a learning rate of 0.1. Their runs add a cosine schedule down to 1e-4 and a weight decay of 2e-4
    (DeiT: 5e-4) as a term of the gradient; their code's second average, over the pairs, and its variant of
    the first are left out. "formulas" leaves the direction as it is; its values of ``T``, ``beta`` and the
    damping are this library's choice.

    References
    ----------
    Niu et al., TMLR 2023, arXiv:2307.13744; ``run-SLIM.sh``, ``train.py`` and ``opt/slimblock.py`` of their
    code, https://github.com/yuehniu/mL-BFGS.

    Examples
    --------
    >>> Config(preset="fit", beta=0.9).update_every
    21
    >>> Config(preset="paper").damping
    (0.01, 1.5, 0.99)
    >>> Config(beta=1.5)
    Traceback (most recent call last):
    ...
    ValueError: `beta` must be None or in [0, 1), got 1.5
    """

    history_size: int
    update_every: int
    adaptive: bool
    check_every: int
    signal_to_noise: float
    noise_floor: float
    beta: float | None
    min_cosine: float
    shrinkage: float
    damping: tuple[float, float, float] | None
    step_length: StepLength
    clip_factor: float
    preconditioner: PreconditionerName
    preconditioner_power: float
    preconditioner_beta: float
    factor_beta: float
    precondition_frequency: int
    max_preconditioner_dim: int
    history_dtype: str | None

    @with_preset
    def __init__(
        self,
        *,
        preset: Preset | None = None,
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
        step_length: StepLength = "rms",
        clip_factor: float = 2.0,
        preconditioner: PreconditionerName = "diagonal",
        preconditioner_power: float = 1.0,
        preconditioner_beta: float = 0.99,
        factor_beta: float = 0.95,
        precondition_frequency: int = 10,
        max_preconditioner_dim: int = 2048,
        history_dtype: str | None = None,
    ) -> None:
        for name, value in settings_in(locals()).items():
            object.__setattr__(self, name, value)
        self._validate()

    @property
    def takes_pairs(self) -> bool:
        """Whether curvature pairs are stored; without them only the base optimizer is left."""
        return self.history_size > 0

    @property
    def is_adaptive(self) -> bool:
        """Whether the noise of gradients decides when a pair is taken."""
        return self.adaptive and self.takes_pairs

    @property
    def uses_noise(self) -> bool:
        """Whether the noise along the stored pairs must be followed."""
        return self.takes_pairs and (self.adaptive or not is_zero(self.noise_floor))

    @property
    def sums_squares(self) -> bool:
        """Whether the scatter of gradients comes from sums of squares at a check, since whitening each
        distance from the mean would cost products of matrices."""
        return self.is_adaptive and self.beta is None and self.preconditioner == "kronecker"

    @property
    def shrinks(self) -> bool:
        """Whether noise is taken out of pairs: it is known only with an adaptive schedule."""
        whole = isinstance(self.shrinkage, (int, float)) and self.shrinkage == 1
        return self.adaptive and not whole

    @property
    def caps_first_step(self) -> bool:
        """Whether a direction without pairs is shortened to length 1: with a pair at every step there is only
        one such direction, and no scale is known for it."""
        every = isinstance(self.update_every, int) and self.update_every == 1 and not self.adaptive
        return self.takes_pairs and every and self.step_length == "none"

    def _validate(self) -> None:
        matrices = self.preconditioner == "kronecker"
        if self.check_every is None:
            object.__setattr__(self, "check_every", 10 if matrices else 2)
        for name, least in _INTEGERS.items():
            object.__setattr__(self, name, _checked_integer(name, getattr(self, name), least))
        for name in _REALS:
            if hasattr(self, name) and not (name == "beta" and self.beta is None):
                object.__setattr__(self, name, check_real(name, getattr(self, name)))
        if not isinstance(self.adaptive, bool):
            msg = f"`adaptive` must be a bool, got {self.adaptive!r}"
            raise TypeError(msg)
        if self.step_length not in _STEP_LENGTHS:
            msg = f"`step_length` must be one of {_STEP_LENGTHS}, got {self.step_length!r}"
            raise ValueError(msg)
        if self.preconditioner not in _PRECONDITIONERS:
            msg = f"`preconditioner` must be one of {_PRECONDITIONERS}, got {self.preconditioner!r}"
            raise ValueError(msg)
        if self.history_dtype is not None and self.history_dtype not in _HISTORY_DTYPES:
            msg = f"`history_dtype` must be None or one of {_HISTORY_DTYPES}, got {self.history_dtype!r}"
            raise ValueError(msg)
        if self.damping is not None:
            object.__setattr__(self, "damping", _checked_damping(self.damping))


SETTINGS: Final = tuple(field.name for field in fields(Config))
"""Names of all settings."""


def settings_of_today(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings, perhaps of an older version, under today's names. Other entries stay, except `preset`,
    since the settings that it stands for are saved, too."""
    today = {name: value for name, value in settings.items() if name != "preset"}
    if "metric_power" in today:
        power = today.pop("metric_power")
        today["preconditioner"] = "none" if power == 0 else "diagonal"
        today["preconditioner_power"] = power or 1.0
        today["preconditioner_beta"] = today.pop("metric_beta")
    return today


def as_number(name: str, value: object, rule: str = "must be a number") -> Any:
    """A Python number from one of Python or NumPy (a scalar, or an array without axes); an array of another
    library, traced or not, is returned as it is.

    Raises
    ------
    TypeError
        Anything else: a bool, a complex number, a NumPy array with axes, a string.
    """
    own = isinstance(value, (np.generic, np.ndarray))
    number = value.item() if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 else value
    if isinstance(number, Integral) and not isinstance(number, bool):
        return int(number)
    if isinstance(number, Real) and not isinstance(number, bool):
        return float(number)
    if not own and hasattr(value, "dtype") and hasattr(value, "shape"):
        return value
    msg = f"`{name}` {rule}, got {value!r}"
    raise TypeError(msg)


def check_real(name: str, value: object) -> Any:
    """Check a real argument by its name (a setting, or an optimizer's rate, momentum or decay), and return
    it as `as_number` does.

    Raises
    ------
    TypeError, ValueError
        No number, or one out of the argument's range; an array of another library may have any value.
    """
    rule, low, high, open_above = _REALS[name]
    number = as_number(name, value, rule)
    if isinstance(number, (int, float)) and (not low <= number <= high or (open_above and number == high)):
        msg = f"`{name}` {rule}, got {number!r}"
        raise ValueError(msg)
    return number


def _checked_integer(name: str, value: object, least: int) -> Any:
    rule = "must be an int"
    number = as_number(name, value, rule)
    if isinstance(number, float) or (name == "history_size" and not isinstance(number, int)):
        msg = f"`{name}` {rule}, got {number!r}"
        raise TypeError(msg)
    if isinstance(number, int) and number < least:
        msg = f"`{name}` must be >= {least}, got {number!r}"
        raise ValueError(msg)
    return number


def _checked_damping(damping: object) -> tuple[Any, ...]:
    rule = "must be None or three numbers (sigma_L, sigma_H, tau_0)"
    if not isinstance(damping, (tuple, list)) or len(damping) != 3:
        msg = f"`damping` {rule}, got {damping!r}"
        raise TypeError(msg)
    numbers = tuple(as_number("damping", value, rule) for value in damping)
    if not all(isinstance(number, (int, float)) for number in numbers):
        return numbers  # of another library, perhaps traced
    sigma_low, sigma_high, tau = numbers
    if not (0 < sigma_low < 1 < sigma_high < math.inf and 0 < tau <= 1):
        msg = f"`damping` {rule} with 0 < sigma_L < 1 < sigma_H and 0 < tau_0 <= 1, got {numbers!r}"
        raise ValueError(msg)
    return numbers


def is_zero(value: object) -> bool:
    """Whether a number is known to be zero; a traced one is not."""
    return isinstance(value, (int, float)) and value == 0
