"""The paper's experiment in small: ResNet-18's architecture, the published recipe, SGD and others.

The runs and the seconds of a step are kept in ``resnet.json``. With ``--train`` the command makes the runs
that the file lacks, with ``--time`` it measures the seconds again.
"""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim import Optimizer

from mlbfgs_torch import MLBFGS

from . import small_resnet, style
from .small_resnet import BATCH, EPOCHS, STEPS, WEIGHT_DECAY
from .tuning import Curve, Runs, final, first_at, mean, rate

__all__ = ["CONTESTANTS", "Contestant", "measure", "train", "write"]

VISIT, VISITS = 50, 3
"""Steps in a turn, which holds as many refreshes of everything as any other; turns."""


class Contestant(NamedTuple):
    """An optimizer with settings.

    `centre` is the exponent of the learning rate in the middle of the first three; `maker` is the class of
    asdfghjkl that makes its gradient.
    """

    title: str
    build: Callable[..., Optimizer]
    centre: int
    colour: str
    settings: dict[str, Any]
    maker: str = ""
    seeds: int = 3

    @property
    def exponents(self) -> tuple[int, ...]:
        """Where the search for the learning rate begins."""
        return self.centre - 1, self.centre, self.centre + 1


_SGD = {"momentum": 0.9, "weight_decay": WEIGHT_DECAY}
CONTESTANTS = {
    "recipe": Contestant(
        "published recipe",
        MLBFGS,
        -2,
        style.BLUE,
        {"preset": "paper", "weight_decay": WEIGHT_DECAY, "decoupled_weight_decay": False},
    ),
    "sgd": Contestant("SGD", torch.optim.SGD, -2, style.GREY, _SGD),
    "adamw": Contestant("AdamW", torch.optim.AdamW, -5, style.ORANGE, {"weight_decay": 1e-2}),
    "default": Contestant("mL-BFGS default", MLBFGS, -6, style.SKY, {"weight_decay": 1e-2}),
    "kronecker": Contestant(
        "mL-BFGS Kronecker",
        MLBFGS,
        -6,
        style.GREEN,
        {"weight_decay": 1e-2, "preconditioner": "kronecker"},
    ),
    "kfac": Contestant("K-FAC", torch.optim.SGD, -6, style.PURPLE, _SGD, "KfacGradientMaker", 2),
}
MAKER = {"data_size": BATCH, "damping": 0.01, "ema_decay": 0.05, "preconditioner_upd_interval": 10}
"""Settings of K-FAC: new factors every ten steps, the damping of asdfghjkl's documentation."""


def write() -> None:
    """Write the figure and the table."""
    runs = Runs("resnet")
    if not set(CONTESTANTS) <= {key.split()[0] for key in runs.content}:
        print("resnet: some optimizers have no kept run; `--train` makes them")
    style.save(draw(runs), "resnet")
    table(runs)


def train() -> None:
    """Train what the kept file lacks."""
    runs = Runs("resnet")
    if not runs.learn_from(small_resnet.images().name):
        return
    for name, contestant in CONTESTANTS.items():
        if available(contestant):
            runs.tune(name, contestant.exponents, contestant.seeds, partial(_run, contestant))


