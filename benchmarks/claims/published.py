"""Where the published formulas and code fall short, and what each part that the library adds is worth."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

import mlbfgs_core as core
from mlbfgs_torch import MLBFGS

from . import network, style
from .pairs import Array
from .quadratics import LOST, METHODS, PROBLEMS, RATE, SEEDS, STEPS, Problem, Runs, descend, runs

__all__ = ["write"]

CALM = Problem(20, 100, 0)
SCALES = (1e-4, 1e-2, 1.0, 1e2, 1e4)
DECAY, PERIOD = 0.9, 10
ABLATIONS: dict[str, dict[str, Any]] = {
    "`fit` as it is": {},
    "no cosine floor": {"min_cosine": 0.0},
    "no noise floor": {"noise_floor": 0.0},
    "no limit of the length": {"step_length": "none"},
    "exponential averages, β = 0.9": {"beta": 0.9},
    "a pair every 20 steps": {"adaptive": False},
}
BATCH, TRAINED, NETWORK_SEEDS = 128, 200, 3
NETWORK_RATES = {"rms": (3e-3, 1e-2), "none": (0.1, 0.3), "unit": (0.1, 0.3)}
"""Learning rates by `step_length`, which determines what a rate means."""
NETWORK_ABLATIONS: dict[str, dict[str, Any]] = {
    "the default": {},
    "no preconditioner": {"preconditioner": "none"},
    "half its power (1/2)": {"preconditioner_power": 0.5},
    "ten pairs": {"history_size": 10},
    "exponential averages, β = 0.9": {"beta": 0.9},
    "a pair every 50 steps": {"adaptive": False},
    "no pairs at all": {"adaptive": False, "update_every": 10**6},
    "published formulas": {"preset": "formulas"},
    "published recipe": {"preset": "paper"},
}
RECIPE = core.Config(preset="paper")
PARTS: dict[str, dict[str, Any]] = {
    "the formulas as they are": {},
    "T = 50": {"update_every": RECIPE.update_every},
    "β = 0.999": {"beta": RECIPE.beta},
    "damping (0.01, 1.5, 0.99)": {"damping": RECIPE.damping},
    "a direction of length 1": {"step_length": RECIPE.step_length},
    "all four: the recipe": {"preset": "paper"},
}
"""The formulas with the values of the recipe, one at a time."""


def write() -> None:
    """Write all tables of the page."""
    averages_table()
    scale_table()
    recipe_table()
    ablation_table()
    network_table()


def averaged_pairs(
    path: Array,
    gradients: Array,
    *,
    decays: tuple[float, float] = (DECAY, DECAY),
    weights: tuple[float, float] = (1 - DECAY, 1 - DECAY),
    restart: bool = False,
) -> list[tuple[Array, Array]]:
    """Pairs of averages ``M <- decay M + weight x``, for the parameters and for the gradient.

    With `restart` the average of the gradient is reset to the gradient after each pair, as in the authors'
    code.
    """
    means, before, pairs = [path[0].copy(), gradients[0].copy()], None, []
    for step in range(1, len(path)):
        for which, values in enumerate((path, gradients)):
            means[which] = decays[which] * means[which] + weights[which] * values[step]
        if (step + 1) % PERIOD:
            continue
        if before is not None:
            pairs.append((means[0] - before[0], means[1] - before[1]))
        before = [mean.copy() for mean in means]
        if restart:
            means[1] = gradients[step].copy()
    return pairs


def averages_table() -> None:
    """How well ``y = A s`` holds without noise when the averages are those of the authors' code."""
    path = np.array(list(descend(CALM, "gradient descent", 0, steps=12 * PERIOD)))
    gradients = CALM.curvature * path
    centre = np.random.default_rng(1).standard_normal(CALM.dim)
    kinds: dict[str, dict[str, Any]] = {
        "the published formulas": {},
        "only $M_g$ restarted after a pair": {"restart": True},
        "averages without the factor 1 - β": {"weights": (1.0, 1.0)},
        "β = 0.9 for θ, 0.99 for g": {"decays": (0.9, 0.99), "weights": (0.1, 0.01)},
        "all three, as in the authors' class": {
            "decays": (0.9, 0.99),
            "weights": (1.0, 1.0),
            "restart": True,
        },
    }
    rows = []
    for name, kind in kinds.items():
        pairs = averaged_pairs(path + centre, gradients, **kind)
        errors = [np.linalg.norm(y - CALM.curvature * s) / np.linalg.norm(y) for s, y in pairs]
        s, theta = pairs[0][0], path[2 * PERIOD - 1] + centre
        aligned = abs(s @ theta) / np.linalg.norm(s) / np.linalg.norm(theta)
        rows.append((name, f"{errors[0]:.1e}", f"{np.median(errors):.1e}", f"{aligned:.2f}"))
    heading = ("averages", "error of the first pair", "median error", "\\|cos\\| between first s and θ")
    style.table("published_averages", heading, rows)


