"""Diagnostics as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

import mlbfgs_core as core

from .needs import needed
from .rules import advice, remarks
from .sources import figures_of, labels, on_host

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["table"]

_HEADINGS = (
    ("block", "left"),
    ("pairs\nkept", "right"),
    ("last pair's\ncurvature", "right"),
    ("floors\nadded", "right"),
    ("curvatures\nin use", "right"),
    ("cosine to\ngradient", "right"),
    ("what to look at", "left"),
)


def table(source: Any, *, names: Sequence[str] | None = None) -> Table:
    """A table with one row for each block, whose last column says what to look at.

    Parameters
    ----------
    source : optimizer, state, result or records
        An `MLBFGS` of any adapter, an optax state, a result of `minimize_mlbfgs`, or Diagnostics.
    names : sequence of str, optional
        One for each block; by default the optimizer's own.

    Returns
    -------
    rich.table.Table
        For ``rich.print``, or for `rich.console.Console`, which writes plain text if its file is not a
        terminal. The caption counts steps, and says whether some were skipped and what the last check found.

    Raises
    ------
    TypeError, ValueError
        If `source` has no diagnostics, or the number of `names` is wrong.
    ModuleNotFoundError
        Without Rich, which ``mlbfgs[diagnostics]`` installs.

    Notes
    -----
    This waits for the device. The sentences come from `advice` and `remarks`.

    Examples
    --------
    >>> import numpy as np
    >>> from rich.console import Console
    >>> state = core.Method(core.Config()).init([np.zeros(3)])
    >>> shown = table(state)
    >>> [next(iter(column.cells)) for column in shown.columns][:2]
    ['all', '0 of 0']
    >>> shown.caption
    '0 steps taken'
    """
    with needed("table"):
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
    figures = figures_of(source)
    rows = Table(box=SIMPLE_HEAD, caption_justify="left", pad_edge=False, collapse_padding=True)
    for heading, side in _HEADINGS:
        rows.add_column(heading, justify=side, no_wrap=True)
    rows.columns[-1].no_wrap, rows.columns[-1].overflow = False, "fold"
    captions = []
    for number, (record, own) in enumerate(zip(figures, labels(source, figures, names), strict=True)):
        prefix = f"unit{number}: " if len(figures) > 1 else ""
        captions.append(prefix + "; ".join(remarks(record)))
        for cells in _rows(record, own):
            rows.add_row(*cells)
    rows.caption = "\n".join(captions) or "no step yet"
    return rows


def _rows(record: core.Diagnostics, names: Sequence[str]) -> list[list[str]]:
    host = core.Diagnostics(*map(on_host, record))
    spectra, sentences = core.curvatures(host), advice(host)
    result = []
    for block, name in enumerate(names):
        has = host.pairs[block] > 0
        result.append(
            [
                name,
                f"{host.pairs[block]} of {host.pairs[block] + host.rejected[block]}",
                f"{host.mu[block]:.2g}" if has else "-",
                f"{host.delta[block]:.2g}" if has else "-",
                _range(spectra[block]),
                f"{host.cosine[block]:.2f}",
                sentences[block],
            ]
        )
    return result


def _range(values: np.ndarray) -> str:
    there = values[np.isfinite(values)]
    return f"{there[0]:.2g} … {there[-1]:.2g}" if there.size else "-"
