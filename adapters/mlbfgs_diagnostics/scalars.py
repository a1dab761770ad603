"""Diagnostics as scalars for TensorBoard, or for any writer with the same method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

import mlbfgs_core as core

from .sources import figures_of, labels, on_host

__all__ = ["Writer", "log_scalars"]


class Writer(Protocol):
    """`torch.utils.tensorboard.SummaryWriter`, tensorboardX's, or anything similar."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> Any:
        """Take one number."""


_OF_UNIT = ("step", "skipped", "window", "interval", "signal_to_noise")
_OF_BLOCK = ("pairs", "rejected", "mu", "tau", "delta", "gamma", "cosine", "gradient_rms")


def log_scalars(
    writer: Writer, source: Any, step: int, *, names: Sequence[str] | None = None, prefix: str = "mlbfgs"
) -> None:
    """Write every figure of the last step.

    Parameters
    ----------
    writer : object
        An object with a method ``add_scalar(tag, value, step)``.
    source : optimizer, state, result or records
        As in `table`.
    step : int
    names : sequence of str, optional
        One for each block; by default the optimizer's own.
    prefix : str
        Prefix of all tags.

    Raises
    ------
    TypeError, ValueError
        As `table`.

    Notes
    -----
    Tags: "mlbfgs/FIELD" for `step`, `skipped`, `window`, `interval` and `signal_to_noise`;
    "mlbfgs/FIELD/BLOCK" for `pairs`, `rejected`, `mu`, `tau`, `delta`, `gamma`, `cosine`, `gradient_rms`,
    and for "curvature_smallest", "curvature_median" and "curvature_largest" once the block has a pair. With
    several units the tags are "mlbfgs/unit0/FIELD" and "mlbfgs/FIELD/unit0/BLOCK". This waits for the device:
    call it every few hundred steps.

    Examples
    --------
    >>> class Printer:
    ...     def add_scalar(self, tag, value, step):
    ...         print(step, tag, value)
    >>> state = core.Method(core.Config()).init([np.zeros(3)])
    >>> log_scalars(Printer(), state, 7)  # doctest: +ELLIPSIS
    7 mlbfgs/step 0.0
    7 mlbfgs/skipped 0.0
    ...
    7 mlbfgs/gamma/all 1.0
    ...
    """
    figures = figures_of(source)
    for number, (record, own) in enumerate(zip(figures, labels(source, figures, names), strict=True)):
        host = core.Diagnostics(*map(on_host, record))
        unit = f"{prefix}/unit{number}" if len(figures) > 1 else prefix
        for name in _OF_UNIT:
            writer.add_scalar(f"{unit}/{name}", float(getattr(host, name)), step)
        for name, values in _of_blocks(host):
            for block, value in zip(own, values, strict=True):
                if np.isfinite(value) or not name.startswith("curvature"):
                    writer.add_scalar(f"{prefix}/{name}/{block}", float(value), step)


def _of_blocks(host: core.Diagnostics) -> Iterator[tuple[str, np.ndarray]]:
    for name in _OF_BLOCK:
        yield name, getattr(host, name)
    spectra = core.curvatures(host)
    if spectra.shape[1] == 0:  # no pairs are kept
        return
    counts = np.sum(np.isfinite(spectra), axis=1)
    rows = np.arange(len(counts))
    for name, place in (("smallest", 0 * counts), ("median", (counts - 1) // 2), ("largest", counts - 1)):
        yield f"curvature_{name}", spectra[rows, place]
