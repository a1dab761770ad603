"""What each part of the authors' code that `preset="paper"` leaves out is worth: one added at a time.

The runs are kept in ``parts.json``; with ``--train`` the command makes those that the file lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.problems import TASKS

from . import small_resnet, style
from .authors import Authors
from .tuning import Curve, Runs, final, rate

__all__ = ["NETWORKS", "PARTS", "Network", "split", "train", "write"]

PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "recipe": ("the preset as it is", {}),
    "second": ("a second average, of the pairs", {"second": 0.9}),
    "sgd_first": ("SGD before the first pair", {"sgd_first": True}),
    "left_out": ("stem and last layer left out", {"left_out": True}),
    "blocks": ("a block for each stage or layer", {"blocks": True}),
    "all": (
        "all four",
        {"second": 0.9, "sgd_first": True, "left_out": True, "blocks": True},
    ),
}


class Network(NamedTuple):
    """A network that the parts are tried on.

    `stages` gives the stage of each parameter by the beginning of its name; what begins like one of `out` has
    no curvature where layers are left out; `exponents` are those of the learning rates that are tried first.
    """

    title: str
    stages: dict[str, int]
    out: tuple[str, ...]
    exponents: tuple[int, ...]
    seeds: int
    weight_decay: float = 0.0


NETWORKS = {
    "resnet18": Network(
        "ResNet-18 in small",
        {"stem": 0, "norm": 0, "stages.0": 0, "stages.1": 1, "stages.2": 2, "stages.3": 3, "last": 3},
        ("stem", "norm", "last"),
        (-2,),
        1,
        2e-4,
    ),
    "classifier": Network("classifier", {"0": 0, "2": 1, "4": 2}, ("4",), (-3, -2, -1), 4),
    "autoencoder": Network("autoencoder", {str(2 * k): k for k in range(6)}, ("10",), (-2, -1, 0), 4),
}
"""The last two are tasks of the page of results. Only a convolution is a stem that can be left out."""

SHARED = "resnet18/recipe"
"""Its runs are those of `resnet`: without any part, `Authors` is the preset."""


def write() -> None:
    """Write what the page shows."""
    table()


def table() -> None:
    """Write the table."""
    runs = _with_shared(Runs("parts"))
    style.table("parts", ("the preset, with", *(network.title for network in NETWORKS.values())), rows(runs))


def rows(runs: Runs) -> list[tuple[str, ...]]:
    """The final training loss of each part in parts of the preset's, mean and range over the seeds."""
    result = []
    for part, (title, _) in PARTS.items():
        cells = []
        for name in NETWORKS:
            keys = [f"{name}/{which}" for which in (part, "recipe")]
            if not all(runs.tried(key) for key in keys):
                cells.append("not run")
                continue
            own, plain = ([final(curve) for curve in runs.tuned(key)] for key in keys)
            cells.append(_cell(own, plain, rate(runs.best(keys[0]))))
        result.append((title, *cells))
    return result


def _with_shared(runs: Runs) -> Runs:
    """The runs, and those that the other page shares."""
    for key, value in Runs("resnet").content.items():
        if key.startswith("recipe "):
            runs.content[f"{SHARED}{key.removeprefix('recipe')}"] = value
    return runs


def _cell(own: list[float], plain: list[float], lr: float) -> str:
    if not np.isfinite(own).all():
        return "diverges"
    plain = plain[: len(own)]  # the runs that another page shares have more seeds
    ratios = [a / b for a, b in zip(own, plain, strict=True)]
    return f"{np.mean(own) / np.mean(plain):.2f} ({min(ratios):.2f}\N{EN DASH}{max(ratios):.2f}), {lr:.2g}"


def train(names: Sequence[str] = tuple(NETWORKS)) -> None:
    """Train what the kept file lacks."""
    runs = Runs("parts")
    if not runs.learn_from(small_resnet.images().name):
        return
    for name in names:
        network = NETWORKS[name]
        for part, (_, settings) in PARTS.items():
            if f"{name}/{part}" == SHARED:
                continue
            runs.tune(f"{name}/{part}", network.exponents, network.seeds, partial(_run, name, settings))


def split(
    model: nn.Module, network: Network, settings: Mapping[str, Any]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The blocks of parameters, and those that are left out."""
    blocks: dict[int, list[Tensor]] = {}
    outside: list[Tensor] = []
    for name, param in model.named_parameters():
        stage = next(stage for prefix, stage in network.stages.items() if name.startswith(f"{prefix}."))
        if settings.get("left_out") and name.startswith(tuple(f"{prefix}." for prefix in network.out)):
            outside.append(param)
        else:
            blocks.setdefault(stage if settings.get("blocks") else 0, []).append(param)
    return list(blocks.values()), outside


def _run(name: str, settings: Mapping[str, Any], lr: float, seed: int) -> Curve:
    torch.set_num_threads(1)
    network, numbers = NETWORKS[name], {k: settings[k] for k in ("second", "sgd_first") if k in settings}

    def optimizer(model: nn.Module) -> Authors:
        blocks, outside = split(model, network, settings)
        return Authors(blocks, outside, lr=lr, weight_decay=network.weight_decay, **numbers)

    if name == "resnet18":
        model = small_resnet.resnet(seed)
        loss = nn.functional.cross_entropy
        return small_resnet.train(model, optimizer(model), lambda x, y: loss(model(x), y).backward(), seed)
    task = TASKS[name]
    problem = task.make(seed)
    return small_resnet.descend(
        optimizer(problem.model), lambda step: problem.loss(step).backward(), problem.evaluate, task.steps
    )
