"""Hypothesis strategies: NumPy problems that are then converted to every backend.

Problems are drawn through the seed of a generator, because the two members of a curvature pair belong
together, which element-wise drawing could not ensure.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

generators = st.integers(0, 2**32 - 1).map(np.random.default_rng)
"""NumPy generators, one per drawn seed."""

magnitudes = st.integers(-25, 20).map(lambda exponent: 10.0**exponent)
"""Scales from 1e-25 to 1e20."""


def schedules(length):
    """Which steps of a run have a non-finite gradient, and of which kind."""
    kind = st.sampled_from([None, None, None, np.nan, np.inf, -np.inf])
    return st.lists(kind, min_size=length, max_size=length)
