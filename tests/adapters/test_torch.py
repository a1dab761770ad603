"""`MLBFGS` behaves as a `torch.optim.Optimizer` should, and does what the core says."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import array_api_compat.torch as xp
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.reference import Reference
from mlbfgs_torch import MLBFGS, units
from mlbfgs_torch import leaves as torch_leaves
from mlbfgs_torch.rows import ROWS, unpack
from tests.trainers.helpers import FAST, assert_same, train, weights

pytestmark = pytest.mark.backends("torch")


def make_model(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def make_data(steps, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 4, generator=generator).to(dtype), torch.randn(16, 2, generator=generator).to(dtype))
        for _ in range(steps)
    ]


def flat(values):
    return torch.cat([value.detach().reshape(-1) for value in values])


@pytest.mark.parametrize(
    "settings",
    [{"update_every": 6}, FAST, {"preset": "fit", "update_every": 6}, {"preset": "lbfgs"}],
    ids=str,
)
@pytest.mark.parametrize("nesterov", [True, False])
def test_trajectory_is_the_cores(settings, nesterov, coefficients):
    data, model = make_data(20), make_model()
    twin = weights(model)
    numbers = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    optimizer = MLBFGS(model.parameters(), **numbers, **settings)
    config, buffers = core.Config(**settings), [torch.zeros_like(p) for p in twin]
    state = core.Method(config).init(twin, xp=xp)
    for inputs, targets in data:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        update, state = core.Method(config).step(state, twin, [p.grad.clone() for p in model.parameters()])
        optimizer.step()
        for param, buffer, direction in zip(twin, buffers, update, strict=True):
            buffer.mul_(0.9).add_(direction)
            change = direction + 0.9 * buffer if nesterov else buffer
            param.mul_(1 - 0.05 * 0.01).sub_(0.05 * change)
        torch.testing.assert_close(flat(model.parameters()), flat(twin), rtol=1e-9, atol=1e-11)
    assert int(state.pairs[0]) > 0


@pytest.mark.parametrize("settings", [{"update_every": 6}, FAST, {"preset": "lbfgs"}], ids=str)
@pytest.mark.parametrize("blocks", ["all", "parameter"])
def test_small_parameters_side_by_side_give_the_same_trajectory(monkeypatch, settings, blocks, coefficients):
    def run():
        model, data = make_model(), make_data(20)
        optimizer = MLBFGS(model.parameters(), lr=0.05, weight_decay=0.1, blocks=blocks, **settings)
        return flat(train(model, optimizer, data).parameters()), len(optimizer._units[0].leaves)

    together, few = run()
    monkeypatch.setitem(torch_leaves._SMALL, "cpu", 0)
    apart, many = run()
    assert (few, many) == ((1, 4) if blocks == "all" else (4, 4))
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-11)


def test_state_dict_round_trip_continues_bit_for_bit():
    data, model = make_data(30, torch.float32), make_model(dtype=torch.float32)
    optimizer = MLBFGS(model.parameters(), lr=0.1, check_every=1)
    train(model, optimizer, data[:15])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    other = copy.deepcopy(model)
    resumed = MLBFGS(other.parameters(), lr=0.5, history_size=10)
    file.seek(0)
    with pytest.warns(UserWarning, match="`history_size`=5 of the loaded state"):
        resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(weights(train(model, optimizer, data[15:])), weights(train(other, resumed, data[15:])))
    assert int(resumed.diagnostics()[0].step) == 30


def test_loading_does_not_tie_two_optimizers_together():
    data, model = make_data(12), make_model()
    optimizer = MLBFGS(model.parameters(), **FAST)
    train(model, optimizer, data[:6])
    twin = copy.deepcopy(model)
    other = MLBFGS(twin.parameters(), **FAST)
    other.load_state_dict(optimizer.state_dict())
    train(model, optimizer, data[6:])
    expected = weights(model)
    assert_same(weights(train(twin, other, data[6:])), expected)


def test_loading_keeps_float32_memory_of_bfloat16_parameters():
    data, model = make_data(20, torch.bfloat16), make_model(dtype=torch.bfloat16)
    optimizer = MLBFGS(model.parameters(), lr=0.05, **FAST)
    train(model, optimizer, data[:10])
    other = copy.deepcopy(model)
    resumed = MLBFGS(other.parameters(), lr=0.05, **FAST)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for entry in resumed.state.values():
        assert entry["history"].dtype == entry["mean_grads"].dtype == torch.float32
        assert entry["coefficients"].dtype == torch.float32
        assert entry["counters"].dtype == torch.int32
    assert_same(weights(train(model, optimizer, data[10:])), weights(train(other, resumed, data[10:])))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_continue_like_the_original(duplicate):
    data, model = make_data(14), make_model()
    optimizer = MLBFGS(model.named_parameters(), blocks="layer", **FAST)
    train(model, optimizer, data[:7])
    other, resumed = duplicate((model, optimizer))
    train(model, optimizer, data[7:])
    expected = weights(model)
    assert_same(weights(train(other, resumed, data[7:])), expected)
    assert len(resumed.diagnostics()[0].pairs) == 2


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_gradient_changes_nothing_but_a_counter(poison, coefficients):
    data, model = make_data(10), make_model()
    optimizer = MLBFGS(model.parameters(), weight_decay=0.1, **FAST)
    train(model, optimizer, data[:6])
    before, memory = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    for param in model.parameters():
        param.grad = torch.full_like(param, 1.0)
    next(model.parameters()).grad[0, 0] = poison
    optimizer.step()
    assert_same(weights(model), before)
    for key, entry in optimizer.state_dict()["state"].items():
        was = memory[key] | unpack(memory[key])
        for name, value in (entry | unpack(entry)).items():
            if name not in ("skipped", "accepted", "due", "counters"):
                assert torch.equal(value, was[name]), name
    assert int(optimizer.diagnostics()[0].skipped) == 1
    train(model, optimizer, data[6:])
    assert torch.isfinite(flat(model.parameters())).all()


def test_a_nan_in_one_group_skips_the_step_of_all(coefficients):
    model = make_model()
    first, last = model[0], model[2]
    optimizer = MLBFGS([{"params": first.parameters()}, {"params": last.parameters(), "history_size": 2}])
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    last.bias.grad[0] = float("nan")
    before = weights(model)
    optimizer.step()
    assert_same(weights(model), before)
    assert [int(record.skipped) for record in optimizer.diagnostics()] == [1, 1]


def test_maximize_climbs_as_minimizing_the_negative_descends():
    def run(sign, maximize):
        model, data = make_model(), make_data(12)
        optimizer = MLBFGS(model.parameters(), maximize=maximize, **FAST)
        for inputs, targets in data:
            optimizer.zero_grad()
            (sign * (model(inputs) - targets).square().mean()).backward()
            optimizer.step()
        return weights(model)

    assert_same(run(1.0, False), run(-1.0, True))


def test_gradients_are_not_written():
    model = make_model()
    optimizer = MLBFGS(model.parameters(), maximize=True, weight_decay=0.1, **FAST)
    for inputs, targets in make_data(5):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        before = [(p.grad.clone(), p.grad._version) for p in model.parameters()]
        optimizer.step()
        for param, (grad, version) in zip(model.parameters(), before, strict=True):
            assert torch.equal(param.grad, grad)
            assert param.grad._version == version


def test_parameter_without_a_gradient_keeps_still_and_takes_no_memory():
    model, data = make_model(), make_data(6)
    optimizer = MLBFGS(model.parameters(), weight_decay=0.1, **FAST)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    train(model, optimizer, data)
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state
    model[0].weight.requires_grad_(True)  # unfreezing later
    train(model, optimizer, data)
    assert not torch.equal(model[0].weight, before)
    optimizer.zero_grad()
    kept = weights(model)
    assert optimizer.step() is None
    assert_same(weights(model), kept)


def test_groups_that_differ_in_rate_only_share_curvature():
    data = make_data(12)

    def run(split):
        model = make_model()
        groups = (
            [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.1}]
            if split
            else model.parameters()
        )
        optimizer = MLBFGS(groups, lr=0.1, **FAST)
        return weights(train(model, optimizer, data)), optimizer

    together, _ = run(split=False)
    apart, optimizer = run(split=True)
    torch.testing.assert_close(together, apart)
    assert len(optimizer.diagnostics()) == 1


@pytest.mark.parametrize(
    ("arguments", "momentum", "nesterov"),
    [
        ({}, 0.9, True),
        ({"preset": "default", "momentum": 0.5}, 0.5, True),
        ({"nesterov": False}, 0.9, False),
        ({"preset": "paper", "update_every": 4}, 0.9, False),
        ({"preset": "formulas", "update_every": 4}, 0.9, False),
        ({"preset": "fit", "momentum": 0.8}, 0.8, False),
        ({"preset": "lbfgs", "momentum": 0.8, "nesterov": True}, 0.8, True),
    ],
    ids=str,
)
def test_momentum_is_that_of_sgd_fed_with_the_directions(arguments, momentum, nesterov):
    data, model = make_data(20), make_model()
    twin = weights(model)
    optimizer = MLBFGS(model.parameters(), lr=0.05, **arguments)
    sgd = torch.optim.SGD(twin, lr=0.05, momentum=momentum, nesterov=nesterov)
    known = (*adapter.SETTINGS, "preset")
    config = core.Config(**{name: value for name, value in arguments.items() if name in known})
    state = core.Method(config).init(twin, xp=xp)
    for inputs, targets in data:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        directions, state = core.Method(config).step(
            state, twin, [p.grad.clone() for p in model.parameters()]
        )
        for param, direction in zip(twin, directions, strict=True):
            param.grad = direction.clone()
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(flat(model.parameters()), flat(twin), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 1e-3),
        ({"step_length": "unit"}, 0.1),
        *(({"preset": name}, 0.1) for name in ("paper", "formulas", "lbfgs", "fit")),
    ],
)
def test_the_learning_rate_fits_the_step_length_where_none_is_given(settings, rate):
    assert MLBFGS([nn.Parameter(torch.ones(2))], **settings).param_groups[0]["lr"] == rate
    assert MLBFGS([nn.Parameter(torch.ones(2))], 0.5, **settings).param_groups[0]["lr"] == 0.5


def test_groups_have_the_momentum_of_their_preset():
    presets = ["default", "paper", "formulas", "lbfgs", "fit"]
    optimizer = MLBFGS(
        [{"params": [nn.Parameter(torch.ones(1))], "preset": k} for k in presets], nesterov=False
    )
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.9, 0.9, 0.0, 0.0]
    assert [group["nesterov"] for group in optimizer.param_groups] == [True, *4 * [False]]
    assert [group["shrinkage"] == 1 for group in optimizer.param_groups] == [False, *4 * [True]]
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert optimizer.param_groups[-1]["nesterov"] is False


def test_a_state_dict_of_an_older_version_goes_on_as_it_was():
    data, model = make_data(20), make_model()
    as_before = {"nesterov": False, "shrinkage": 1.0}
    optimizer = MLBFGS(model.parameters(), lr=0.05, **as_before)
    train(model, optimizer, data[:12])
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        for name in as_before:
            del group[name]
    twin = copy.deepcopy(model)
    resumed = MLBFGS(twin.parameters())
    resumed.load_state_dict(state)
    assert {name: resumed.param_groups[0][name] for name in as_before} == as_before
    assert_same(
        *(
            list(each.parameters())
            for each in (train(twin, resumed, data[12:]), train(model, optimizer, data[12:]))
        )
    )


def test_a_state_dict_keeps_the_settings_that_its_preset_had_when_it_was_saved():
    as_before = {"beta": 0.9, "update_every": 20, "damping": (0.01, 10.0, 0.9), "step_length": "none"}
    data, model = make_data(50), make_model()
    optimizer = MLBFGS(model.parameters(), lr=0.01, preset="paper", **as_before)
    train(model, optimizer, data[:45])
    twin = copy.deepcopy(model)
    resumed = MLBFGS(twin.parameters(), preset="paper")
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert {name: resumed.param_groups[0][name] for name in as_before} == as_before
    assert_same(
        *(
            list(each.parameters())
            for each in (train(twin, resumed, data[45:]), train(model, optimizer, data[45:]))
        )
    )
    assert int(resumed.diagnostics()[0].pairs[0]) == 1


def test_groups_with_their_own_settings_stand_alone():
    model, data = make_model(), make_data(8)
    optimizer = MLBFGS(model[0].parameters(), momentum=0.9, **FAST)
    optimizer.add_param_group({"params": list(model[2].parameters()), "preset": "fit", "weight_decay": 0.1})
    assert [group["momentum"] for group in optimizer.param_groups] == [0.9, 0.0]
    assert [group["step_length"] for group in optimizer.param_groups] == ["rms", "clip"]
    train(model, optimizer, data)
    assert [int(record.step) for record in optimizer.diagnostics()] == [8, 8]


def test_parameters_may_be_added_in_the_middle():
    model, data = make_model(), make_data(12)
    optimizer = MLBFGS(model[0].parameters(), **FAST)
    train(model, optimizer, data[:6])
    optimizer.add_param_group({"params": model[2].parameters()})
    before = weights(model[2])
    train(model, optimizer, data[6:])
    assert not torch.equal(model[2].weight, before[0])
    assert int(optimizer.diagnostics()[0].step) == 12


@pytest.mark.parametrize(
    ("blocks", "count"), [("all", 1), ("layer", 2), ("parameter", 4), (lambda name: "bias" in name, 2)]
)
def test_blocks_partition_named_parameters(blocks, count):
    model = make_model()
    optimizer = MLBFGS(model.named_parameters(), blocks=blocks, **FAST)
    train(model, optimizer, make_data(8))
    (record,) = optimizer.diagnostics()
    assert record.pairs.shape == (count,)
    assert (record.pairs > 0).all()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=True),
        lambda o: torch.optim.lr_scheduler.LinearLR(o),
    ],
    ids=["cosine", "one cycle", "linear"],
)
def test_learning_rate_schedulers_drive_it(schedule):
    model = make_model()
    optimizer = MLBFGS(model.parameters(), lr=0.1, **FAST)
    scheduler, seen = schedule(optimizer), []
    for batch in make_data(10):
        train(model, optimizer, [batch], scheduler)
        seen.append(optimizer.param_groups[0]["lr"])
    assert len(set(seen)) > 3
    assert torch.isfinite(flat(model.parameters())).all()


def test_tensor_learning_rate_equals_the_number():
    data, results = make_data(10), []
    for rate in (0.05, torch.tensor(0.05, dtype=torch.float64)):
        model = make_model()
        results.append(weights(train(model, MLBFGS(model.parameters(), lr=rate, **FAST), data)))
    torch.testing.assert_close(results[0], results[1])


def test_closure_is_evaluated_once_with_gradients_and_its_loss_returned():
    model, calls = make_model(), []
    optimizer = MLBFGS(model.parameters(), **FAST)
    inputs, targets = make_data(1)[0]

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert calls == [True]


def test_non_contiguous_empty_and_scalar_parameters_train():
    params = [
        nn.Parameter(torch.randn(6, 4, dtype=torch.float64).t()),
        nn.Parameter(torch.randn(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)),
        nn.Parameter(torch.tensor(1.0, dtype=torch.float64)),
        nn.Parameter(torch.zeros(0, 3, dtype=torch.float64)),
    ]
    straight = [nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in params]
    for leaves in (params, straight):
        optimizer = MLBFGS(leaves, **FAST)
        for _ in range(12):
            optimizer.zero_grad()
            sum((p * p * (i + 1)).sum() for i, p in enumerate(leaves)).backward()
            optimizer.step()
    torch.testing.assert_close(flat(params), flat(straight))


def test_several_dtypes_share_a_block():
    params = [
        nn.Parameter(torch.ones(5, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)
    ]
    optimizer = MLBFGS(params, lr=0.05, **FAST)
    start = sum(float(p.detach().double().square().sum()) for p in params)
    for _ in range(15):
        optimizer.zero_grad()
        sum((p * p).sum().double() for p in params).backward()
        optimizer.step()
    assert sum(float(p.detach().double().square().sum()) for p in params) < start
    assert [optimizer.state[p]["history"].dtype for p in params] == [
        torch.float32,
        torch.float64,
        torch.float32,
    ]


BASES = [
    {"history_size": 0},
    {"history_size": 0, "preconditioner": "none"},
    {"history_size": 0, "step_length": "clip", "lr": 0.1},
    {"history_size": 0, "step_length": "none", "lr": 0.1, "momentum": 0.0},
]
"""Optimizers without pairs."""


@pytest.mark.parametrize("settings", [{}, {"preset": "fit"}, *BASES], ids=str)
def test_memory_is_what_was_planned(settings):
    model = make_model(dtype=torch.float32)
    optimizer = MLBFGS(model.parameters(), **{**settings, "momentum": 0.0})
    train(model, optimizer, make_data(1, torch.float32))
    config = {name: optimizer.param_groups[0][name] for name in adapter.SETTINGS}
    plan = core.plan_memory(core.Config(**config), list(model.parameters()))
    held = sum(
        value.numel() * value.element_size()
        for entry in optimizer.state.values()
        for name, value in entry.items()
        if name not in ROWS
    )
    assert held == plan.history + plan.averages + plan.preconditioner


@pytest.mark.parametrize("settings", BASES, ids=str)
def test_without_pairs_the_base_optimizer_trains_and_resumes(settings, tmp_path):
    """The preconditioned gradient with the control of its length, against the dense reference."""
    model, data = make_model(), make_data(40)
    optimizer = MLBFGS(model.named_parameters(), **settings)
    group = optimizer.param_groups[0]
    config = core.Config(**{name: group[name] for name in adapter.SETTINGS})
    params = list(model.parameters())
    reference = Reference(config, [sum(param.numel() for param in params)])
    x = np.concatenate([param.detach().numpy().ravel() for param in params])
    velocity = np.zeros_like(x)
    for inputs, targets in data:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        (d,) = reference.step([x], [np.concatenate([param.grad.numpy().ravel() for param in params])])
        velocity = group["momentum"] * velocity + d
        x = x - group["lr"] * (d + group["momentum"] * velocity if group["nesterov"] else velocity)
        optimizer.step()
        ours = np.concatenate([param.detach().numpy().ravel() for param in params])
        np.testing.assert_allclose(ours, x, rtol=1e-12, atol=1e-12)
    optimizer.save_state(tmp_path / "run")
    other = make_model()
    resumed = MLBFGS(other.named_parameters(), **settings)
    resumed.load_state(tmp_path / "run")
    for own, run in ((model, optimizer), (other, resumed)):
        train(own, run, data[:5])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "`lr` must be finite and >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "`lr`"),
        ({"lr": "0.1"}, TypeError, "`lr` must be a number, got '0.1'"),
        ({"lr": torch.ones(2)}, TypeError, "`lr` must be a number, got a tensor"),
        ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, ValueError, "`weight_decay` must be finite and >= 0, got -0.1"),
        ({"maximize": 1}, TypeError, "`maximize` must be a bool, got 1"),
        ({"nesterov": 1}, TypeError, "`nesterov` must be a bool, got 1"),
        ({"shrinkage": 1.5}, ValueError, r"`shrinkage` must be in \[0, 1\], got 1.5"),
        ({"history_size": -1}, ValueError, "`history_size` must be >= 0, got -1"),
        ({"preset": "best"}, ValueError, "`preset`"),
        ({"eps": 1e-8}, TypeError, "unknown setting `eps`; leave it out"),
        ({"learning_rate": 0.1}, TypeError, "unknown setting `learning_rate`; `lr` is its name here"),
        ({"colour": 1}, TypeError, "the settings are lr, momentum, weight_decay, preset, "),
        ({"blocks": "layers"}, ValueError, "`blocks` must be .*, got 'layers'"),
        ({"blocks": "layer"}, ValueError, "named_parameters"),
    ],
)
def test_bad_settings_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        MLBFGS([nn.Parameter(torch.ones(2))], **arguments)


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "empty parameter list"),
        ([{"params": {nn.Parameter(torch.ones(2))}}], TypeError, "ordered collections"),
        ([{"params": []}], ValueError, "`params` must hold at least one parameter, got none"),
        ([torch.ones(2, dtype=torch.int64)], TypeError, "int64"),
    ],
)
def test_bad_parameters_are_refused(params, error, words):
    with pytest.raises(error, match=words):
        MLBFGS(params)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    model = make_model()
    optimizer = MLBFGS(model[0].parameters(), **FAST)
    with pytest.raises(ValueError, match="`beta`"):
        optimizer.add_param_group({"params": list(model[2].parameters()), "beta": 2.0})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer, make_data(4))


def test_sparse_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = MLBFGS(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def test_float32_trajectory_follows_float64():
    results = {}
    for dtype in (torch.float32, torch.float64):
        model = make_model()
        model.to(dtype)
        optimizer = MLBFGS(model.parameters(), lr=0.02, **FAST)
        results[dtype] = flat(train(model, optimizer, make_data(10, dtype)).parameters()).double().numpy()
    np.testing.assert_allclose(results[torch.float32], results[torch.float64], atol=1e-3)


class Calls(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, FAST, {"preset": "fit"}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_no_step_reads_a_number_off_a_tensor(settings, rate, monkeypatch):
    monkeypatch.setattr(units, "HOSTS", ())  # as where reading a number would wait for the device
    model = make_model()
    optimizer = MLBFGS(model.parameters(), lr=rate, momentum=0.9, weight_decay=0.1, **settings)
    for inputs, targets in make_data(12):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        with Calls() as calls:
            optimizer.step()
        assert len(calls.names) > 100
        assert not [name for name in calls.names if "_local_scalar_dense" in name or "nonzero" in name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"update_every": 6},
        FAST,
        {"preset": "fit", "update_every": 6},
        {"blocks": "parameter", "weight_decay": 0.1, "maximize": True, **FAST},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's compiler calls it itself
def test_compiled_step_is_one_graph_compiled_once_and_equals_the_eager_one(settings):
    torch._dynamo.reset()
    model, data = make_model(), make_data(12)
    optimizer = MLBFGS(model.parameters(), lr=0.05, **settings)
    expected = weights(train(model, optimizer, data))
    torch._dynamo.utils.counters.clear()
    model = make_model()
    optimizer = MLBFGS(model.parameters(), lr=0.05, **settings)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    for inputs, targets in data:
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert (optimizer.diagnostics()[0].pairs > 0).all()
    torch.testing.assert_close(weights(model), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_compiled_step_follows_a_scheduled_tensor_rate_without_compiling_again():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    results = []
    for compiled in (False, True):
        model = make_model()
        optimizer = MLBFGS(model.parameters(), lr=torch.tensor(0.05, dtype=torch.float64), **FAST)
        step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else None
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for inputs, targets in make_data(8):
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            (step or optimizer.step)()
            optimizer._opt_called = True  # the scheduler looks for the step that it has wrapped
            scheduler.step()
        results.append(weights(model))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("settings", [{}, FAST], ids=str)
def test_masked_steps_equal_those_that_the_host_decides(settings):
    results = []
    for capturable in (False, True):
        model = make_model()
        optimizer = MLBFGS(model.parameters(), capturable=capturable, **settings)
        results.append(weights(train(model, optimizer, make_data(20))))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("settings", [FAST, {"update_every": 6}, {"preset": "lbfgs"}], ids=str)
def test_complex_parameters_count_as_pairs_of_reals(settings):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, dtype=torch.complex128, generator=generator)
    target = torch.randn(3, 2, dtype=torch.complex128, generator=generator)
    compound, pairs = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    optimizers = [MLBFGS([param], lr=0.05, weight_decay=0.1, **settings) for param in (compound, pairs)]
    for _ in range(15):
        for param, optimizer in zip((compound, pairs), optimizers, strict=True):
            optimizer.zero_grad()
            value = param if param.is_complex() else torch.view_as_complex(param)
            (value - target).abs().square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(compound), pairs)
    assert optimizers[0].state[compound]["history"].shape == (
        2,
        optimizers[0].defaults["history_size"],
        3,
        2,
        2,
    )


def test_coupled_weight_decay_is_a_term_of_the_gradient():
    data, results = make_data(15), []
    for decay in (0.3, 0.0):
        model = make_model()
        optimizer = MLBFGS(model.parameters(), weight_decay=decay, decoupled_weight_decay=False, **FAST)
        for inputs, targets in data:
            optimizer.zero_grad()
            loss = (model(inputs) - targets).square().mean()
            if decay == 0:
                loss = loss + 0.15 * sum(param.square().sum() for param in model.parameters())
            loss.backward()
            optimizer.step()
        results.append(flat(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("absent", [0, 2])
def test_a_gradient_that_comes_and_goes_splits_a_leaf_once_and_loses_nothing(monkeypatch, absent):
    def run(small):
        monkeypatch.setitem(torch_leaves._SMALL, "cpu", small)
        model = make_model()
        params = list(model.parameters())
        optimizer, bound = MLBFGS(params, lr=0.05, **FAST), []
        for number, (inputs, targets) in enumerate(make_data(20)):
            optimizer.zero_grad()
            (model(inputs) - targets).square().mean().backward()
            if number % 5 == 3:
                params[absent].grad = None
            optimizer.step()
            bound.append(optimizer._units[0])
        return flat(params), len(set(map(id, bound))), optimizer._units[0].leaves

    packed, bindings, leaves = run(2**16)
    alone, _, _ = run(0)
    assert (bindings, len(leaves)) == (2, 2)
    torch.testing.assert_close(packed, alone, rtol=1e-8, atol=1e-10)


def test_changing_blocks_or_memory_during_a_run_forgets_the_curvature_with_a_warning():
    model, data = make_model(), make_data(20)
    optimizer = MLBFGS(model.named_parameters(), blocks="layer", **FAST)
    train(model, optimizer, data[:8])
    resumed = MLBFGS(model.named_parameters(), blocks="all", **FAST)
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.warns(UserWarning, match="forgets the curvature of 4 parameters, since its blocks"):
        train(model, resumed, data[8:9])
    assert int(resumed.diagnostics()[0].pairs[0]) == 0
    optimizer.param_groups[0]["history_size"] = 5
    with pytest.warns(UserWarning, match="4 parameters, since the settings of '2.weight' have changed"):
        train(model, optimizer, data[9:10])
    train(model, optimizer, data[10:])
    assert optimizer.state[model[0].weight]["history"].shape[1] == 5
    assert (optimizer.diagnostics()[0].pairs > 0).all()


def test_a_state_of_another_shape_is_refused_and_nothing_changes():
    model, data = make_model(), make_data(8)
    optimizer = MLBFGS(model.parameters(), **FAST)
    train(model, optimizer, data[:4])
    before = copy.deepcopy(optimizer.state_dict())
    other = [nn.Parameter(torch.zeros(7, 3, dtype=torch.float64)) for _ in range(4)]
    stranger = MLBFGS(other, **FAST)
    sum(param.sum() for param in other).backward()
    stranger.step()
    with pytest.raises(ValueError, match=r"`state_dict` .* \(6, 4\) of 'param0', got \(7, 3\)"):
        optimizer.load_state_dict(stranger.state_dict())
    for key, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before["state"][key][name]))


def test_a_step_with_rate_zero_and_zero_gradients_does_not_count():
    data = make_data(8)
    runs = []
    for rehearsed in (False, True):
        model = make_model()
        optimizer = MLBFGS(model.parameters(), weight_decay=0.1, **FAST)
        if rehearsed:
            optimizer.param_groups[0]["lr"] = 0.0
            for param in model.parameters():
                param.grad = torch.zeros_like(param)
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 1e-3
            record = optimizer.diagnostics()[0]
            assert (int(record.step), int(record.skipped)) == (0, 0)
        runs.append(weights(train(model, optimizer, data)))
    assert_same(*runs)


def test_large_products_inside_autocast_keep_full_precision():
    results = []
    for enabled in (False, True):
        param, curvature = nn.Parameter(torch.ones(70_000)), torch.linspace(0.1, 2, 70_000)
        optimizer = MLBFGS([param], **FAST)
        for _ in range(8):
            param.grad = param.detach() * curvature
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                optimizer.step()
        results.append([param.detach()])
    assert_same(*results)


@pytest.mark.parametrize("lost", [19, 40])
def test_gradients_that_are_never_finite_are_told_once(lost):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MLBFGS([param])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for value in [float("nan")] * lost + [1.0] + [float("inf")] * 19:
            param.grad = torch.full((3,), value)
            optimizer.step()
    told = [str(warning.message) for warning in caught]
    assert len(told) == (lost >= 20)
    assert all("refused the last 20 gradients" in words for words in told)
    assert {warning.filename for warning in caught} <= {__file__}


def test_before_the_first_step_diagnostics_are_those_of_a_run_without_pairs():
    model = torch.nn.Linear(3, 2)
    optimizer = MLBFGS(model.named_parameters(), blocks="parameter")
    (before,) = optimizer.diagnostics()
    assert optimizer.block_names() == [("weight", "bias")]
    assert not optimizer.state
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    (after,) = optimizer.diagnostics()
    assert before.pairs.tolist() == after.pairs.tolist() == [0, 0]
    assert (int(before.step), int(after.step)) == (0, 1)
    assert all(getattr(before, name).shape == getattr(after, name).shape for name in ("gram", "mu", "gamma"))


def test_a_loaded_history_of_another_size_is_told():
    saved = MLBFGS([torch.nn.Parameter(torch.ones(3))], history_size=5).state_dict()
    optimizer = MLBFGS([torch.nn.Parameter(torch.ones(3))], history_size=10)
    with pytest.warns(UserWarning, match="`history_size`=5 of the loaded state replaces 10") as caught:
        optimizer.load_state_dict(saved)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["histroy_size", "betas", "max_iter"])
def test_a_group_with_what_can_only_be_meant_as_a_setting_is_refused(name):
    param = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=f"unknown setting `{name}`"):
        MLBFGS([{"params": [param], name: 3}])
    optimizer = MLBFGS([{"params": [param], "initial_lr": 0.1, "name": "head", "lr_scale": 0.5}])
    assert optimizer.param_groups[0]["name"] == "head"


def test_groups_tell_of_lost_gradients_together_and_rest_does_not_count():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = MLBFGS([{"params": params[:1]}, {"params": params[1:], "history_size": 2}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(25):
            for param in params:
                param.grad = torch.full((3,), float("nan"))
            optimizer.step()
        assert len(caught) == 1
        optimizer = MLBFGS(params[:1])
        params[0].grad = torch.full((3,), float("nan"))
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0
        for _ in range(30):  # as `torch.distributed.checkpoint` makes a state
            params[0].grad = torch.zeros(3)
            optimizer.step()
    assert len(caught) == 1


def test_diagnostics_before_the_first_step_have_the_dtype_of_those_after_it():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = MLBFGS([param])
    assert optimizer.diagnostics()[0].gamma.dtype == torch.float64
