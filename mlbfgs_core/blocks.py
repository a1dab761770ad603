"""Partition of named leaves into blocks, each with its own curvature."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

__all__ = ["BlockSpec", "Blocks", "one_block", "partition", "validate_blocks"]

Blocks = tuple[tuple[int, ...], ...]
"""The indices of each block's leaves; every leaf is in exactly one block."""

BlockSpec = str | Callable[[str], Hashable]
"""How to form blocks: "all", "layer", "parameter", or a function from a leaf's name to a label."""


def partition(names: Sequence[str], blocks: BlockSpec = "all") -> Blocks:
    """Assign leaves to blocks by their names.

    Parameters
    ----------
    names : sequence of str
        A distinct name for each leaf, components separated by dots ("encoder.0.weight").
    blocks : {"all", "layer", "parameter"} or callable
        "all": one block, the best default for convergence. "layer": leaves whose names agree up to
        the last dot. "parameter": each leaf alone. A callable maps a name to a hashable label, and
        leaves with equal labels share a block. Blocks exist to spread memory and work.

    Returns
    -------
    tuple of tuples of int
        The indices of each block's leaves; blocks are in the order of their first leaf.

    Raises
    ------
    ValueError
        No names, a repeated name, an unknown word, or "layer" where no name has a dot.
    TypeError
        `blocks` is neither a word nor a function, or the function gives an unhashable label.

    Examples
    --------
    >>> partition(["a.weight", "a.bias", "b.weight"], "layer")
    ((0, 1), (2,))
    >>> partition(["x", "y"], lambda name: "shared")
    ((0, 1),)
    """
    if not names:
        msg = "`names` must hold at least one leaf, got none"
        raise ValueError(msg)
    if len(set(names)) < len(names):
        msg = f"`names` must be distinct, got {list(names)}"
        raise ValueError(msg)
    groups: dict[Hashable, list[int]] = {}
    label = _labeller(names, blocks)
    for index, name in enumerate(names):
        value = label(name)
        try:
            groups.setdefault(value, []).append(index)
        except TypeError:
            msg = f"`blocks` must give a hashable label, got {value!r} for {name!r}"
            raise TypeError(msg) from None
    return tuple(tuple(indices) for indices in groups.values())


def _labeller(names: Sequence[str], blocks: BlockSpec) -> Callable[[str], Hashable]:
    if callable(blocks):
        return blocks
    if not isinstance(blocks, str):
        msg = f"`blocks` must be 'all', 'layer', 'parameter' or a function of a name, got {blocks!r}"
        raise TypeError(msg)
    if blocks == "all":
        return lambda _: ""
    if blocks == "parameter":
        return lambda name: name
    if blocks == "layer":
        if not any("." in name for name in names):
            msg = (
                "`blocks`='layer' needs names with dots such as 'encoder.weight' (in PyTorch: pass "
                f"model.named_parameters()), got {list(names)[:3]}"
            )
            raise ValueError(msg)
        return lambda name: name.rpartition(".")[0]
    msg = f"`blocks` must be 'all', 'layer', 'parameter' or a function, got {blocks!r}"
    raise ValueError(msg)


def one_block(count: int) -> Blocks:
    """All `count` leaves in one block."""
    return (tuple(range(count)),)


def validate_blocks(blocks: Blocks, count: int) -> None:
    """Raise ValueError unless each of `count` leaves is in exactly one non-empty block."""
    indices = sorted(index for block in blocks for index in block)
    if indices != list(range(count)) or not all(blocks):
        rule = f"must hold each leaf index 0..{count - 1} exactly once in non-empty blocks"
        msg = f"`blocks` {rule}, got {blocks!r}"
        raise ValueError(msg)
