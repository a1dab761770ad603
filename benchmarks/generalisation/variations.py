"""Variations of a step of mL-BFGS on the tasks that are not held out: final losses next to the default's.

The runs are shorter than those of `benchmarks.tasks`. The cosine schedule falls to zero over the shorter
length, unless a variation says otherwise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from benchmarks.tasks.contestants import CONTESTANTS, rate
from benchmarks.tasks.problems import TASKS
from benchmarks.tasks.training import Trainer
from mlbfgs_torch import MLBFGS

from . import changes
from .store import Store

__all__ = [
    "DOCUMENTED",
    "PRECONDITIONERS",
    "SEEDS",
    "STEPS",
    "VARIATIONS",
    "Variation",
    "complete",
    "key",
    "run_all",
]

PRECONDITIONERS = {"diagonal": "mlbfgs", "kronecker": "mlbfgs_kronecker"}
STEPS = {
    "digits": 600,
    "classifier": 300,
    "resnet": 200,
    "autoencoder": 150,
    "transformer": 250,
    "poisson": 600,
}
"""The tasks, and how many steps a run takes."""
SEEDS = {"digits": 2, "classifier": 2, "resnet": 1, "autoencoder": 1, "transformer": 1, "poisson": 1}
DOCUMENTED = -6
"""Exponent of the documented learning rate, 1e-3."""
DECAY = 5.0
FREE = 2
"""Without momentum a step is a tenth as far, hence these exponents more for the same distance."""


class Variation(NamedTuple):
    """A way to train.

    Attributes
    ----------
    title : str
        A description.
    wrap : callable
        Makes, from a model, the optimizer and the number of steps, what stands in the optimizer's place.
    settings : dict
        Settings of the optimizer.
    constant : bool
        Whether the learning rate stays as it is.
    shift : int
        Added to the exponent of the learning rate.
    """

    title: str
    wrap: Callable[[nn.Module, Any, int], Any] = lambda model, optimizer, steps: optimizer
    settings: dict[str, Any] = {}  # noqa: RUF012
    constant: bool = False
    shift: int = 0


def _changed(change: changes.Change) -> Callable[[nn.Module, Any, int], Any]:
    return lambda model, optimizer, steps: changes.Changed(optimizer, change)


def _rounded(model: nn.Module, optimizer: Any, steps: int, *, random: bool) -> Any:
    """Parameters that hold bfloat16 numbers after each step; all else is computed in float32."""
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.data.copy_(changes.nearest(param.data))
    return changes.Changed(
        optimizer,
        lambda old, new, gradient, lr: changes.stochastic(new, generator) if random else changes.nearest(new),
    )


def _exponential(model: nn.Module, optimizer: Any, steps: int) -> Any:
    return changes.Averaged(model, optimizer, changes.exponential(0.99))


VARIATIONS = {
    "default": Variation("default", _exponential),
    "exponential": Variation("exponential mean of the parameters, decay 0.99"),
    "second_half": Variation(
        "constant rate, mean over the second half",
        lambda model, optimizer, steps: changes.Averaged(model, optimizer, changes.second_half(steps)),
        constant=True,
    ),
    "schedule_free": Variation(
        "schedule-free (constant rate, mean in place of momentum)",
        lambda model, optimizer, steps: changes.ScheduleFree(optimizer),
        {"momentum": 0.0, "nesterov": False},
        constant=True,
        shift=FREE,
    ),
    "cautious": Variation("cautious", _changed(changes.cautious(rescale=True))),
    "cautious_unscaled": Variation("cautious, not rescaled", _changed(changes.cautious(rescale=False))),
    "decay": Variation(f"weight decay {DECAY:g}", settings={"weight_decay": DECAY}),
    "cautious_decay": Variation(f"cautious weight decay {DECAY:g}", _changed(changes.cautious_decay(DECAY))),
    "nearest": Variation(
        "bfloat16 parameters, rounded to nearest",
        lambda model, optimizer, steps: _rounded(model, optimizer, steps, random=False),
    ),
    "stochastic": Variation(
        "bfloat16 parameters, stochastic rounding",
        lambda model, optimizer, steps: _rounded(model, optimizer, steps, random=True),
    ),
}


def key(task: str, preconditioner: str, variation: str, seed: int) -> tuple[str, ...]:
    """Where the store has the final training and test loss of a run."""
    return "variations", task, preconditioner, variation, str(DOCUMENTED), str(seed)


def run(task: str, preconditioner: str, name: str, seed: int) -> dict[str, tuple[float, float]]:
    """Final training and test loss by the name of the variation; the default also gives its mean's."""
    variation, steps = VARIATIONS[name], STEPS[task]
    settings = {**CONTESTANTS[PRECONDITIONERS[preconditioner]].settings, **variation.settings}

    def build(model: nn.Module, lr: float) -> list[Any]:
        return [variation.wrap(model, MLBFGS(model.named_parameters(), lr=lr, **settings), steps)]

    contestant = replace(CONTESTANTS["mlbfgs"], build=build, settings={}, constant=variation.constant)
    problem = TASKS[task].make(seed)
    trainer = Trainer(problem, contestant, rate(DOCUMENTED + variation.shift), steps)
    try:
        for _ in range(steps):
            trainer.step()
    except (RuntimeError, ValueError):  # raised if factors of a matrix are not finite
        return {name: (math.inf, math.inf)}
    if name == "default":
        return {name: problem.evaluate(), "exponential": trainer.evaluate()}
    return {name: trainer.evaluate()}


def _wanted() -> Iterator[tuple[str, str, str, int]]:
    """Task, preconditioner, variation and seed of every run."""
    for task, preconditioner, name in itertools.product(STEPS, PRECONDITIONERS, VARIATIONS):
        if name != "exponential":  # comes with the default
            yield from ((task, preconditioner, name, seed) for seed in range(SEEDS[task]))


def complete(store: Store) -> bool:
    """Whether the store has every run."""
    return all(store.get(*key(*wanted)) for wanted in _wanted())


def run_all(store: Store) -> None:
    """Make the runs that the store does not have."""
    for task, preconditioner, name, seed in _wanted():
        if store.get(*key(task, preconditioner, name, seed)) is None:
            for found, losses in run(task, preconditioner, name, seed).items():
                store.put(*key(task, preconditioner, found, seed), values=list(losses))
                print(task, preconditioner, found, seed, losses, flush=True)
