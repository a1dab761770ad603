"""`minimize_mlbfgs` against L-BFGS-B on the problems of Moré, Garbow and Hillstrom."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from scipy import optimize

from benchmarks import minimize


@pytest.fixture(scope="module")
def comparisons():
    small = itertools.islice(minimize.problems(), 20)
    with np.errstate(all="ignore"):
        return {problem.name: minimize.compare(problem) for problem in small if problem.name != "Meyer"}


def test_minima_of_lbfgsb_take_at_most_a_fifth_more_evaluations(comparisons):
    assert len(comparisons) == 19
    for name, comparison in comparisons.items():
        assert minimize.reaches(comparison.ours, comparison.theirs), name
        assert comparison.ours.success, name
    assert np.median([comparison.gradient_ratio for comparison in comparisons.values()]) <= 1.2
    assert np.median([comparison.value_ratio for comparison in comparisons.values()]) <= 1.2


def test_residuals_have_the_published_minima():
    for problem in minimize.PROBLEMS:
        assert any(
            least_squares(problem) == pytest.approx(least, rel=5e-6, abs=1e-12) for least in problem.minima
        ), problem.name


def least_squares(problem):
    """The sum of squares that SciPy's Levenberg-Marquardt method ends with."""
    both = jax.jit(lambda x: (problem.residuals(x), jax.jacfwd(problem.residuals)(x)))
    found = optimize.least_squares(
        lambda x: np.asarray(both(x)[0]),
        problem.start,
        jac=lambda x: np.asarray(both(x)[1]),
        method="lm",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
    )
    return 2 * found.cost
