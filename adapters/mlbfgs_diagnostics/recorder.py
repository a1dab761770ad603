"""Diagnostics over a run, kept on the device until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

import mlbfgs_core as core

from .sources import copied, figures_of, labels, on_host

__all__ = ["Reading", "Recorder"]


class Reading(NamedTuple):
    """The figures of one recorded step, as NumPy arrays."""

    call: int
    """Number of the call of `Recorder.record`, counted from 0: the step of the training loop."""
    loss: float
    """NaN if none was given."""
    figures: tuple[core.Diagnostics, ...]
    """One for each unit."""
    curvatures: tuple[npt.NDArray[Any], ...]
    """(B, 2m) for each unit, from `mlbfgs_core.curvatures`."""


class _Record(NamedTuple):
    """A reading that has not been fetched from the device yet."""

    call: int
    loss: Any
    figures: tuple[core.Diagnostics, ...]


class Recorder:
    """Records diagnostics and curvatures every few steps, without waiting for the device.

    Parameters
    ----------
    every : int
        Calls from one record to the next, at the start.
    capacity : int
        Largest number of records. When it is exceeded every second record is dropped, and from then on
        records are twice as far apart: ``capacity / 2`` to `capacity` records always cover the whole run.
    names : sequence of str, optional
        One for each block; by default the optimizer's own.

    Attributes
    ----------
    every : int
        Current number of calls from one record to the next.
    names : list of str
        The names of all blocks, from the last record.

    Raises
    ------
    TypeError, ValueError
        For a size that is not a whole number, or too small.

    Notes
    -----
    A record is a copy, on the device, of the figures of `mlbfgs_core.Diagnostics`, about ``(8 m^2 + 8) * 4``
    bytes per block. All records together take at most `capacity` times that (0.8 MB per block with the
    default settings), until `readings` fetches them and computes eigenvalues on the host.

    Examples
    --------
    >>> import numpy as np
    >>> from mlbfgs_arrays import MLBFGS
    >>> x = np.ones(3)
    >>> optimizer, recorder = MLBFGS(x, lr=0.1), Recorder(every=2)
    >>> for _ in range(5):
    ...     optimizer.step(2 * x)
    ...     recorder.record(optimizer, loss=x @ x)
    >>> [reading.call for reading in recorder.readings()]
    [0, 2, 4]
    """

    def __init__(self, every: int = 10, capacity: int = 256, *, names: Sequence[str] | None = None) -> None:
        for name, value, least in (("every", every, 1), ("capacity", capacity, 2)):
            if not isinstance(value, int) or isinstance(value, bool):
                msg = f"`{name}` must be an int, got {value!r}"
                raise TypeError(msg)
            if value < least:
                msg = f"`{name}` must be >= {least}, got {value!r}"
                raise ValueError(msg)
        self.every, self._capacity = every, capacity
        self._given = names
        self._calls = 0
        self._records: list[_Record | Reading] = []
        self.names: list[str] = []

    def record(self, source: Any, loss: Any = None) -> None:
        """Record the figures of the step that was just taken, if one is due.

        Parameters
        ----------
        source : optimizer, state, result or records
            As in `table`.
        loss : number or 0-d array, optional
            An array is copied on its device.

        Raises
        ------
        TypeError, ValueError
            As `table`.
        """
        call = self._calls
        self._calls += 1
        if call % self.every:
            return
        figures = figures_of(source)
        if len(self._records) == self._capacity:
            self._records = self._records[::2]
            self.every *= 2
            if call % self.every:
                return
        self.names = [name for unit in labels(source, figures, self._given) for name in unit]
        kept = tuple(core.Diagnostics(*map(copied, record)) for record in figures)
        self._records.append(_Record(call, None if loss is None else copied(loss), kept))

    def readings(self) -> list[Reading]:
        """All records, fetched from the device; this waits for it."""
        read = [_read(record) if isinstance(record, _Record) else record for record in self._records]
        self._records = list(read)
        return read

    def series(self, name: str) -> npt.NDArray[np.float64]:
        """One figure over the run.

        Parameters
        ----------
        name : str
            "loss", or a field of `mlbfgs_core.Diagnostics` that is a number or one for each block.

        Returns
        -------
        (records,) array, or (records, blocks) for a figure that each block has
            A number is that of the first unit; otherwise the blocks of all units follow one another. NaN if a
            record has none.
        """
        read = self.readings()
        if name == "loss":
            return np.asarray([reading.loss for reading in read], dtype=np.float64)
        rows = [[getattr(record, name) for record in reading.figures] for reading in read]
        if all(value.ndim == 0 for row in rows for value in row):
            return np.asarray([row[0] if row else np.nan for row in rows], dtype=np.float64)
        flat = [np.concatenate(row) if row else np.zeros(0) for row in rows]
        return _padded(flat, max(map(len, flat)))

    def calls(self) -> npt.NDArray[np.int64]:
        """(records,): the numbers of the calls that were recorded."""
        return np.asarray([record.call for record in self._records], dtype=np.int64)

    def spectra(self, block: int = 0) -> npt.NDArray[np.float64]:
        """(records, 2m): a block's curvatures over the run, in rising order, padded with NaN."""
        rows = []
        for reading in self.readings():
            blocks = [own for unit in reading.curvatures for own in unit]
            rows.append(blocks[block] if block < len(blocks) else np.zeros(0))
        return _padded(rows, max(map(len, rows), default=0))


def _read(record: _Record) -> Reading:
    figures = tuple(core.Diagnostics(*map(on_host, own)) for own in record.figures)
    loss = np.nan if record.loss is None else float(on_host(record.loss))
    return Reading(record.call, loss, figures, tuple(core.curvatures(own) for own in figures))


def _padded(rows: Sequence[npt.NDArray[Any]], length: int) -> npt.NDArray[np.float64]:
    result = np.full((len(rows), length), np.nan)
    for row, values in zip(result, rows, strict=True):
        row[: len(values)] = values
    return result
