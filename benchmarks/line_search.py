"""Textbook L-BFGS with a line search: `scale_by_mlbfgs`, `optax.lbfgs` and SciPy from the same starts.

The problems are the deterministic ones with which optax tests its L-BFGS. Runs are in float64 and end at a
gradient norm of 1e-5 or after 500 iterations. All three methods keep ten pairs and try at most twenty points
per line search; the two that use optax share the line search and its settings. SciPy's L-BFGS-B runs without
bounds and stops at the same norm.

An iteration is a direction and its line search. An evaluation is a value with its gradient. For optax these
are the points that the line searches tried (`num_linesearch_steps`), and one more whenever the state held no
value that could be reused, as at the start; for SciPy they are `nfev`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree

from mlbfgs_jax import scale_by_mlbfgs

__all__ = ["Outcome", "Problem", "ours", "problems", "run_optax", "run_scipy", "theirs"]

TOLERANCE, ITERATIONS = 1e-5, 500
HISTORY, TRIALS = 10, 20
QUICK_TO_COMPILE = {"xla_backend_optimization_level": 0}
"""The functions are so small that compiling them takes far longer than running them."""
Tree = Any


class Problem(NamedTuple):
    """A function of a tree of parameters, and where a run of it starts."""

    fun: Callable[[Tree], jax.Array]
    start: Tree
    minimum: float | None = None
    """Its minimum, if that is known."""

    @property
    def is_complex(self) -> bool:
        """Whether a parameter is complex, which SciPy does not take."""
        return any(jnp.iscomplexobj(leaf) for leaf in jax.tree.leaves(self.start))


class Outcome(NamedTuple):
    """Where a run ended, and how many iterations and evaluations it took."""

    params: Tree
    iterations: int
    evaluations: int
    value: float
    grad_norm: float


class _Carry(NamedTuple):
    params: Tree
    state: optax.OptState
    value: jax.Array
    grad: Tree
    iterations: jax.Array
    evaluations: jax.Array


def problems() -> dict[str, Problem]:
    """The problems by name, in JAX's default precision.

    Himmelblau's function has four minima of the same value. The egg holder has many minima of different
    values, and kinks, and has no minimum without bounds. The others have one minimum, except that the
    multiclass logits may be shifted.
    """
    corner = jnp.ones(2)
    complex_start = jnp.asarray([1 - 1j, 1j])
    binary, multiclass = _logistic()
    return {
        "Rosenbrock": Problem(rosenbrock, jnp.zeros(2), 0.0),
        "Himmelblau": Problem(himmelblau, corner, 0.0),
        "Himmelblau, bad start": Problem(himmelblau, jnp.asarray([92.0, 0.001]), 0.0),
        "Matyas": Problem(matyas, 6 * corner, 0.0),
        "egg holder": Problem(egg_holder, 6 * corner),
        "Zakharov": Problem(zakharov, jnp.asarray([600.0, 700.0, 200.0, 100.0, 90.0, 1000.0]), 0.0),
        "steep quadratic": Problem(lambda x: jnp.mean((1e4 * x) ** 2), corner, 0.0),
        "complex": Problem(power_of_residual, complex_start, 0.0),
        "complex, as real": Problem(
            lambda x: power_of_residual(x[0] + 1j * x[1]),
            jnp.stack([complex_start.real, complex_start.imag]),
            0.0,
        ),
        "binary logistic": binary,
        "multiclass logistic": multiclass,
    }


def rosenbrock(x: jax.Array) -> jax.Array:
    """Rosenbrock (1960): a curved valley."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def himmelblau(x: jax.Array) -> jax.Array:
    """Himmelblau (1972): four minima, all of value 0."""
    a, b = x
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


def matyas(x: jax.Array) -> jax.Array:
    """A convex quadratic with condition number 25."""
    return 0.26 * jnp.sum(x**2) - 0.48 * jnp.prod(x)


def egg_holder(x: jax.Array) -> jax.Array:
    """Whitley et al. (1996), with a kink where the argument of a root changes its sign."""
    a, b = x[0], x[1] + 47
    return -b * jnp.sin(jnp.sqrt(jnp.abs(a / 2 + b))) - a * jnp.sin(jnp.sqrt(jnp.abs(a - b)))


def zakharov(x: jax.Array) -> jax.Array:
    """A convex quartic along one direction."""
    along = jnp.sum(jnp.arange(1, x.size + 1) * x) / 2
    return jnp.sum(x**2) + along**2 + along**4


def power_of_residual(z: jax.Array) -> jax.Array:
    """``sum |A z|^1.5``, whose curvature is infinite at the minimum."""
    matrix = jnp.asarray([[1, -2], [3, 4], [-4 + 2j, 5 - 3j], [-2 - 2j, 6]])
    return jnp.sum(jnp.abs(matrix @ z) ** 1.5)


