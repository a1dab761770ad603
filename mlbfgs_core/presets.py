"""What each preset sets: the method's settings, and how an optimizer turns a direction into a step."""

from __future__ import annotations

from typing import Any, Final, Literal, NamedTuple

__all__ = ["PRESETS", "Preset", "default_rate", "preset_momentum", "preset_nesterov"]

Preset = Literal["default", "paper", "formulas", "lbfgs", "fit"]


class _Preset(NamedTuple):
    settings: dict[str, Any]
    """The settings that differ from the defaults of `mlbfgs_core.Config`."""
    momentum: float = 0.9
    nesterov: bool = False


_PUBLISHED: Final[dict[str, Any]] = {
    "history_size": 10,
    "adaptive": False,
    "noise_floor": 0.0,
    "min_cosine": 0.0,
    "shrinkage": 1.0,
    "step_length": "none",
    "preconditioner": "none",
}
PRESETS: Final[dict[str, _Preset]] = {
    "default": _Preset({}, nesterov=True),
    # What the authors ran for the paper (Niu et al., TMLR 2023, arXiv:2307.13744), from their code at
    # https://github.com/yuehniu/mL-BFGS: run-SLIM.sh gives one recipe for ResNet-18 and DeiT on CIFAR-100 and
    # for ResNet-50 on ImageNet. Its momentum is 0.9, and its learning rate the 0.1 that `default_rate` gives
    # for a unit length.
    "paper": _Preset(
        {
            **_PUBLISHED,  # its history of 10 is that of run-SLIM.sh, --hist-sz=10
            "beta": 0.999,  # run-SLIM.sh, --mm-p and --mm-g
            "update_every": 50,  # run-SLIM.sh, --update-freq
            # opt/slimblock.py, tao_lb and tao_ub; tau_0 is 1 less the --lbfgs-damping=0.01 of run-SLIM.sh.
            "damping": (0.01, 1.5, 0.99),
            "step_length": "unit",  # opt/slimblock.py, __grad_cond divides by the norm over all blocks
        }
    ),
    # The formulas alone leave beta, T and the damping open: these are this library's choice.
    "formulas": _Preset({**_PUBLISHED, "beta": 0.9, "update_every": 20, "damping": (0.01, 10.0, 0.9)}),
    "lbfgs": _Preset({**_PUBLISHED, "beta": 0.0, "update_every": 1}, momentum=0.0),
    "fit": _Preset(
        {
            "history_size": 10,
            "update_every": 21,
            "min_cosine": 0.3,
            "shrinkage": 1.0,
            "step_length": "clip",
            "preconditioner": "none",
        },
        momentum=0.0,
    ),
}


def preset_of(preset: str | None) -> _Preset:
    """What a preset sets; None is the default.

    Raises
    ------
    ValueError
        No such preset.
    """
    if preset is None:
        preset = "default"
    if not isinstance(preset, str) or preset not in PRESETS:
        msg = f"`preset` must be None or one of {tuple(PRESETS)}, got {preset!r}"
        raise ValueError(msg)
    return PRESETS[preset]


def preset_momentum(preset: str | None) -> float:
    """Momentum that belongs to a preset: 0 for "lbfgs" and "fit", else 0.9.

    Examples
    --------
    >>> preset_momentum(None), preset_momentum("fit")
    (0.9, 0.0)
    """
    return preset_of(preset).momentum


def preset_nesterov(preset: str | None) -> bool:
    """Whether a preset's momentum looks ahead, as Nesterov's does: only that of the default preset.

    A step is then ``d + momentum * buffer`` instead of ``buffer``.

    Examples
    --------
    >>> preset_nesterov(None), preset_nesterov("paper")
    (True, False)
    """
    return preset_of(preset).nesterov


def default_rate(step_length: str) -> float:
    """The default learning rate of an optimizer: 1e-3 for "rms", else 0.1.

    Examples
    --------
    >>> default_rate("rms"), default_rate("clip")
    (0.001, 0.1)
    """
    return 1e-3 if step_length == "rms" else 0.1
