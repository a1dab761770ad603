"""Which axes of a parameter make the matrices of a Kronecker preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .config import Config
from .preconditioner import Matrix, preconditioner_of

__all__ = ["MatrixAxes", "axes_in", "check_matrix_axes", "matrices_in"]

Axes = tuple[int, int] | None
MatrixAxes = Mapping[str, Axes] | Callable[[str, tuple[int, ...]], Axes] | None
"""For a parameter's name (and its shape) how many of its leading axes count layers, and how many of the next
form the rows; all others form the columns. None: the parameter has no matrix. Names that a mapping lacks, and
all if there is no mapping, have (0, 1): the first axis against the rest."""


def matrices_in(
    config: Config,
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    axes: MatrixAxes = None,
    real_shapes: Sequence[tuple[int, ...]] | None = None,
) -> list[Matrix | None]:
    """The matrices of named parameters; None for each without, and for all if the settings have no use for
    them. With complex parameters the shapes of their leaves, which have a last axis for the two parts, are
    `real_shapes`.

    Raises
    ------
    ValueError
        A name in `axes` that no parameter has, or numbers that do not fit a shape.
    TypeError
        `axes` of another kind.

    Examples
    --------
    Twelve layers stacked along the first axis:

    >>> config = Config(preconditioner="kronecker")
    >>> matrices_in(config, ["w", "b"], [(12, 64, 256), (12, 64)], {"w": (1, 1), "b": None})
    [Matrix(count=12, rows=64, columns=256, left=True, right=True), None]
    """
    check_matrix_axes(axes, names)
    found = [axes_in(config, name, shape, axes) for name, shape in zip(names, shapes, strict=True)]
    return [
        None if own is None else Matrix.of(shape, config.max_preconditioner_dim, own)
        for shape, own in zip(real_shapes or shapes, found, strict=True)
    ]


def axes_in(config: Config, name: str, shape: tuple[int, ...], axes: MatrixAxes) -> tuple[int, int] | None:
    """How many leading axes of a parameter for which `check_matrix_axes` has found nothing wrong count
    matrices, and how many of the next form their rows; None if it has none. ValueError for what does not
    fit."""
    if not preconditioner_of(config).has_matrices:
        return None
    return _checked(name, shape, _axes(axes, name, shape))


def check_matrix_axes(axes: MatrixAxes, names: Sequence[str]) -> None:
    """Raise TypeError or ValueError unless this is a function or a mapping of some of these names."""
    if axes is not None and not callable(axes) and not isinstance(axes, Mapping):
        msg = f"`matrix_axes` must be None, a mapping of names or a function, got {axes!r}"
        raise TypeError(msg)
    if isinstance(axes, Mapping) and (unknown := set(axes) - set(names)):
        rule = f"must hold names of parameters, such as {list(names)[:3]}"
        msg = f"`matrix_axes` {rule}, got {sorted(unknown, key=str)[0]!r}"
        raise ValueError(msg)


def _axes(axes: MatrixAxes, name: str, shape: tuple[int, ...]) -> Any:
    if axes is None:
        return (0, 1)
    return axes(name, shape) if callable(axes) else axes.get(name, (0, 1))


def _checked(name: str, shape: tuple[int, ...], axes: Any) -> tuple[int, int] | None:
    if axes is None:
        return None
    pair = tuple(axes) if isinstance(axes, (tuple, list)) else ()
    if len(pair) != 2 or not all(type(number) is int for number in pair) or pair[0] < 0 or pair[1] < 1:
        rule = (
            "must give None or two ints, the axes that count matrices (>= 0) and those of their rows (>= 1)"
        )
        msg = f"`matrix_axes` {rule}, got {axes!r} for {name!r}"
        raise ValueError(msg)
    if pair == (0, 1) and len(shape) < 2:
        return None
    if sum(pair) >= len(shape):
        msg = f"`matrix_axes` must leave axes for the columns, got {pair} for {name!r} of shape {shape}"
        raise ValueError(msg)
    return pair[0], pair[1]