def _logistic() -> tuple[Problem, Problem]:
    """Regressions on 40 samples with 5 features, whose classes overlap, so that there is a minimum."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(40, 5))
    logits = inputs @ random.normal(size=(5, 3)) + random.gumbel(size=(40, 3))
    signs = jnp.where(logits[:, 0] > logits[:, 1], 1.0, -1.0)
    chosen = jax.nn.one_hot(np.argmax(logits, axis=1), 3)
    inputs = jnp.asarray(inputs)

    def binary(weights: jax.Array) -> jax.Array:
        return jnp.mean(jax.nn.softplus(-signs * (inputs @ weights)))

    def multiclass(params: dict[str, jax.Array]) -> jax.Array:
        scores = jax.nn.log_softmax(inputs @ params["weights"] + params["bias"])
        return -jnp.mean(jnp.sum(chosen * scores, axis=1))

    return (
        Problem(binary, jnp.zeros(5)),
        Problem(multiclass, {"weights": jnp.zeros((5, 3)), "bias": jnp.zeros(3)}),
    )


def theirs() -> optax.GradientTransformationExtraArgs:
    """Plain `optax.lbfgs`."""
    return optax.lbfgs()


def ours() -> optax.GradientTransformationExtraArgs:
    """The same with `scale_by_mlbfgs` for the direction."""
    return optax.chain(
        scale_by_mlbfgs(preset="lbfgs", history_size=HISTORY),
        optax.scale(-1.0),
        optax.scale_by_zoom_linesearch(max_linesearch_steps=TRIALS, initial_guess_strategy="one"),
    )


def run_optax(
    tx: optax.GradientTransformationExtraArgs,
    fun: Callable[[Tree], jax.Array],
    start: Tree,
    *,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> Outcome:
    """Minimize with a transformation that ends in a line search, in one compiled loop."""
    value_and_grad = optax.value_and_grad_from_state(fun)

    def evaluated(params: Tree, state: optax.OptState) -> tuple[jax.Array, Tree, jax.Array]:
        missing = ~jnp.isfinite(optax.tree.get(state, "value"))
        value, grad = value_and_grad(params, state=state)
        return value, optax.tree.conj(grad), missing.astype(int)

    def unfinished(carry: _Carry) -> jax.Array:
        return (optax.tree.norm(carry.grad) > tolerance) & (carry.iterations < iterations)

    def step(carry: _Carry) -> _Carry:
        params, _, value, grad, count, evaluations = carry
        updates, state = tx.update(grad, carry.state, params, value=value, grad=grad, value_fn=fun)
        params = optax.apply_updates(params, updates)
        value, grad, more = evaluated(params, state)
        tried = optax.tree.get(state, "num_linesearch_steps")
        return _Carry(params, state, value, grad, count + 1, evaluations + tried + more)

    @partial(jax.jit, compiler_options=QUICK_TO_COMPILE)
    def run(params: Tree) -> _Carry:
        state = tx.init(params)
        value, grad, more = evaluated(params, state)
        first = _Carry(params, state, value, grad, jnp.asarray(0), more)
        return jax.lax.while_loop(unfinished, step, first)

    last = run(start)
    return Outcome(
        last.params,
        int(last.iterations),
        int(last.evaluations),
        float(last.value),
        float(optax.tree.norm(last.grad)),
    )


def run_scipy(
    fun: Callable[[Tree], jax.Array],
    start: Tree,
    *,
    tolerance: float = TOLERANCE,
    iterations: int = ITERATIONS,
) -> Outcome:
    """Minimize with SciPy's L-BFGS-B, until the Euclidean norm of the gradient is small enough."""
    flat, unflatten = ravel_pytree(start)
    compiled = jax.jit(jax.value_and_grad(lambda x: fun(unflatten(x))), compiler_options=QUICK_TO_COMPILE)

    def value_and_grad(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = compiled(x)
        return float(value), np.asarray(grad)

    def stop_at_tolerance(intermediate_result: scipy.optimize.OptimizeResult) -> None:
        if np.linalg.norm(value_and_grad(intermediate_result.x)[1]) <= tolerance:
            raise StopIteration

    result = scipy.optimize.minimize(
        value_and_grad,
        np.asarray(flat),
        method="L-BFGS-B",
        jac=True,
        callback=stop_at_tolerance,
        options={"maxcor": HISTORY, "maxls": TRIALS, "maxiter": iterations, "ftol": 0.0, "gtol": 0.0},
    )
    value, grad = value_and_grad(result.x)
    return Outcome(unflatten(result.x), result.nit, result.nfev, value, float(np.linalg.norm(grad)))


METHODS: dict[str, Callable[..., Outcome]] = {
    "scale_by_mlbfgs": lambda fun, start: run_optax(ours(), fun, start),
    "optax.lbfgs": lambda fun, start: run_optax(theirs(), fun, start),
    "SciPy L-BFGS-B": run_scipy,
}


def report() -> Iterator[str]:
    """The table, one problem at a time."""
    columns = f"{'iter':>5}{'eval':>6}{'value':>14}{'|grad|':>10}"
    yield f"{'':22}" + "".join(f"  {name:^{len(columns)}}" for name in METHODS)
    yield f"{'':22}" + f"  {columns}" * len(METHODS)
    for name, problem in problems().items():
        line = f"{name:22}"
        for method in METHODS.values():
            if problem.is_complex and method is run_scipy:
                line += f"  {'(real numbers only)':>{len(columns)}}"
                continue
            outcome = method(problem.fun, problem.start)
            line += f"  {outcome.iterations:5d}{outcome.evaluations:6d}"
            line += f"{outcome.value:14.6e}{outcome.grad_norm:10.1e}"
        yield line


def main() -> None:
    """Print the table."""
    jax.config.update("jax_enable_x64", True)
    for line in report():
        print(line, flush=True)


if __name__ == "__main__":
    main()
