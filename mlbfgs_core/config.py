"""Every hyperparameter of the method, validated once."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Final, Literal, NamedTuple, TypedDict, Unpack, cast

import numpy as np

__all__ = [
    "Config",
    "Preset",
    "Settings",
    "StepLength",
    "as_number",
    "check_real",
    "default_rate",
    "is_zero",
    "preset_momentum",
    "preset_nesterov",
]

Preset = Literal["default", "paper", "formulas", "lbfgs", "fit"]
StepLength = Literal["rms", "unit", "clip", "none"]


class Settings(TypedDict, total=False):
    """The keyword arguments of `Config`, for the signatures of adapters."""

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
    metric_power: float
    metric_beta: float
    history_dtype: str | None
    preset: Preset | None


_DEFAULT: Final[Settings] = {
    "history_size": 5,
    "update_every": 50,
    "adaptive": True,
    "check_every": 2,
    "signal_to_noise": 4.0,
    "noise_floor": 4.0,
    "beta": None,
    "min_cosine": 0.2,
    "shrinkage": 0.25,
    "damping": None,
    "step_length": "rms",
    "clip_factor": 2.0,
    "metric_power": 1.0,
    "metric_beta": 0.99,
    "history_dtype": None,
    "preset": None,
}
_PUBLISHED: Final[Settings] = {
    "history_size": 10,
    "adaptive": False,
    "noise_floor": 0.0,
    "min_cosine": 0.0,
    "shrinkage": 1.0,
    "step_length": "none",
    "metric_power": 0.0,
}
_PRESETS: Final[dict[str, Settings]] = {
    "default": {},
    # What the authors ran for the paper (Niu et al., TMLR 2023, arXiv:2307.13744), from their code at
    # https://github.com/yuehniu/mL-BFGS: run-SLIM.sh gives one recipe for ResNet-18 and DeiT on CIFAR-100 and
    # for ResNet-50 on ImageNet.
    "paper": {
        **_PUBLISHED,  # its history of 10 is that of run-SLIM.sh, --hist-sz=10
        "beta": 0.999,  # run-SLIM.sh, --mm-p and --mm-g
        "update_every": 50,  # run-SLIM.sh, --update-freq
        # opt/slimblock.py, tao_lb and tao_ub; tau_0 is 1 less the --lbfgs-damping=0.01 of run-SLIM.sh.
        "damping": (0.01, 1.5, 0.99),
        "step_length": "unit",  # opt/slimblock.py, __grad_cond: the direction by its norm over all blocks
    },
    # The formulas alone leave beta, T and the damping open: these are this library's choice.
    "formulas": {**_PUBLISHED, "beta": 0.9, "update_every": 20, "damping": (0.01, 10.0, 0.9)},
    "lbfgs": {**_PUBLISHED, "beta": 0.0, "update_every": 1},
    "fit": {
        "history_size": 10,
        "update_every": 21,
        "min_cosine": 0.3,
        "shrinkage": 1.0,
        "step_length": "clip",
        "metric_power": 0.0,
    },
}
# For "paper" that of run-SLIM.sh, as is the learning rate of 0.1 that `default_rate` gives for a unit length.
_MOMENTUM: Final = {"default": 0.9, "paper": 0.9, "formulas": 0.9, "lbfgs": 0.0, "fit": 0.0}
_STEP_LENGTHS: Final = ("rms", "unit", "clip", "none")
_HISTORY_DTYPES: Final = ("bfloat16", "float16", "float32", "float64")


class _Range(NamedTuple):
    """Which real numbers an argument may be."""

    rule: str
    low: float
    high: float
    open_above: bool = True


# Ranges are tested only of Python's and NumPy's numbers, so that a traced hyperparameter passes through.
_INTEGERS: Final = ("history_size", "update_every", "check_every")
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
    "metric_power": _PART,
    "metric_beta": _FRACTION,
    "momentum": _FRACTION,
    "learning_rate": _POSITIVE,
    "lr": _POSITIVE,
    "weight_decay": _POSITIVE,
}


@dataclass(frozen=True, init=False)
class Config:
    """The settings of mL-BFGS; a preset fills in what is not given.

    Parameters
    ----------
    history_size : int
        Curvature pairs kept for each block, `m`. Memory is ``2 * m`` values per parameter.
    update_every : int
        Steps from one curvature pair to the next, `T`: exactly with ``adaptive=False``, at the
        latest with ``adaptive=True``. With ``T=1``, ``adaptive=False`` and ``step_length="none"`` the
        very first direction is at most 1 long, as in other implementations of L-BFGS.
    adaptive : bool
        Take a pair as soon as it stands out of the gradient noise.
    check_every : int
        Steps between two tests of whether it does; a positive test acts at the next step.
    signal_to_noise : float
        How many times the expected noise ``|y|^2`` must exceed.
    noise_floor : float
        Standard deviations of the curvature `mu` that a pair's curvature must exceed at a test,
        and below which no stored pair's curvature lies.
    beta : float or None
        Decay of the exponential moving averages of parameters and gradients. ``None``: the plain
        mean over the steps since the last pair.
    min_cosine : float
        Least cosine of the angle between `s` and the stored `y`; 0 turns the floor off.
    shrinkage : float
        With an adaptive schedule the part of `y` orthogonal to `s` is multiplied by the part of ``|y|^2``
        that is not gradient noise, but by no less than this; 1 leaves `y` as it is.
    damping : (float, float, float) or None
        The paper's ``(sigma_L, sigma_H, tau_0)``; ``None`` turns it off.
    step_length : {"rms", "unit", "clip", "none"}
        Scale the direction over all blocks to root mean square 1 over the parameters that have a gradient,
        so that one learning rate, about 1e-3, serves models of every size ("unit": to length 1), or limit
        it to `clip_factor` times its own running length, or leave it.
    clip_factor : float
        See `step_length`.
    metric_power : float
        Power `p` of the diagonal metric ``(mean square gradient)^(p/2)`` in whose coordinates the
        method runs: 0 is the published method, 1 starts from Adam's diagonal.
    metric_beta : float
        Decay of the mean square gradient.
    history_dtype : str or None
        Storage of the pairs: "bfloat16", "float16", "float32" or "float64"; ``None``: that of the
        averages (float32, or float64 for float64 parameters).
    preset : {"default", "paper", "formulas", "lbfgs", "fit"} or None
        "paper" is the published method with the settings that its authors used, "formulas" the published
        formulas and nothing else, "lbfgs" textbook L-BFGS at every step; "fit" suits quadratics and
        full-batch fits. Settings that are given win over the preset's.

    Raises
    ------
    TypeError
        An unknown setting, or one of the wrong kind.
    ValueError
        A setting out of range.

    Notes
    -----
    Difference from the paper: the cosine floor, the shrinkage, the adaptive schedule, interval means, the
    fixed root mean square and the metric are not in it; ``preset="paper"`` and ``preset="formulas"`` have
    none of them. The paper's formulas leave ``beta``, ``T``, the damping and the step length open. "paper"
    takes what the three recipes have in common that the authors published with their code, for ResNet-18 and
    DeiT on CIFAR-100 and ResNet-50 on ImageNet: ``T = 50``, ``beta = 0.999``, damping ``(0.01, 1.5, 0.99)``,
    10 pairs, a direction of length 1 over all blocks, heavy-ball momentum 0.9 and a learning rate of 0.1.
    Their runs add a cosine schedule down to 1e-4 and a weight decay of 2e-4 (DeiT: 5e-4) as a term of the
    gradient; their code's second average, over the pairs, and its own form of the first are left out.
    "formulas" leaves the direction as it is; its values of ``T``, ``beta`` and the damping are this library's
    choice.

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
    metric_power: float
    metric_beta: float
    history_dtype: str | None
    preset: Preset | None

    def __init__(self, **settings: Unpack[Settings]) -> None:
        names = [field.name for field in fields(self)]
        for name in settings:
            if name not in names:
                msg = f"unknown setting `{name}`; the settings are {', '.join(names)}"
                raise TypeError(msg)
        preset = _check_preset(settings.get("preset"))
        values = cast("dict[str, Any]", {**_DEFAULT, **_PRESETS[preset], **settings})
        for name in names:
            object.__setattr__(self, name, values[name])
        self._validate()

    @property
    def uses_metric(self) -> bool:
        """Whether the method runs in a diagonal metric (a traced power counts as one)."""
        return not is_zero(self.metric_power)

    @property
    def uses_noise(self) -> bool:
        """Whether the noise along the stored pairs must be followed."""
        return self.adaptive or not is_zero(self.noise_floor)

    @property
    def shrinks(self) -> bool:
        """Whether noise is taken out of pairs: it is known with an adaptive schedule."""
        whole = isinstance(self.shrinkage, (int, float)) and self.shrinkage == 1
        return self.adaptive and not whole

    @property
    def caps_first_step(self) -> bool:
        """Whether a direction without pairs is shortened to length 1, since with a pair at every step there
        is one such step only, and no scale is known for it."""
        every = isinstance(self.update_every, int) and self.update_every == 1 and not self.adaptive
        return every and self.step_length == "none"

    def _validate(self) -> None:
        for name in _INTEGERS:
            object.__setattr__(self, name, _checked_integer(name, getattr(self, name)))
        for name in _REALS:
            if hasattr(self, name) and not (name == "beta" and self.beta is None):
                object.__setattr__(self, name, check_real(name, getattr(self, name)))
        if not isinstance(self.adaptive, bool):
            msg = f"`adaptive` must be a bool, got {self.adaptive!r}"
            raise TypeError(msg)
        if self.step_length not in _STEP_LENGTHS:
            msg = f"`step_length` must be one of {_STEP_LENGTHS}, got {self.step_length!r}"
            raise ValueError(msg)
        if self.history_dtype is not None and self.history_dtype not in _HISTORY_DTYPES:
            msg = f"`history_dtype` must be None or one of {_HISTORY_DTYPES}, got {self.history_dtype!r}"
            raise ValueError(msg)
        if self.damping is not None:
            object.__setattr__(self, "damping", _checked_damping(self.damping))


