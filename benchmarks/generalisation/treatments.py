"""What may lower the test loss, each with its learning rate tuned by validation loss.

The rate is chosen with seed 0 by the validation loss at the end of a run. The test set is looked at with the
other seeds, at the chosen rate alone.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks.contestants import CONTESTANTS, rate
from benchmarks.tasks.data import Examples
from benchmarks.tasks.problems import Problem, batches
from benchmarks.tasks.search import next_exponents
from benchmarks.tasks.training import Trainer

from . import changes
from .calibration import Measures, measure
from .images import IMAGES, available
from .store import Store

__all__ = ["OPTIMIZERS", "SEEDS", "TREATMENTS", "best", "finals", "run_all"]

OPTIMIZERS = {"mlbfgs": -6, "mlbfgs_kronecker": -6, "adamw": -5}
"""Contestants, and where the search for their learning rate begins."""
SEEDS = (1, 2)
BATCH, EVALUATIONS, EVALUATED = 64, 20, 2_000
LEAST, MOST = 3, 6
ADAMW_DECAY = 0.05
"""The best rates of AdamW are up to thirty times as high; a decay of 1 is already too much for it."""


class Treatment(NamedTuple):
    """A way to train.

    Attributes
    ----------
    title : str
        For people.
    decay : float
        Weight decay of mL-BFGS, decoupled from the gradient; AdamW's is `ADAMW_DECAY` times as large.
    smoothing : float
        Part of each label that is given to all classes.
    part : float
        Part of the steps that is taken, with the schedule over it.
    cautious : bool
        Whether components of a step against which the gradient speaks are left out.
    constant : bool
        Whether the rate stays as it is, and the parameters of the second half are averaged.
    """

    title: str
    decay: float = 0.0
    smoothing: float = 0.0
    part: float = 1.0
    cautious: bool = False
    constant: bool = False


TREATMENTS = {
    "plain": Treatment("plain"),
    "early": Treatment("early stop"),
    "exponential": Treatment("EMA"),
    "short": Treatment("a quarter of the steps", part=0.25),
    "second_half": Treatment("SWA", constant=True),
    "decay_1": Treatment("decay 1", decay=1.0),
    "decay_5": Treatment("decay 5", decay=5.0),
    "decay_20": Treatment("decay 20", decay=20.0),
    "smoothing": Treatment("label smoothing 0.1", smoothing=0.1),
    "cautious": Treatment("cautious", cautious=True),
}
ENDINGS = ("plain", "early", "exponential")
"""Three treatments that share their runs: the last parameters, those with the lowest validation loss among
`EVALUATIONS`, and an exponential mean."""


@torch.no_grad()
def _loss(model: nn.Module, examples: Examples) -> float:
    inputs, targets = examples.inputs[:EVALUATED], examples.targets[:EVALUATED]
    value = cross_entropy(model(inputs), targets).item()
    return value if math.isfinite(value) else math.inf


@torch.no_grad()
def _logits(model: nn.Module, examples: Examples) -> tuple[Tensor, Tensor]:
    return model(examples.inputs), examples.targets


def train(task: str, optimizer: str, name: str, exponent: int, seed: int) -> dict[str, nn.Module]:
    """The networks that a run ends with, by treatment; none if it diverged."""
    images, treatment = IMAGES[task], TREATMENTS[name]
    parts, steps = images.parts(), round(images.steps * treatment.part)
    entry = CONTESTANTS[optimizer]
    decay = treatment.decay * (1.0 if entry.ours else ADAMW_DECAY)
    settings = {**entry.settings, "weight_decay": decay}

    def build(model: nn.Module, lr: float) -> list[Any]:
        (made,) = entry.build(model, lr, **settings)
        if treatment.cautious:
            made = changes.Changed(made, changes.cautious(rescale=True))
        weight = changes.second_half(steps) if treatment.constant else changes.exponential(0.99)
        return [changes.Averaged(model, made, weight)]

    torch.manual_seed(seed)
    model = images.network()
    batch = batches(len(parts.train.inputs), BATCH, seed)

    def loss(step: int) -> Tensor:
        rows = batch(step)
        logits = model(parts.train.inputs[rows])
        return cross_entropy(logits, parts.train.targets[rows], label_smoothing=treatment.smoothing)

    contestant = replace(entry, build=build, settings={}, constant=treatment.constant)
    trainer = Trainer(Problem(model, loss, lambda: (0.0, 0.0)), contestant, rate(exponent), steps)
    marks = {round(steps * (k + 1) / EVALUATIONS) for k in range(EVALUATIONS)}
    early, lowest = model, math.inf
    try:
        for step in range(1, steps + 1):
            trainer.step()
            if name == "plain" and step in marks and (value := _loss(model, parts.validation)) < lowest:
                early, lowest = copy.deepcopy(model), value
    except (RuntimeError, ValueError):  # raised if factors of a matrix are not finite
        return {}
    last = copy.deepcopy(model)
    trainer.optimizers[0].eval()
    if name == "plain":
        return {"plain": last, "early": early, "exponential": model}
    return {name: model if treatment.constant else last}


def tune_key(task: str, optimizer: str, name: str, exponent: int) -> tuple[str, ...]:
    """Where the store has the training and the validation loss of seed 0."""
    return "tuning", task, optimizer, name, str(exponent)


def final_key(task: str, optimizer: str, name: str, exponent: int, seed: int) -> tuple[str, ...]:
    """Where the store has the measures of a run."""
    return "test", task, optimizer, name, str(exponent), str(seed)


def losses(store: Store, task: str, optimizer: str, name: str, by: int = 1) -> dict[int, float]:
    """Losses of seed 0 by exponent: of training with ``by=0``, of validation with ``by=1``."""
    found = {exponent: store.get(*tune_key(task, optimizer, name, exponent)) for exponent in range(-14, 3)}
    return {exponent: values[by] for exponent, values in found.items() if values is not None}


def best(store: Store, task: str, optimizer: str, name: str, by: int = 1) -> int:
    """The exponent with the lowest loss of seed 0."""
    known = losses(store, task, optimizer, name, by)
    return min(known, key=known.__getitem__)


def finals(store: Store, task: str, optimizer: str, name: str, by: int = 1) -> list[Measures]:
    """Measures of the seeds at the best rate."""
    exponent = best(store, task, optimizer, name, by)
    found = (store.get(*final_key(task, optimizer, name, exponent, seed)) for seed in SEEDS)
    return [Measures(*values) for values in found if values is not None]


def tune(store: Store, task: str, optimizer: str, name: str) -> None:
    """Make the runs of a search over learning rates that the store does not have."""
    plain = name == "plain"
    centre = OPTIMIZERS[optimizer] if plain else best(store, task, optimizer, "plain")
    while wanted := next_exponents(centre, losses(store, task, optimizer, name), LEAST, MOST):
        for exponent in wanted:
            networks = train(task, optimizer, name, exponent, 0)
            for ending in ENDINGS if plain else (name,):
                parts, values = IMAGES[task].parts(), [math.inf, math.inf]
                if ending in networks:
                    values = [_loss(networks[ending], part) for part in (parts.train, parts.validation)]
                store.put(*tune_key(task, optimizer, ending, exponent), values=values)
                print("tuning", task, optimizer, ending, exponent, values, flush=True)


def test(store: Store, task: str, optimizer: str, name: str, exponent: int, seed: int) -> None:
    """Make a final run if the store does not have it."""
    if store.get(*final_key(task, optimizer, name, exponent, seed)) is not None:
        return
    parts = IMAGES[task].parts()
    networks = train(task, optimizer, "plain" if name in ENDINGS else name, exponent, seed)
    for ending, model in networks.items():
        known, unseen = _logits(model, parts.validation), _logits(model, parts.test)
        found = measure(_loss(model, parts.train), known, unseen)
        store.put(*final_key(task, optimizer, ending, exponent, seed), values=list(found))
        print("test", task, optimizer, ending, exponent, seed, found, flush=True)


def chosen(store: Store, task: str, optimizer: str) -> Iterator[tuple[str, int]]:
    """The treatments with their rates, and the plain one also with the rate that trains best."""
    for name in TREATMENTS:
        yield name, best(store, task, optimizer, name)
    yield "plain", best(store, task, optimizer, "plain", by=0)


def run_all(store: Store) -> None:
    """Make the runs that the store does not have."""
    for task, optimizer, name in itertools.product(available(), OPTIMIZERS, TREATMENTS):
        if name not in ENDINGS[1:]:
            tune(store, task, optimizer, name)
    for seed, task, optimizer in itertools.product(SEEDS, available(), OPTIMIZERS):
        for name, exponent in chosen(store, task, optimizer):
            test(store, task, optimizer, name, exponent, seed)
