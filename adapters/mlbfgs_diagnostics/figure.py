"""The figure of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .needs import needed
from .recorder import Recorder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figure"]


def figure(recorder: Recorder, *, block: int = 0) -> Figure:
    """Draw the records of a recorder.

    Parameters
    ----------
    recorder : Recorder
    block : int
        The block whose curvature spectrum is drawn; the other panels show all blocks.

    Returns
    -------
    matplotlib.figure.Figure
        It is not registered with pyplot: ``figure(recorder).savefig("run.png")`` needs no display.

    Raises
    ------
    ValueError
        If nothing has been recorded, or there is no such block.
    ModuleNotFoundError
        Without matplotlib, which ``mlbfgs[diagnostics]`` installs.

    Notes
    -----
    This waits for the device. With more than six blocks, the figure shows their median and range.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_arrays import MLBFGS
    >>> from mlbfgs_diagnostics import Recorder
    >>> x, recorder = np.ones(3), Recorder(every=1)
    >>> optimizer = MLBFGS(x, lr=0.1, preset="fit")
    >>> for _ in range(9):
    ...     optimizer.step(np.asarray([9.0, 3.0, 1.0]) * x)
    ...     recorder.record(optimizer, loss=x @ x)
    >>> len(figure(recorder).axes)
    7
    """
    with needed("figure"):
        from .panels import draw
    return draw(recorder, block)
