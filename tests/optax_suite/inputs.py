"""The optimizers that optax's tests are run over, and where their learning rates come from."""

from __future__ import annotations

import inspect

import optax

from mlbfgs_jax import mlbfgs, scale_by_mlbfgs

SETTINGS = {
    "mlbfgs": {},
    "mlbfgs_every_step": {"update_every": 1, "history_size": 2},
    "mlbfgs_fixed": {"adaptive": False, "update_every": 7, "beta": 0.9, "preconditioner": "none"},
    "mlbfgs_lbfgs": {"preset": "lbfgs", "history_size": 2},
    "mlbfgs_blocks": {"blocks": "parameter", "history_dtype": "bfloat16"},
}
"""Settings by the name under which optax's tests look a factory up."""

RATES = {
    "mlbfgs": 1e-3,
    "mlbfgs_every_step": 2e-4,
    "mlbfgs_fixed": 1e-3,
    "mlbfgs_lbfgs": 0.03,
    "mlbfgs_blocks": 1e-3,
}
"""Constant learning rates with which the convergence tests reach their targets. Where a step has a
fixed size the rate must be about as small as the distance that is tolerated; textbook L-BFGS has no length
control, and diverges on Rosenbrock's function at 0.1."""


def _factory(name, settings):
    def factory(
        learning_rate: optax.ScalarOrSchedule, momentum: float | None = None, weight_decay: float = 0.0
    ):
        return mlbfgs(learning_rate, momentum, weight_decay, **settings)

    # Sizes are static, so the factory that `inject_hyperparams` wraps does not take them.
    factory.__annotations__["learning_rate"] = optax.ScalarOrSchedule
    factory.__name__ = name
    return factory


FACTORIES = {name: _factory(name, settings) for name, settings in SETTINGS.items()}
INPUTS = tuple({"opt_name": name, "opt_kwargs": {"learning_rate": RATES[name]}} for name in SETTINGS)
WRAPPED_INPUTS = tuple({**each, "wrapper_name": None, "wrapper_kwargs": None} for each in INPUTS)
TRANSFORMATIONS = {name: factory(1.0) for name, factory in FACTORIES.items()}

LINE_SEARCH = inspect.signature(optax.lbfgs).parameters["linesearch"].default
"""That of `optax.lbfgs`."""


def lbfgs(
    learning_rate=None,
    memory_size=10,
    scale_init_precond=True,
    linesearch=LINE_SEARCH,
):
    """`optax.lbfgs` with our direction instead of optax's."""
    assert scale_init_precond
    return optax.chain(
        scale_by_mlbfgs(preset="lbfgs", history_size=memory_size),
        optax.scale(-1.0) if learning_rate is None else optax.scale_by_learning_rate(learning_rate),
        optax.identity() if linesearch is None else linesearch,
    )
