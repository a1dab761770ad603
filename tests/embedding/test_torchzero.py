"""The torchzero module takes the steps of `mlbfgs_torch.MLBFGS`, and works with torchzero's own modules."""

from __future__ import annotations

import io

import numpy as np
import pytest
import scipy.optimize
import torch
import torchzero as tz
from torchzero_module import MLBFGS

import mlbfgs_core as core
import mlbfgs_torch
from mlbfgs_core import adapter
from tests.embedding.helpers import ADAPTIVE, FAST, rosenbrock

INPUTS = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 4)))
TARGETS = torch.sin(INPUTS[:, :2])


def make_model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()


def momentum_of(settings):
    """torchzero's module for the momentum that the adapter has with these settings."""
    nesterov = adapter.preset_nesterov(settings.get("preset"))
    return tz.m.NAG(0.9) if nesterov else tz.m.HeavyBall(0.9, ema_init="zeros")


def make_optimizer(model, **settings):
    return tz.Optimizer(model.parameters(), MLBFGS(**settings), momentum_of(settings), tz.m.LR(0.01))


def backward(model, inputs=INPUTS):
    model.zero_grad()
    (model(inputs) - TARGETS).square().mean().backward()


def train(model, optimizer, steps):
    for _ in range(steps):
        backward(model)
        optimizer.step()


def flat(model):
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


def coefficients(optimizer):
    return optimizer.flat_modules[0].global_state["coefficients"]


def memory(optimizer):
    """Copies of everything that the modules remember, except their counters of calls."""
    arrays = [
        value.clone()
        for module in optimizer.flat_modules
        for state in module.state.values()
        for value in state.values()
    ]
    own = coefficients(optimizer)
    return arrays + [own[name].clone() for name in own if name not in ("skipped", "accepted", "due")]


@pytest.mark.parametrize("blocks", ["all", "layer"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        FAST,
        ADAPTIVE,
        {"preset": "fit", "update_every": 4},
        {"preset": "paper", "update_every": 3},
        {"preset": "formulas", "update_every": 3},
        {"history_size": 0},
        {"history_size": 0, "preconditioner": "none"},
    ],
    ids=["default", "fixed interval", "adaptive", "fit", "paper", "formulas", "no pairs", "nothing"],
)
def test_each_step_is_that_of_the_pytorch_adapter(settings, blocks):
    model, twin = make_model(), make_model()
    names = [name for name, _ in model.named_parameters()]
    optimizer = tz.Optimizer(
        model.parameters(),
        MLBFGS(core.partition(names, blocks), **settings),
        momentum_of(settings),
        tz.m.WeightDecay(0.01),
        tz.m.LR(0.01),
    )
    expected = mlbfgs_torch.MLBFGS(
        twin.named_parameters(), lr=0.01, momentum=0.9, weight_decay=0.01, blocks=blocks, **settings
    )
    for _ in range(20):
        train(model, optimizer, 1)
        train(twin, expected, 1)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)
    assert torch.equal(coefficients(optimizer)["pairs"], expected.diagnostics()[0].pairs)
    assert torch.all((coefficients(optimizer)["pairs"] > 0) == (settings.get("history_size") != 0))


@pytest.mark.parametrize("inside", [False, True], ids=["in front", "inner"])
def test_curvature_is_learned_from_the_gradient_and_applied_to_what_other_modules_made_of_it(inside):
    momentum = tz.m.HeavyBall(0.9, ema_init="zeros")
    own = [MLBFGS(inner=momentum, **FAST)] if inside else [momentum, MLBFGS(**FAST)]
    curvature, x = np.geomspace(0.1, 10.0, 5), torch.ones(5, dtype=torch.float64, requires_grad=True)
    optimizer = tz.Optimizer([x], *own, tz.m.LR(0.1))
    config, y, velocity = core.Config(**FAST), np.ones(5), np.zeros(5)
    state = core.Method(config).init([y])
    for _ in range(12):
        x.grad = torch.from_numpy(curvature) * x.detach()
        optimizer.step()
        grad = curvature * y
        velocity = 0.9 * velocity + grad
        state = core.Method(config).observe(state, [y], [grad])
        state = core.Method(config).refresh(state, state.due)
        (direction,), state = core.Method(config).direction(state, [velocity])
        y = y - 0.1 * direction
        np.testing.assert_allclose(x.detach(), y, rtol=1e-10, atol=1e-12)
    assert state.pairs[0] > 0


