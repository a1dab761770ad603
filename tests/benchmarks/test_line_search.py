"""With a line search, `scale_by_mlbfgs(preset="lbfgs")` does what `optax.lbfgs` and SciPy do."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import line_search

NAMES = list(line_search.problems())


@pytest.mark.parametrize("name", NAMES)
def test_minima_are_those_of_optax_and_scipy_after_as_many_iterations(name):
    problem = line_search.problems()[name]
    ours = line_search.run_optax(line_search.ours(), problem.fun, problem.start)
    theirs = line_search.run_optax(line_search.theirs(), problem.fun, problem.start)
    assert ours.grad_norm <= line_search.TOLERANCE
    np.testing.assert_allclose(ours.value, theirs.value, rtol=1e-6, atol=1e-6)
    assert abs(ours.iterations - theirs.iterations) <= 2
    assert ours.evaluations <= 1.2 * theirs.evaluations + 2
    if problem.minimum is not None:
        assert ours.value == pytest.approx(problem.minimum, abs=1e-6)
    if not problem.is_complex:
        scipy = line_search.run_scipy(problem.fun, problem.start)
        np.testing.assert_allclose(ours.value, scipy.value, rtol=1e-6, atol=1e-6)
