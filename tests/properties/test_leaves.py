"""Parameters and flat leaves: each parameter lies in one leaf of its block, and comes back unchanged."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from array_api_compat import array_namespace
from hypothesis import given
from hypothesis import strategies as st

from mlbfgs_core import leaves
from mlbfgs_core.adapter import FlatLeaf, pack

PARAMETERS = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from([None, "a", "b"]), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)
"""Size, kind and block of each parameter."""


def in_blocks(labels):
    blocks = {}
    for index, label in enumerate(labels):
        blocks.setdefault(label, []).append(index)
    return tuple(map(tuple, blocks.values()))


@given(parameters=PARAMETERS)
def test_leaves_part_the_parameters_within_blocks_and_kinds(parameters):
    largest, leaves.LARGEST = leaves.LARGEST, 12
    try:
        sizes, kinds, labels = zip(*parameters, strict=True)
        blocks = in_blocks(labels)
        groups, of_leaves = pack(sizes, kinds, blocks)
    finally:
        leaves.LARGEST = largest
    assert sorted(i for group in groups for i in group) == list(range(len(parameters)))
    assert sorted(i for block in of_leaves for i in block) == list(range(len(groups)))
    assert len(of_leaves) == len(blocks)
    for block, own in zip(blocks, of_leaves, strict=True):
        assert {i for leaf in own for i in groups[leaf]} == set(block)
    for group in groups:
        assert list(group) == sorted(group)
        if len(group) > 1:
            assert len({kinds[i] for i in group}) == 1
            assert kinds[group[0]] is not None
            assert sum(sizes[i] for i in group) <= 12


class Plain(NamedTuple):
    """A parameter whose axes lie in their order."""

    shape: tuple[int, ...]
    dense: bool = True

    @property
    def size(self):
        return int(np.prod(self.shape, dtype=int))

    def flat(self, array):
        lead = array.shape[: array.ndim - len(self.shape)]
        return array_namespace(array).reshape(array, (*lead, self.size))

    def shaped(self, flat):
        return array_namespace(flat).reshape(flat, (*flat.shape[:-1], *self.shape))


@pytest.mark.parametrize("lead", [(), (2, 3)])
@given(shapes=st.lists(st.sampled_from([(), (0, 2), (3,), (2, 3)]), min_size=1, max_size=5))
def test_what_is_gathered_is_spread_as_it_was(xp, lead, shapes):
    leaf = FlatLeaf([Plain(shape) for shape in shapes])
    count = iter(range(10**6))
    arrays = []
    for shape in shapes:
        values = np.asarray([next(count) for _ in range(int(np.prod((*lead, *shape), dtype=int)))], float)
        arrays.append(xp.asarray(values.reshape((*lead, *shape))))
    flat = leaf.gather(arrays)
    assert tuple(flat.shape) == (*lead, sum(member.size for member in leaf.members))
    for array, back in zip(arrays, leaf.spread(flat), strict=True):
        assert tuple(array.shape) == tuple(back.shape)
        assert bool(xp.all(array == back))
