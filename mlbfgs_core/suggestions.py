"""What to say instead of a setting that there is not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Final

__all__ = ["RENAMED_SETTINGS", "is_misplaced", "suggestion", "unknown_setting"]

_LEFT_OUT: Final = "leave it out: "
_NEAR: Final = 0.85
"""How alike a name is to a setting that it cannot but mean (of 1, by `difflib`)."""
_ABROAD: Final = {
    # Adam and AdamW in PyTorch and optax
    "betas": "`momentum` takes the place of betas[0]; leave betas[1] out",
    "b1": "`momentum` takes its place",
    "b2": f"{_LEFT_OUT}the mean square has its own decay, `preconditioner_beta`",
    "eps": f"{_LEFT_OUT}there is no such constant to set",
    "eps_root": f"{_LEFT_OUT}there is no such constant to set",
    "mu_dtype": "`history_dtype` is the dtype of the stored pairs; all averages are float32 or wider",
    "amsgrad": f"{_LEFT_OUT}there is nothing like it",
    "foreach": f"{_LEFT_OUT}parameters always share their operations",
    "fused": f"{_LEFT_OUT}kernels are fused on a GPU wherever they can be",
    "differentiable": f"{_LEFT_OUT}steps cannot be differentiated",
    "dampening": f"{_LEFT_OUT}there is nothing like it",
    # L-BFGS in PyTorch, optax and jaxopt
    "max_iter": f"{_LEFT_OUT}a step is one iteration",
    "max_eval": f"{_LEFT_OUT}a step takes one gradient",
    "tolerance_grad": f"{_LEFT_OUT}when to stop is up to the loop",
    "tolerance_change": f"{_LEFT_OUT}when to stop is up to the loop",
    "line_search_fn": f"{_LEFT_OUT}steps have a length of their own, and mlbfgs_scipy has a line search",
    "linesearch": f"{_LEFT_OUT}in JAX a line search of optax can follow scale_by_mlbfgs",
    "memory_size": "`history_size` is its name here",
    "scale_init_precond": f"{_LEFT_OUT}the newest pair sets the scale",
    # SOAP and Shampoo
    "max_precondition_dim": "`max_preconditioner_dim` is its name here",
    "max_precond_dim": "`max_preconditioner_dim` is its name here",
    "shampoo_beta": "`factor_beta` is its name here",
}
RENAMED_SETTINGS: Final = {
    "metric_power": "`preconditioner_power`, and 0 is `preconditioner`='none'",
    "metric_beta": "`preconditioner_beta`",
}
"""What settings of an older version are called today."""
_RATE: Final = ("lr", "learning_rate")


def suggestion(name: str, known: Sequence[str]) -> str:
    """What to use for a name that is none of those known: what takes the place of another optimizer's
    argument, the nearest known name, or all of them.

    Examples
    --------
    >>> suggestion("histroy_size", ["lr", "history_size"])
    'did you mean `history_size`?'
    >>> suggestion("learning_rate", ["lr", "history_size"])
    '`lr` is its name here'
    >>> suggestion("colour", ["lr", "history_size"])
    'the settings are lr, history_size'
    """
    if name in RENAMED_SETTINGS:
        return f"it is now {RENAMED_SETTINGS[name]}"
    if name in _RATE and (here := [own for own in _RATE if own in known]):
        return f"`{here[0]}` is its name here"
    if name in _ABROAD:
        advice = _ABROAD[name]
        usable = all(own in known for own in re.findall(r"`(\w+)`", advice))
        return advice if usable else f"{_LEFT_OUT}there is nothing like it here"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return f"did you mean `{near[0]}`?" if near else f"the settings are {', '.join(known)}"


def is_misplaced(name: str, known: Sequence[str]) -> bool:
    """Whether a name among others that may be anything is meant as a setting: an argument of another
    optimizer, or nearly the name of one.

    Examples
    --------
    >>> names = ("initial_lr", "betas", "histroy_size")
    >>> [name for name in names if is_misplaced(name, ["lr", "history_size"])]
    ['betas', 'histroy_size']
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=_NEAR)
    return name not in known and (name in RENAMED_SETTINGS or name in _ABROAD or bool(near))


def unknown_setting(name: str, known: Sequence[str]) -> str:
    """The message about a name that is no setting."""
    return f"unknown setting `{name}`; {suggestion(name, known)}"
