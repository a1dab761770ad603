"""The class for pytorch_optimizer takes the steps of `mlbfgs_torch.MLBFGS`; its wrappers take the class."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from pytorch_optimizer import SAM, Lookahead
from pytorch_optimizer.base.exception import NoSparseGradientError
from pytorch_optimizer_class import MLBFGS

import mlbfgs_torch
from tests.embedding.helpers import ADAPTIVE, FAST

INPUTS = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 4)))
TARGETS = torch.sin(INPUTS[:, :2])


def make_model(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(dtype)


def loss_of(model, inputs=INPUTS):
    dtype = model[0].weight.dtype
    return (model(inputs.to(dtype)) - TARGETS.to(dtype)).square().mean()


def train(model, optimizer, steps, inputs=INPUTS):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()


def flat(model):
    return torch.cat([param.detach().reshape(-1) for param in model.parameters()])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        FAST,
        ADAPTIVE,
        *({"preset": name, "update_every": 3} for name in ("paper", "formulas")),
        {"history_size": 0},
        {"history_size": 0, "preconditioner": "none"},
    ],
)
def test_each_step_is_that_of_the_pytorch_adapter(settings, maximize):
    model, twin = make_model(), make_model()
    options = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.01, "maximize": maximize, **settings}
    optimizer = MLBFGS(model.parameters(), **options)
    expected = mlbfgs_torch.MLBFGS(twin.parameters(), **options)
    for _ in range(15):
        train(model, optimizer, 1)
        train(twin, expected, 1)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)
    assert (optimizer.param_groups[0]["coefficients"]["pairs"] > 0) == (settings.get("history_size") != 0)


def test_a_nan_gradient_is_a_skipped_step():
    model, twin = make_model(), make_model()
    optimizer = MLBFGS(model.parameters(), weight_decay=0.01, **FAST)
    train(model, optimizer, 5)
    before = flat(model)
    train(model, optimizer, 1, INPUTS * torch.nan)
    assert torch.equal(flat(model), before)
    assert optimizer.param_groups[0]["coefficients"]["skipped"] == 1
    train(model, optimizer, 5)
    train(twin, MLBFGS(twin.parameters(), weight_decay=0.01, **FAST), 10)
    assert torch.equal(flat(model), flat(twin))


def test_a_parameter_without_a_gradient_keeps_still():
    model = make_model()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = MLBFGS(model.parameters(), weight_decay=0.01, **FAST)
    train(model, optimizer, 6)
    assert torch.equal(model[0].weight, before)
    assert optimizer.param_groups[0]["coefficients"]["leaf_steps"].tolist() == [0, 0, 6, 6]


def test_a_sparse_gradient_is_refused():
    table = torch.nn.Embedding(3, 2, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(NoSparseGradientError):
        MLBFGS(table.parameters()).step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_run_goes_on_to_the_bit(dtype):
    model, resumed = make_model(dtype), make_model(dtype)
    optimizer, other = (MLBFGS(each.parameters(), **ADAPTIVE) for each in (model, resumed))
    train(model, optimizer, 8)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    train(model, optimizer, 8)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, 8)
    assert torch.equal(flat(resumed), flat(model))
    assert other.param_groups[0]["coefficients"]["step"] == 16


def test_each_group_has_its_own_rate_and_curvature():
    model = make_model()
    groups = [{"params": model[0].parameters(), "lr": 0.2}, {"params": model[2].parameters()}]
    optimizer = MLBFGS(groups, lr=0.05, momentum=0.0, **FAST)
    for _ in range(6):
        before = [torch.cat([p.detach().reshape(-1) for p in model[i].parameters()]) for i in (0, 2)]
        train(model, optimizer, 1)
        after = [torch.cat([p.detach().reshape(-1) for p in model[i].parameters()]) for i in (0, 2)]
        sizes = [float((b - a).square().mean().sqrt()) for a, b in zip(before, after, strict=True)]
        assert sizes == pytest.approx([0.2, 0.05], rel=1e-9)


def test_lookahead_interpolates_between_its_steps():
    model, twin = make_model(), make_model()
    slow = flat(twin)
    train(model, Lookahead(MLBFGS(model.parameters(), **FAST), k=4, alpha=0.5), 4)
    train(twin, MLBFGS(twin.parameters(), **FAST), 4)
    torch.testing.assert_close(flat(model), (slow + flat(twin)) / 2, rtol=1e-12, atol=1e-12)


def test_sam_trains_with_it():
    model = make_model()
    optimizer = SAM(model.parameters(), MLBFGS, rho=0.01, lr=0.05, **FAST)
    before = loss_of(model).item()

    def closure():
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.zero_grad()
        closure()
        optimizer.step(closure)
    assert loss_of(model).item() < 0.2 * before