def test_a_nan_gradient_is_a_skipped_step():
    model = make_model()
    optimizer = make_optimizer(model, **FAST)
    train(model, optimizer, 7)
    weights, before = flat(model), memory(optimizer)
    backward(model, torch.where(INPUTS > 1.0, torch.nan, INPUTS))
    assert torch.isnan(next(model.parameters()).grad).any()
    optimizer.step()
    assert torch.equal(flat(model), weights)
    assert all(torch.equal(now, then) for now, then in zip(memory(optimizer), before, strict=True))
    assert int(coefficients(optimizer)["skipped"]) == 1

    train(model, optimizer, 5)
    twin = make_model()
    train(twin, make_optimizer(twin, **FAST), 12)
    assert torch.equal(flat(model), flat(twin))


def test_a_run_that_is_saved_goes_on_to_the_bit():
    model = make_model()
    optimizer = make_optimizer(model, **ADAPTIVE)
    train(model, optimizer, 9)
    file = io.BytesIO()
    # In one file: torchzero's state dict holds the parameters, which must stay those of the model.
    torch.save((model, optimizer.state_dict()), file)
    train(model, optimizer, 9)

    file.seek(0)
    resumed, state = torch.load(file, weights_only=False)
    optimizer_of_resumed = make_optimizer(resumed, **ADAPTIVE)
    optimizer_of_resumed.load_state_dict(state)
    train(resumed, optimizer_of_resumed, 9)
    assert torch.equal(flat(resumed), flat(model))
    assert int(coefficients(optimizer_of_resumed)["step"]) == 18


def test_reset_forgets_everything():
    model, twin = make_model(), make_model()
    optimizer = tz.Optimizer(model.parameters(), MLBFGS(**FAST), tz.m.LR(0.1))
    train(model, optimizer, 7)
    twin.load_state_dict(model.state_dict())
    optimizer.flat_modules[0].reset()
    train(model, optimizer, 7)
    train(twin, tz.Optimizer(twin.parameters(), MLBFGS(**FAST), tz.m.LR(0.1)), 7)
    assert torch.equal(flat(model), flat(twin))


def test_a_schedule_sets_the_size_of_a_step():
    model = make_model()
    optimizer = tz.Optimizer(model.parameters(), MLBFGS(**FAST), tz.m.LR(0.4))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(6):
        before = flat(model)
        train(model, optimizer, 1)
        schedule.step()
        size = (flat(model) - before).square().mean().sqrt()
        assert size == pytest.approx(0.4 * 0.5**step, rel=1e-9)


def test_a_clip_behind_limits_the_update():
    model = make_model()
    clip = tz.m.ClipNorm(0.05)
    optimizer = tz.Optimizer(model.parameters(), MLBFGS(step_length="none", **FAST), clip)
    lengths = []
    for _ in range(8):
        before = [param.detach().clone() for param in model.parameters()]
        train(model, optimizer, 1)
        pairs = zip(model.parameters(), before, strict=True)
        lengths += [float(torch.linalg.norm(param.detach() - old)) for param, old in pairs]
    assert max(lengths) == pytest.approx(0.05)


def test_a_line_search_behind_finds_the_minimum():
    x = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = tz.Optimizer([x], MLBFGS(preset="lbfgs"), tz.m.Backtracking())

    def closure(backward=True):
        loss = rosenbrock(x)
        if backward:
            optimizer.zero_grad()
            loss.backward()
        return loss

    for _ in range(80):
        optimizer.step(closure)
    expected = scipy.optimize.minimize(
        scipy.optimize.rosen, np.zeros(4), jac=scipy.optimize.rosen_der, method="BFGS"
    )
    np.testing.assert_allclose(x.detach(), expected.x, atol=1e-4)
