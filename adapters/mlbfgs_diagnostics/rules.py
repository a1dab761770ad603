"""Sentences about the numbers, by rules that the documentation lists."""

from __future__ import annotations

import numpy as np

import mlbfgs_core as core

from .sources import on_host

__all__ = ["LOW_COSINE", "NOISY", "advice", "remarks"]

NOISY = 4.0
"""Smallest `signal_to_noise` of a check at which a difference of gradients counts as more than noise: the
default of the setting of this name."""
LOW_COSINE = 0.1
"""Below this cosine a direction is almost at right angles to its gradient."""


def advice(figures: core.Diagnostics) -> list[str]:
    """One sentence for each block, from the first rule that applies.

    Parameters
    ----------
    figures : Diagnostics
        From any backend; this waits for the device.

    Returns
    -------
    list of str

    Notes
    -----
    The rules, in this order:

    1. No accepted step: "no step yet".
    2. No pair, none rejected, but some are to be kept: "no pair yet".
    3. More pairs rejected than stored: parameters or gradients do not change.
    4. The last pair was stored as zeros: it says nothing, since its curvature is negative or it is noise.
    5. The floors have added more to the last pair than was measured, ``delta > tau mu + 1 - tau``. Then,
       if the last check was below 4, the pairs are mostly noise; otherwise, if ``mu <= 0``, curvature is
       negative; otherwise the gradient turns more than it grows.
    6. ``cosine < 0.1``: the direction is almost at right angles to the gradient.
    7. "nothing to do".

    Examples
    --------
    >>> import numpy as np
    >>> state = core.Method(core.Config()).init([np.zeros(3)])
    >>> advice(core.diagnostics(state))
    ['no step yet']
    """
    numbers = {name: on_host(getattr(figures, name)) for name in _READ}
    kept = figures.gram.shape[-1] // 2
    numbers["kept"] = np.asarray(kept)
    newest = (numbers["pairs"] - 1) % max(kept, 1)
    squares = on_host(figures.gram)[_blocks(numbers), newest, newest] if kept else newest
    numbers["silent"] = (numbers["pairs"] > 0) & (squares == 0)
    return [_sentence({name: x[b] if x.ndim else x for name, x in numbers.items()}) for b in _blocks(numbers)]


_READ = ("step", "pairs", "rejected", "mu", "tau", "delta", "cosine", "signal_to_noise")


def _blocks(numbers: dict[str, np.ndarray]) -> range:
    return range(len(numbers["pairs"]))


def _sentence(block: dict[str, np.ndarray]) -> str:
    stored, rejected, mu = int(block["pairs"]), int(block["rejected"]), float(block["mu"])
    if block["step"] == 0:
        return "no step yet"
    if stored == 0 and rejected == 0 and block["kept"] > 0:
        return "no pair yet: the first comes after two windows of at most `update_every` steps"
    if rejected > stored:
        return f"{rejected} pairs without curvature: parameters or gradients stand still"
    if block["silent"]:
        if mu <= 0:
            return "negative curvature along the last pair, which says nothing: usual early in training"
        return "the last pair is noise and says nothing: raise the batch size or `update_every`"
    if block["delta"] > block["tau"] * mu + 1.0 - block["tau"]:
        if block["signal_to_noise"] < NOISY:
            return "pairs are mostly noise: raise the batch size or `update_every`"
        if mu <= 0:
            return "negative curvature along the last pair, replaced by the floor: usual early in training"
        return "the gradient turns more than it grows: the floor gives most of the last pair's curvature"
    if block["cosine"] < LOW_COSINE:
        return "direction almost at right angles to the gradient: if the loss rises, lower the learning rate"
    return "nothing to do"


def remarks(figures: core.Diagnostics) -> list[str]:
    """Sentences about all blocks together: the steps, the skipped steps, and the last check.

    Examples
    --------
    >>> import numpy as np
    >>> state = core.Method(core.Config()).init([np.zeros(3)])
    >>> remarks(core.diagnostics(state))
    ['0 steps taken']
    """
    taken, skipped = int(on_host(figures.step)), int(on_host(figures.skipped))
    window, interval = int(on_host(figures.window)), int(on_host(figures.interval))
    ratio = float(on_host(figures.signal_to_noise))
    said = [f"{_counted(taken)} taken"]
    if skipped:
        said.append(f"{_counted(skipped)} skipped: non-finite gradients")
    if interval:
        said.append(f"{_counted(window)} since the last refresh, which was {interval} after the one before")
    if ratio > 0:
        verdict = "noise" if ratio < NOISY else "signal"
        said.append(f"the last check found signal to noise of {ratio:.2g}: mostly {verdict}")
    return said


def _counted(steps: int) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}"