def scaled_loss(preset: str, scale: float, *, told: bool) -> float:
    """Ratio of the last loss to the first, without noise, when the loss is multiplied by a scale.

    With `told` the steps before the first pair are divided by the scale, so that they can do no harm.
    """
    settings: dict[str, Any] = {"update_every": PERIOD} if preset == "formulas" else {}
    config = core.Config(preset=preset, **settings)
    x = np.random.default_rng(0).standard_normal(CALM.dim)
    first, state = CALM.loss(x), core.Method(config).init([x])
    for _ in range(STEPS):
        check, due, *_ = core.Method(config).upcoming(state)
        with np.errstate(over="ignore", invalid="ignore"):
            update, state = core.Method(config).step(
                state, [x], [scale * CALM.curvature * x], when_check=bool(check), when_due=bool(due)
            )
            rate = RATE / scale if told and int(state.pairs[0]) == 0 else RATE
            x = x - rate * update[0]
        if not CALM.loss(x) <= LOST * first:
            return np.inf
    return CALM.loss(x) / first


def scale_table() -> None:
    """The loss multiplied by powers of ten."""
    rows = []
    for name, preset, told in (
        ("published formulas", "formulas", False),
        ("published formulas, first steps told the scale", "formulas", True),
        ("published recipe", "paper", False),
        ("mL-BFGS (`fit`)", "fit", False),
    ):
        lasts = [scaled_loss(preset, scale, told=told) for scale in SCALES]
        rows.append((name, *("diverges" if not np.isfinite(last) else f"{last:.1e}" for last in lasts)))
    style.table(
        "published_scale", ("last loss / first", *(f"loss times {scale:g}" for scale in SCALES)), rows
    )


def ablation_table() -> None:
    """`fit` with one part removed at a time, on the noisy quadratics."""
    methods: dict[str, dict[str, Any] | None] = {
        name: {"preset": "fit", **change} for name, change in ABLATIONS.items()
    }
    noisy = runs({"Newton": METHODS["Newton"], **methods})
    rows = []
    for name in methods:
        own = noisy[name]
        total = sum(run.diverged for run in own.values())
        steps = float(np.median(own[CALM].steps_to(1e-2) / noisy["Newton"][CALM].steps_to(1e-2)))
        rows.append(
            (name, f"{total} of {SEEDS * len(PROBLEMS)}", f"{steps:.1f}", _factor(_worst_floor(noisy, name)))
        )
    heading = (
        "`fit`, one part changed",
        "diverged",
        "steps / Newton's, without noise",
        "worst noise floor / Newton's",
    )
    style.table("published_ablation", heading, rows)
    style.text("published_verdict", _verdict(noisy))


def _worst_floor(noisy: dict[str, dict[Problem, Runs]], name: str) -> float:
    """Loss in the last quarter relative to Newton's, median of the seeds, on the worst noisy problem."""
    ratios = (noisy[name][p].floor / noisy["Newton"][p].floor for p in PROBLEMS if p.noise)
    return max(float(np.median(ratio)) for ratio in ratios)


def _factor(value: float) -> str:
    return "lost" if value > 1e4 or not np.isfinite(value) else f"{value:.1f}"


def _verdict(noisy: dict[str, dict[Problem, Runs]]) -> str:
    large = scaled_loss("formulas", SCALES[-1], told=True)
    small = scaled_loss("formulas", SCALES[0], told=False)
    recipe = [scaled_loss("paper", scale, told=False) for scale in SCALES]
    fit = [scaled_loss("fit", scale, told=False) for scale in SCALES]
    bare, whole = (_worst_floor(noisy, name) for name in ("no cosine floor", "`fit` as it is"))
    grown = "diverge" if not np.isfinite(large) else f"end at {large:.0e} of the first loss"
    return (
        f"The published bounds are absolute: with the loss times {SCALES[-1]:g} the formulas {grown}, even "
        f"with first steps that are told the scale, and with the loss times {SCALES[0]:g} they end at "
        f"{small:.2f} of the first. The published recipe, whose steps have a fixed length, ends at "
        f"{min(recipe):.0e} to {max(recipe):.0e}, and `fit` at {max(fit):.0e} at every scale. Without the "
        f"cosine floor the loss of `fit` that noise leaves rises from {whole:.1f} to {_factor(bare)} times "
        "Newton's on the worst problem."
    )


def recipe_table() -> None:
    """The formulas with one part of the recipe, on the noisy quadratics and on the small network."""
    methods: dict[str, dict[str, Any] | None] = {
        name: {"preset": "formulas", **change} for name, change in PARTS.items()
    }
    noisy = runs(methods)
    rows = []
    for name, settings in methods.items():
        total = sum(run.diverged for run in noisy[name].values())
        rows.append((name, f"{total} of {SEEDS * len(PROBLEMS)}", *_trained(settings or {})))
    heading = ("formulas, with the recipe's", "quadratics: diverged", "network: train loss", "learning rate")
    style.table("published_recipe", heading, rows)


def network_table() -> None:
    """The default with one part changed, on the small network: mean last loss at the better of two rates."""
    rows = [(name, *_trained(change)) for name, change in NETWORK_ABLATIONS.items()]
    style.table("published_network", ("default, one part changed", "train loss", "learning rate"), rows)


def _trained(change: Mapping[str, Any]) -> tuple[str, str]:
    """Last loss of the small network, mean over the seeds, at the better of two rates, and that rate."""
    means, rates = [], NETWORK_RATES[core.Config(**change).step_length]
    for rate in rates:
        optimizer = partial(MLBFGS, lr=rate, **change)
        losses = [
            network.train(optimizer, BATCH, TRAINED, seed, record=False, decay=True).loss
            for seed in range(NETWORK_SEEDS)
        ]
        means.append(float(np.mean(losses)))
    best = int(np.nanargmin(means))
    return f"{means[best]:.4f}", f"{rates[best]:g}"
