"""`minimize_mlbfgs` and SciPy's L-BFGS-B from the same starts: minima, evaluations, failures.

The 35 problems of Moré, Garbow and Hillstrom at their standard starts, and SciPy's `rosen` in three larger
dimensions (their first problem is the one in two). Both methods keep ten pairs, take exact gradients in
float64, and run until no component of the gradient exceeds 1e-5; L-BFGS-B has `ftol=0`, so that only a value
that does not fall at all ends it earlier. Functions and gradients are separate, and each call is counted.

A run *reaches* the minimum if no component of its last gradient exceeds the tolerance, or if its value
exceeds the other run's by at most 1e-6 of it plus 1e-9.

The time of an iteration includes that of SciPy's `rosen` and its gradient, which are cheap, so it shows what
the methods themselves take. The two methods take turns, and the shortest of several runs counts, since other
work on the machine only adds to it.

Run ``python3 -m nox -s bench -- minimize``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.optimize import OptimizeResult, minimize, rosen, rosen_der

from benchmarks.more_garbow_hillstrom import PROBLEMS
from mlbfgs_scipy import minimize_mlbfgs

__all__ = ["Comparison", "Problem", "compare", "problems", "reaches"]

TOLERANCE, HISTORY, ITERATIONS = 1e-5, 10, 15000
NEAR, NEAR_ZERO = 1e-6, 1e-9
LARGER_ROSENBROCKS = (10, 100, 1000)
TIMED, TURNS, TIMED_ITERATIONS = (2, 10, 100, 1000, 10_000), 7, 200
Vector = np.ndarray
METHODS = {
    "minimize_mlbfgs": {"method": minimize_mlbfgs, "options": {"history_size": HISTORY}},
    "L-BFGS-B": {
        "method": "L-BFGS-B",
        "options": {"maxcor": HISTORY, "ftol": 0.0, "maxfun": 100 * ITERATIONS},
    },
}


class Problem(NamedTuple):
    """A function, its gradient, and where a run starts."""

    name: str
    fun: Callable[[Vector], float]
    jac: Callable[[Vector], Vector]
    start: Vector


class Comparison(NamedTuple):
    """The results of both methods on a problem."""

    ours: OptimizeResult
    theirs: OptimizeResult

    @property
    def value_ratio(self) -> float:
        """Ratio of our evaluations of the function to theirs."""
        return self.ours.nfev / self.theirs.nfev

    @property
    def gradient_ratio(self) -> float:
        """Ratio of our evaluations of the gradient to theirs."""
        return self.ours.njev / self.theirs.njev


def problems() -> Iterator[Problem]:
    """The problems of the table, in its order; this needs JAX's float64."""
    for problem in PROBLEMS:
        fun, jac = compiled(problem.value)
        yield Problem(problem.name, fun, jac, problem.start)
    for n in LARGER_ROSENBROCKS:
        yield Problem("SciPy's rosen", rosen, rosen_der, np.tile([-1.2, 1.0], n // 2))


def compiled(
    value: Callable[[jax.Array], jax.Array],
) -> tuple[Callable[[Vector], float], Callable[[Vector], Vector]]:
    """A function and its gradient on NumPy arrays."""
    both = jax.jit(jax.value_and_grad(value))

    def fun(x: Vector) -> float:
        return float(both(x)[0])

    def jac(x: Vector) -> Vector:
        return np.asarray(both(x)[1])

    return fun, jac


def compare(problem: Problem) -> Comparison:
    """Run both methods."""
    return Comparison(*(run(problem, **arguments) for arguments in METHODS.values()))


def run(problem: Problem, *, method: Any, options: dict[str, Any]) -> OptimizeResult:
    """One method's result, with its evaluations as counted here."""
    calls = {"nfev": 0, "njev": 0}

    def counted(name: str, function: Callable[[Vector], Any]) -> Callable[[Vector], Any]:
        def call(x: Vector) -> Any:
            calls[name] += 1
            return function(x)

        return call

    result = minimize(
        counted("nfev", problem.fun),
        problem.start,
        jac=counted("njev", problem.jac),
        method=method,
        options={"gtol": TOLERANCE, "maxiter": ITERATIONS, **options},
    )
    result.update(calls)
    return result


def reaches(result: OptimizeResult, other: OptimizeResult) -> bool:
    """Whether a run reached a minimum, the one that the other run found or another."""
    near = result.fun <= other.fun + NEAR * abs(other.fun) + NEAR_ZERO
    return bool(steepness(result) <= TOLERANCE or near)


def steepness(result: OptimizeResult) -> float:
    """The largest component of the gradient."""
    return float(np.max(np.abs(result.jac)))


def report(rows: list[tuple[Problem, Comparison]]) -> Iterator[str]:
    """The table, its medians, and the runs that failed."""
    columns = f"{'iter':>5}{'fun':>6}{'grad':>6}{'value':>14}{'|grad|':>9}"
    yield f"{'':26}{'':5}" + "".join(f"  {name:^{len(columns)}}" for name in METHODS) + "   ratio of"
    yield f"{'':26}{'n':>5}" + f"  {columns}" * len(METHODS) + "   fun  grad"
    for problem, comparison in rows:
        line = f"{problem.name:26}{problem.start.size:5d}"
        for result in comparison:
            line += f"  {result.nit:5d}{result.nfev:6d}{result.njev:6d}"
            line += f"{result.fun:14.6e}{steepness(result):9.1e}"
        yield f"{line}  {comparison.value_ratio:4.2f}  {comparison.gradient_ratio:4.2f}"
    both = [c for _, c in rows if reaches(c.ours, c.theirs) and reaches(c.theirs, c.ours)]
    yield ""
    for number, name in enumerate(METHODS):
        count = sum(steepness(comparison[number]) <= TOLERANCE for _, comparison in rows)
        yield f"gradient within the tolerance: {name} on {count} of {len(rows)} problems"
    yield f"median of {len(both)} problems where both reach the minimum: " + ratios(both)
    yield f"median of all {len(rows)} problems: " + ratios([comparison for _, comparison in rows])
    product = np.exp(np.mean(np.log([comparison.value_ratio for comparison in both])))
    yield f"geometric mean of the first: {product:.2f} times the functions"
    yield ""
    for problem, (ours, theirs) in rows:
        for name, result, other in zip(METHODS, (ours, theirs), (theirs, ours), strict=True):
            reason = result.message.partition(":")[0] if name == "minimize_mlbfgs" else result.message
            if not reaches(result, other):
                yield f"{problem.name}: {name} does not reach the minimum ({reason})"
            elif steepness(result) > TOLERANCE:
                yield f"{problem.name}: {name} stops above the tolerance ({reason})"


def ratios(comparisons: list[Comparison]) -> str:
    """The medians of both ratios."""
    values = np.median([comparison.value_ratio for comparison in comparisons])
    gradients = np.median([comparison.gradient_ratio for comparison in comparisons])
    return f"{values:.2f} times the functions, {gradients:.2f} times the gradients of L-BFGS-B"


def microseconds(n: int) -> list[float]:
    """The time of an iteration with each method, including evaluations of `rosen`."""
    best = [np.inf] * len(METHODS)
    start = np.tile([-1.2, 1.0], n // 2)
    for _ in range(TURNS):
        for number, arguments in enumerate(METHODS.values()):
            options = {"gtol": TOLERANCE, "maxiter": TIMED_ITERATIONS, **arguments["options"]}
            began = time.process_time()
            result = minimize(rosen, start, jac=rosen_der, method=arguments["method"], options=options)
            best[number] = min(best[number], (time.process_time() - began) / result.nit * 1e6)
    return best


def report_of_times() -> Iterator[str]:
    """The table of times."""
    yield "microseconds an iteration of SciPy's rosen, evaluations included"
    yield f"{'n':>7}" + "".join(f"{name:>17}" for name in METHODS) + f"{'ratio':>8}"
    for n in TIMED:
        ours, theirs = microseconds(n)
        yield f"{n:7d}{ours:17.0f}{theirs:17.0f}{ours / theirs:8.1f}"


def main() -> None:
    """Run everything, and print the tables."""
    jax.config.update("jax_enable_x64", True)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # overflows in trials that are too long
    for line in report([(problem, compare(problem)) for problem in problems()]):
        print(line)
    print()
    for line in report_of_times():
        print(line)


if __name__ == "__main__":
    main()
