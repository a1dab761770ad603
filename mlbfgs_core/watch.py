"""A warning where gradient after gradient is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

__all__ = ["Watch"]

PATIENCE = 20
"""Refused gradients in a row before the warning. A `GradScaler` that starts far too high needs fewer."""


class Watch:
    """Counts gradients in a row that were refused, and warns once if nothing else comes.

    Parameters
    ----------
    optimizer : str
        Its name, for the message.
    """

    def __init__(self, optimizer: str) -> None:
        self._optimizer = optimizer
        self._refused = 0

    def see(self, verdicts: Iterable[bool | None], stacklevel: int = 2) -> None:
        """Take note of a step; of nothing where no verdict is known.

        Parameters
        ----------
        verdicts : iterable of bool or None
            Whether each part of its gradient was finite; None where the host does not know.
        stacklevel : int
            As of `warnings.warn`, counted from the caller.
        """
        known = [verdict for verdict in verdicts if verdict is not None]
        if not known:
            return
        self._refused = 0 if all(known) else self._refused + 1
        if self._refused == PATIENCE:
            rule = "so the parameters stand still: look for NaN or infinity in the loss"
            msg = (
                f"{self._optimizer} has refused the last {PATIENCE} gradients, which were not finite, {rule}"
            )
            warnings.warn(msg, stacklevel=stacklevel + 1)