def as_number(name: str, value: object, rule: str = "must be a number") -> Any:
    """A number of Python for one of Python or NumPy (a scalar, or an array without axes); an array of
    another library, traced or not, passes as it is.

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
    """The number that `as_number` makes of a real argument of a known name (a setting, or an optimizer's
    rate, momentum or decay).

    Raises
    ------
    TypeError, ValueError
        No number, or one out of the argument's range; the range of another library's array is not looked at.
    """
    rule, low, high, open_above = _REALS[name]
    number = as_number(name, value, rule)
    if isinstance(number, (int, float)) and (not low <= number <= high or (open_above and number == high)):
        msg = f"`{name}` {rule}, got {number!r}"
        raise ValueError(msg)
    return number


def _checked_integer(name: str, value: object) -> Any:
    rule = "must be an int"
    number = as_number(name, value, rule)
    if isinstance(number, float) or (name == "history_size" and not isinstance(number, int)):
        msg = f"`{name}` {rule}, got {number!r}"
        raise TypeError(msg)
    if isinstance(number, int) and number < 1:
        msg = f"`{name}` must be >= 1, got {number!r}"
        raise ValueError(msg)
    return number


def preset_momentum(preset: str | None) -> float:
    """Heavy-ball momentum that belongs to a preset: 0 for "lbfgs" and "fit", else 0.9.

    Examples
    --------
    >>> preset_momentum(None), preset_momentum("fit")
    (0.9, 0.0)
    """
    return _MOMENTUM[_check_preset(preset)]


def preset_nesterov(preset: str | None) -> bool:
    """Whether a preset's momentum looks ahead, as Nesterov's: that of the default does, the others' do not.

    A step is then ``d + momentum * buffer`` instead of ``buffer``.

    Examples
    --------
    >>> preset_nesterov(None), preset_nesterov("paper")
    (True, False)
    """
    return _check_preset(preset) == "default"


def default_rate(step_length: StepLength) -> float:
    """Learning rate of an optimizer that is given none: 1e-3 for "rms", else 0.1.

    Examples
    --------
    >>> default_rate(Config().step_length), default_rate(Config(preset="fit").step_length)
    (0.001, 0.1)
    """
    return 1e-3 if step_length == "rms" else 0.1


def _check_preset(preset: str | None) -> str:
    if preset is None:
        return "default"
    if preset not in _PRESETS:
        msg = f"`preset` must be None or one of {tuple(_PRESETS)}, got {preset!r}"
        raise ValueError(msg)
    return preset


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