def _run(contestant: Contestant, lr: float, seed: int) -> Curve:
    model = small_resnet.resnet(seed)
    optimizer = contestant.build(model.parameters(), lr=lr, **contestant.settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some learning rates are meant to be too high
        return small_resnet.train(model, optimizer, gradients(contestant, model), seed)


def available(contestant: Contestant) -> bool:
    """Whether the package that it needs is there; otherwise say what is left out."""
    if not contestant.maker:
        return True
    try:
        import asdl  # noqa: F401
    except ImportError:
        print(f"{contestant.title} is left out, since asdfghjkl is not installed (pip install asdfghjkl).")
        return False
    return True


def gradients(contestant: Contestant, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """What sets a model's gradients for images and labels."""
    loss = nn.functional.cross_entropy
    if not contestant.maker:
        return lambda x, y: loss(model(x), y).backward()
    from asdl import precondition
    from asdl.precondition import natural_gradient

    if not torch.cuda.is_available():  # its marks for NVIDIA's profiler raise in PyTorch for CPUs
        natural_gradient.nvtx = SimpleNamespace(range=lambda *_: nullcontext())
    maker = getattr(precondition, contestant.maker)(model, precondition.PreconditioningConfig(**MAKER))

    def compute(x: Tensor, y: Tensor) -> None:
        maker.setup_loss_call(loss, maker.setup_model_call(model, x), y)
        try:
            maker.forward_and_backward()
        except ValueError:  # it draws labels from the model's predictions, which are no numbers any more
            for param in model.parameters():
                param.grad = torch.full_like(param, math.nan)

    return compute


def measure() -> None:
    """Measure the seconds of a step at the learning rates of the runs: the optimizers take turns."""
    torch.set_num_threads(1)
    runs = Runs("resnet")
    steps = {
        name: _steps(contestant, rate(runs.best(name)))
        for name, contestant in CONTESTANTS.items()
        if runs.tried(name) and available(contestant)
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for visit in range(VISITS + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                for _ in range(VISIT):
                    step()
                if visit > 1:  # the recipe's first pair comes at step 100
                    seconds[name].append((time.perf_counter() - start) / VISIT)
    runs.keep("seconds", {name: round(median(own), 5) for name, own in seconds.items()})
    runs.keep("processor", platform.processor() or platform.machine())
    print({name: f"{1e3 * value:.1f} ms" for name, value in runs.content["seconds"].items()})


def _steps(contestant: Contestant, lr: float) -> Callable[[], None]:
    model = small_resnet.resnet(0)
    optimizer = contestant.build(model.parameters(), lr=lr, **contestant.settings)
    compute, data = gradients(contestant, model), small_resnet.batch(0, 0)

    def step() -> None:
        optimizer.zero_grad()
        compute(*data)
        optimizer.step()

    return step


def lines(runs: Runs) -> dict[str, Curve]:
    """The mean curve of each optimizer that has runs, with test errors instead of accuracies."""
    means = {name: mean(runs.tuned(name)) for name in CONTESTANTS if runs.tried(name)}
    return {
        name: Curve(curve.train, [100 - accuracy for accuracy in curve.test]) for name, curve in means.items()
    }


def table(runs: Runs) -> None:
    """Final figures, and how soon each optimizer is where SGD ends, by steps and by the clock."""
    curves, seconds = lines(runs), runs.content.get("seconds", {})
    level = curves["sgd"]
    rows = []
    for name, curve in curves.items():
        own, slower = runs.tuned(name), seconds.get(name, math.nan) / seconds.get("sgd", math.nan)
        rows.append(
            (
                CONTESTANTS[name].title,
                f"{rate(runs.best(name)):.2g}",
                _spread([final(run) for run in own], ".3f"),
                _spread([run.test[-1] for run in own], ".1f"),
                f"{max(runs.at(name, exponent)[0].test[-1] for exponent in runs.tried(name)):.1f}",
                f"{1e3 * seconds.get(name, math.nan):.0f}",
                *(
                    _both(first_at(values, goal[-1]), slower)
                    for values, goal in ((curve.train, level.train), (curve.test, level.test))
                ),
            )
        )
    heading = (
        "optimizer",
        "learning rate",
        "training loss",
        "test accuracy, %",
        "the same at its best rate",
        "ms a step",
        "SGD's loss: steps, time",
        "SGD's accuracy: steps, time",
    )
    style.table("resnet", heading, rows)


def _spread(values: Sequence[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}}\N{EN DASH}{max(values):{form}})"


def _both(part: float, slower: float) -> str:
    """Steps and time until a level is reached, in parts of SGD's whole run."""
    return "never" if math.isinf(part) else f"{100 * part:.0f} %, {100 * part * slower:.0f} %"


def draw(runs: Runs) -> Figure:
    """Test accuracy and training loss, by epoch and by seconds."""
    seconds = runs.content.get("seconds", {})
    figure, axes = plt.subplots(2, 2, figsize=(7.8, 5.6), sharey="row", layout="constrained")
    for row, (title, which) in enumerate((("test accuracy, %", "test"), ("training loss", "train"))):
        for column, unit in enumerate(("epochs", "seconds")):
            own = axes[row, column]
            for name, curve in lines(runs).items():
                values = np.array(getattr(curve, which))
                values = 100 - values if which == "test" else values
                end = EPOCHS if column == 0 else seconds.get(name, math.nan) * STEPS
                _line(own, np.linspace(0, end, len(values)), values, CONTESTANTS[name])
            own.set_xlabel(unit)
            own.set_title(f"{title}, by {unit}")
    axes[0, 0].set_ylim(74, 89)
    axes[1, 0].set_yscale("log")
    axes[1, 0].set_ylim(0.08, 0.75)
    ticks = [0.1, 0.2, 0.3, 0.5, 0.7]
    axes[1, 0].set_yticks(ticks, map(str, ticks))
    axes[1, 0].minorticks_off()
    axes[0, 0].legend(loc="lower right", fontsize=8)
    return figure


def _line(axes: Axes, x: Any, y: Any, contestant: Contestant) -> None:
    own = contestant.title == CONTESTANTS["recipe"].title
    axes.plot(
        x,
        y,
        color=contestant.colour,
        linewidth=2.2 if own else 1.3,
        label=contestant.title,
        zorder=3 if own else 2,
    )
