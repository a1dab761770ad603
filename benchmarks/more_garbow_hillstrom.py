"""The 35 test problems of Moré, Garbow and Hillstrom: residuals, standard starts, published minima.

Each problem is a sum of squares of residuals, written in JAX so that gradients are exact. Where the paper
leaves the dimension open, `PROBLEMS` says which one is used.

References
----------
Moré, Garbow, Hillstrom, "Testing Unconstrained Optimization Software", ACM Transactions on Mathematical
Software 7(1), 1981, pp. 17-41; numbers of problems and symbols are those of its section 3. In problem 11 the
base of the power is ``y_i - x_2``, as in the collection CUTEst (Gould, Orban, Toint 2015), where the paper
prints a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["PROBLEMS", "Problem"]

Array = jax.Array


class Problem(NamedTuple):
    """A sum of squares, where a run starts, and the values of its minima."""

    name: str
    residuals: Callable[[Array], Array]
    start: np.ndarray
    minima: tuple[float, ...]
    """These have six digits, and include local minima and the limits of valleys that fall forever."""

    def value(self, x: Array) -> Array:
        """The sum of the squared residuals, 0-d."""
        return jnp.sum(self.residuals(x) ** 2)


def count(last: int) -> Array:
    """1, 2, ..., `last`."""
    return jnp.arange(1.0, last + 1.0)


def rosenbrock(x: Array) -> Array:
    """Problems 1 and 21."""
    odd, even = x[::2], x[1::2]
    return jnp.concatenate([10 * (even - odd**2), 1 - odd])


def freudenstein_roth(x: Array) -> Array:
    """Problem 2."""
    a, b = x
    return jnp.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Array) -> Array:
    """Problem 3."""
    a, b = x
    return jnp.stack([1e4 * a * b - 1, jnp.exp(-a) + jnp.exp(-b) - 1.0001])


def brown_badly_scaled(x: Array) -> Array:
    """Problem 4."""
    a, b = x
    return jnp.stack([a - 1e6, b - 2e-6, a * b - 2])


def beale(x: Array) -> Array:
    """Problem 5."""
    a, b = x
    return jnp.asarray([1.5, 2.25, 2.625]) - a * (1 - b ** jnp.arange(1, 4))


def jennrich_sampson(x: Array) -> Array:
    """Problem 6."""
    i = count(10)
    return 2 + 2 * i - jnp.exp(i * x[0]) - jnp.exp(i * x[1])


def helical_valley(x: Array) -> Array:
    """Problem 7."""
    a, b, c = x
    turn = jnp.arctan(b / a) / (2 * jnp.pi) + jnp.where(a < 0, 0.5, 0.0)
    return jnp.stack([10 * (c - 10 * turn), 10 * (jnp.sqrt(a**2 + b**2) - 1), c])


def bard(x: Array) -> Array:
    """Problem 8."""
    u = count(15)
    v = 16 - u
    y = "0.14 0.18 0.22 0.25 0.29 0.32 0.35 0.39 0.37 0.58 0.73 0.96 1.34 2.10 4.39"
    return data(y) - x[0] - u / (v * x[1] + jnp.minimum(u, v) * x[2])


def gaussian(x: Array) -> Array:
    """Problem 9."""
    rise = data("0.0009 0.0044 0.0175 0.0540 0.1295 0.2420 0.3521")
    y = jnp.concatenate([rise, jnp.asarray([0.3989]), rise[::-1]])
    return x[0] * jnp.exp(-x[1] * ((8 - count(15)) / 2 - x[2]) ** 2 / 2) - y


def meyer(x: Array) -> Array:
    """Problem 10."""
    y = "34780 28610 23650 19630 16370 13720 11540 9744 8261 7030 6005 5147 4427 3820 3307 2872"
    return x[0] * jnp.exp(x[1] / (45 + 5 * count(16) + x[2])) - data(y)


def gulf(x: Array) -> Array:
    """Problem 11, with 99 residuals."""
    t = count(99) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def box(x: Array) -> Array:
    """Problem 12, with 10 residuals."""
    t = count(10) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def powell_singular(x: Array) -> Array:
    """Problems 13 and 22."""
    a, b, c, d = jnp.reshape(x, (-1, 4)).T
    parts = [a + 10 * b, jnp.sqrt(5) * (c - d), (b - 2 * c) ** 2, jnp.sqrt(10) * (a - d) ** 2]
    return jnp.concatenate(parts)


def wood(x: Array) -> Array:
    """Problem 14."""
    a, b, c, d = x
    valleys = [10 * (b - a**2), 1 - a, jnp.sqrt(90) * (d - c**2), 1 - c]
    return jnp.stack([*valleys, jnp.sqrt(10) * (b + d - 2), (b - d) / jnp.sqrt(10)])


def kowalik_osborne(x: Array) -> Array:
    """Problem 15."""
    y = data("0.1957 0.1947 0.1735 0.1600 0.0844 0.0627 0.0456 0.0342 0.0323 0.0235 0.0246")
    u = data("4 2 1 0.5 0.25 0.167 0.125 0.1 0.0833 0.0714 0.0625")
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Array) -> Array:
    """Problem 16, with 20 residuals."""
    t = count(20) / 5
    return (x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


def osborne_1(x: Array) -> Array:
    """Problem 17."""
    y = (
        "0.844 0.908 0.932 0.936 0.925 0.908 0.881 0.850 0.818 0.784 0.751 0.718 0.685 0.658 0.628 0.603 "
        "0.580 0.558 0.538 0.522 0.506 0.490 0.478 0.467 0.457 0.448 0.438 0.431 0.424 0.420 0.414 0.411 "
        "0.406"
    )
    t = 10 * (count(33) - 1)
    return data(y) - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs_exp6(x: Array) -> Array:
    """Problem 18, with 13 residuals."""
    t = count(13) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


def osborne_2(x: Array) -> Array:
    """Problem 19."""
    y = (
        "1.366 1.191 1.112 1.013 0.991 0.885 0.831 0.847 0.786 0.725 0.746 0.679 0.608 0.655 0.616 0.606 "
        "0.602 0.626 0.651 0.724 0.649 0.649 0.694 0.644 0.624 0.661 0.612 0.558 0.533 0.495 0.500 0.423 "
        "0.395 0.375 0.372 0.391 0.396 0.405 0.428 0.429 0.523 0.562 0.607 0.653 0.672 0.708 0.633 0.668 "
        "0.645 0.632 0.591 0.559 0.597 0.625 0.739 0.710 0.729 0.720 0.636 0.581 0.428 0.292 0.162 0.098 "
        "0.054"
    )
    t = (count(65) - 1) / 10
    peaks = [x[1 + k] * jnp.exp(-((t - x[8 + k]) ** 2) * x[5 + k]) for k in range(3)]
    return data(y) - (x[0] * jnp.exp(-t * x[4]) + sum(peaks))


def watson(x: Array) -> Array:
    """Problem 20."""
    powers = (count(29) / 29)[:, None] ** jnp.arange(x.size)
    slope = powers[:, :-1] @ (jnp.arange(1, x.size) * x[1:])
    return jnp.concatenate([slope - (powers @ x) ** 2 - 1, jnp.stack([x[0], x[1] - x[0] ** 2 - 1])])


def penalty_1(x: Array) -> Array:
    """Problem 23."""
    return jnp.append(jnp.sqrt(1e-5) * (x - 1), jnp.sum(x**2) - 0.25)


def penalty_2(x: Array) -> Array:
    """Problem 24."""
    i, e = count(x.size), jnp.exp(x / 10)
    y = jnp.exp(i / 10)
    neighbours = jnp.sqrt(1e-5) * (e[1:] + e[:-1] - y[1:] - y[:-1])
    single = jnp.sqrt(1e-5) * (e[1:] - jnp.exp(-0.1))
    return jnp.concatenate([x[:1] - 0.2, neighbours, single, jnp.sum(i[::-1] * x**2)[None] - 1])


def variably_dimensioned(x: Array) -> Array:
    """Problem 25."""
    total = jnp.sum(count(x.size) * (x - 1))
    return jnp.concatenate([x - 1, jnp.stack([total, total**2])])


def trigonometric(x: Array) -> Array:
    """Problem 26."""
    return x.size - jnp.sum(jnp.cos(x)) + count(x.size) * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear(x: Array) -> Array:
    """Problem 27."""
    return jnp.append(x[:-1] + jnp.sum(x) - (x.size + 1), jnp.prod(x) - 1)


def discrete_boundary_value(x: Array) -> Array:
    """Problem 28."""
    h = 1 / (x.size + 1)
    wide = jnp.pad(x, 1)
    return 2 * x - wide[:-2] - wide[2:] + h**2 * (x + h * count(x.size) + 1) ** 3 / 2


def discrete_integral_equation(x: Array) -> Array:
    """Problem 29."""
    h = 1 / (x.size + 1)
    t = h * count(x.size)
    cubes = (x + t + 1) ** 3
    kernel = jnp.minimum(t[:, None], t) * (1 - jnp.maximum(t[:, None], t))
    return x + h * (kernel @ cubes) / 2


def broyden_tridiagonal(x: Array) -> Array:
    """Problem 30."""
    wide = jnp.pad(x, 1)
    return (3 - 2 * x) * x - wide[:-2] - 2 * wide[2:] + 1


def broyden_banded(x: Array) -> Array:
    """Problem 31."""
    n = x.size
    band = sum(jnp.eye(n, k=k) for k in (-5, -4, -3, -2, -1, 1))
    return x * (2 + 5 * x**2) + 1 - band @ (x * (1 + x))


def linear_full_rank(x: Array) -> Array:
    """Problem 32, with twice as many residuals as variables."""
    m = 2 * x.size
    return jnp.pad(x, (0, x.size)) - 2 * jnp.sum(x) / m - 1


def linear_rank_1(x: Array) -> Array:
    """Problem 33, with twice as many residuals as variables."""
    return count(2 * x.size) * jnp.sum(count(x.size) * x) - 1


def linear_rank_1_with_zeros(x: Array) -> Array:
    """Problem 34, with twice as many residuals as variables."""
    m = 2 * x.size
    inner = (count(m)[1:-1] - 1) * jnp.sum((count(x.size) * x)[1:-1])
    return jnp.pad(inner, 1) - 1


def chebyquad(x: Array) -> Array:
    """Problem 35, with as many residuals as variables."""
    before, now, means = jnp.ones_like(x), 2 * x - 1, []
    for _ in range(x.size):
        means.append(jnp.mean(now))
        before, now = now, 2 * (2 * x - 1) * now - before
    i = np.arange(1, x.size + 1)
    return jnp.stack(means) + np.where(i % 2 == 0, 1 / np.maximum(i**2 - 1, 1), 0.0)


def data(values: str) -> Array:
    """Numbers of a table."""
    return jnp.asarray([float(value) for value in values.split()])


def _problems() -> tuple[Problem, ...]:
    def n(size: int) -> np.ndarray:
        return np.arange(1.0, size + 1.0)

    def bow(size: int) -> np.ndarray:
        t = n(size) / (size + 1)
        return t * (t - 1)

    m = 2 * 10
    rows = [
        ("Rosenbrock", rosenbrock, [-1.2, 1], 0.0),
        ("Freudenstein and Roth", freudenstein_roth, [0.5, -2], 0.0, 48.9843),
        ("Powell badly scaled", powell_badly_scaled, [0, 1], 0.0),
        ("Brown badly scaled", brown_badly_scaled, [1, 1], 0.0),
        ("Beale", beale, [1, 1], 0.0),
        ("Jennrich and Sampson", jennrich_sampson, [0.3, 0.4], 124.362),
        ("helical valley", helical_valley, [-1, 0, 0], 0.0),
        ("Bard", bard, [1, 1, 1], 8.21488e-3, 17.4287),
        ("Gaussian", gaussian, [0.4, 1, 0], 1.12793e-8),
        ("Meyer", meyer, [0.02, 4000, 250], 87.9459),
        ("Gulf research", gulf, [5, 2.5, 0.15], 0.0),
        ("Box three-dimensional", box, [0, 10, 20], 0.0),
        ("Powell singular", powell_singular, [3, -1, 0, 1], 0.0),
        ("Wood", wood, [-3, -1, -3, -1], 0.0),
        ("Kowalik and Osborne", kowalik_osborne, [0.25, 0.39, 0.415, 0.39], 3.07506e-4, 1.02734e-3),
        ("Brown and Dennis", brown_dennis, [25, 5, -5, -1], 85822.2),
        ("Osborne 1", osborne_1, [0.5, 1.5, -1, 0.01, 0.02], 5.46489e-5),
        ("Biggs EXP6", biggs_exp6, [1, 2, 1, 1, 1, 1], 0.0, 5.65565e-3),
        ("Osborne 2", osborne_2, [1.3, 0.65, 0.65, 0.7, 0.6, 3, 5, 7, 2, 4.5, 5.5], 4.01377e-2),
        ("Watson", watson, np.zeros(6), 2.28767e-3),
        ("extended Rosenbrock", rosenbrock, np.tile([-1.2, 1], 10), 0.0),
        ("extended Powell singular", powell_singular, np.tile([3, -1, 0, 1], 5), 0.0),
        ("penalty I", penalty_1, n(10), 7.08765e-5),
        ("penalty II", penalty_2, np.full(10, 0.5), 2.93660e-4),
        ("variably dimensioned", variably_dimensioned, 1 - n(10) / 10, 0.0),
        ("trigonometric", trigonometric, np.full(10, 0.1), 0.0, 2.79506e-5),
        ("Brown almost-linear", brown_almost_linear, np.full(10, 0.5), 0.0, 1.0),
        ("discrete boundary value", discrete_boundary_value, bow(10), 0.0),
        ("discrete integral equation", discrete_integral_equation, bow(10), 0.0),
        ("Broyden tridiagonal", broyden_tridiagonal, -np.ones(10), 0.0),
        ("Broyden banded", broyden_banded, -np.ones(10), 0.0),
        ("linear, full rank", linear_full_rank, np.ones(10), m - 10.0),
        ("linear, rank 1", linear_rank_1, np.ones(10), m * (m - 1) / (2 * (2 * m + 1))),
        (
            "linear, rank 1, zeros",
            linear_rank_1_with_zeros,
            np.ones(10),
            (m**2 + 3 * m - 6) / (2 * (2 * m - 3)),
        ),
        ("Chebyquad", chebyquad, n(10) / 11, 6.50395e-3),
    ]
    return tuple(
        Problem(name, residuals, np.asarray(start, dtype=np.float64), minima)
        for name, residuals, start, *minima in rows
    )


PROBLEMS = _problems()
"""The problems in the order of the paper, starting with its problem 1."""
