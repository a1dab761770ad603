"""In plain PyTorch loops `MLBFGS` does what a built-in optimizer does: mixed precision, gradient
scaling, accumulation and clipping, weight averaging, hooks, and distributed checkpoints."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, parametrizations
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from mlbfgs_torch import MLBFGS
from tests.trainers.helpers import (
    FAST,
    assert_different,
    assert_quasi_newton,
    assert_same,
    backward,
    cosine,
    flat,
    make_data,
    make_model,
    mean_loss,
    squared_error,
    tensors,
    train,
    weights,
)

ADAPTIVE = {"check_every": 1, "update_every": 5, "history_size": 3}
"""A check at every step, which decides whether the next one takes a pair."""

SCALE = 2.0**10


def make_scaler(**options):
    return torch.amp.GradScaler("cpu", enabled=True, **{"init_scale": SCALE, **options})


def train_scaled(model, optimizer, data, scaler, clip=None):
    for batch in data:
        optimizer.zero_grad()
        scaler.scale(squared_error(model, *batch)).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip(model.parameters())
        scaler.step(optimizer)
        scaler.update()
    return model


def backward_with_overflow(model, optimizer, batch, scaler):
    """Scaled gradients of which one value is infinite."""
    optimizer.zero_grad()
    scaler.scale(squared_error(model, *batch)).backward()
    next(model.parameters()).grad[0, 0] = float("inf")


# Mixed precision


def test_bfloat16_autocast_trains_float32_parameters():
    data, model = make_data(4, torch.float32), make_model(dtype=torch.float32)
    optimizer = MLBFGS(model.parameters(), lr=0.1, **FAST)
    scheduler, before = cosine(optimizer, 60), mean_loss(model, data)
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(data[step % 4][0])
            loss = nn.functional.mse_loss(outputs.float(), data[step % 4][1])
        assert outputs.dtype == torch.bfloat16
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert mean_loss(model, data) < 0.3 * before
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert_quasi_newton(optimizer)


def test_a_step_inside_autocast_is_the_step_outside():
    data, results = make_data(12, torch.float32), []
    for inside in (False, True):
        model = make_model(dtype=torch.float32)
        optimizer = MLBFGS(model.parameters(), weight_decay=0.01, **FAST)
        for batch in data:
            backward(model, optimizer, batch)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
                optimizer.step()
        results.append(weights(model))
        assert_quasi_newton(optimizer)
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mixed_precision_recipe_lowers_the_loss(dtype):
    data, model = make_data(4, torch.float32), make_model(dtype=torch.float32)
    optimizer = MLBFGS(model.parameters(), lr=0.1, **FAST)
    scaler, scheduler = make_scaler(growth_interval=20), cosine(optimizer, 60)
    before = mean_loss(model, data)
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = nn.functional.mse_loss(model(data[step % 4][0]).float(), data[step % 4][1])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
    assert mean_loss(model, data) < 0.3 * before
    assert scaler.get_scale() > SCALE
    assert_quasi_newton(optimizer)


# Gradient scaling


@pytest.mark.parametrize(
    "settings", [FAST, ADAPTIVE, *({"preset": name} for name in ("lbfgs", "paper", "formulas"))], ids=str
)
def test_a_power_of_two_scale_changes_no_bit(settings):
    data, plain, scaled = make_data(14), make_model(), make_model()
    expected = MLBFGS(plain.parameters(), lr=0.05, weight_decay=0.01, **settings)
    optimizer = MLBFGS(scaled.parameters(), lr=0.05, weight_decay=0.01, **settings)
    scaler = make_scaler(growth_interval=4)
    train(plain, expected, data)
    train_scaled(scaled, optimizer, data, scaler)
    assert scaler.get_scale() == SCALE * 2**3
    assert_same(weights(scaled), weights(plain))
    assert int(optimizer.diagnostics()[0].step) == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_scale_follows_the_unscaled_run(dtype):
    data, plain, scaled = make_data(10, dtype), make_model(dtype=dtype), make_model(dtype=dtype)
    train(plain, MLBFGS(plain.parameters(), lr=0.05, **FAST), data)
    optimizer = MLBFGS(scaled.parameters(), lr=0.05, **FAST)
    train_scaled(scaled, optimizer, data, make_scaler(init_scale=1000.0))
    torch.testing.assert_close(flat(scaled), flat(plain), rtol=1e-4, atol=1e-5)
    assert_quasi_newton(optimizer)


def test_scaled_gradients_of_maximized_parameters_climb():
    data, down, up = make_data(10), make_model(), make_model()
    train(down, MLBFGS(down.parameters(), **FAST), data)
    optimizer, scaler = MLBFGS(up.parameters(), maximize=True, **FAST), make_scaler()
    for batch in data:
        optimizer.zero_grad()
        scaler.scale(-squared_error(up, *batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_same(weights(up), weights(down))


def test_gradients_too_small_for_float16_count_once_they_are_scaled():
    param = nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer, scaler = MLBFGS([param], lr=0.5, momentum=0.0), make_scaler(init_scale=2.0**14)
    scaler.scale(param.float().sum() * 1e-8).backward()
    assert param.grad.all()
    assert not (param.grad / 2.0**14).any()
    scaler.step(optimizer)
    torch.testing.assert_close(param.detach(), torch.full((4,), 0.5, dtype=torch.float16))
    assert int(optimizer.diagnostics()[0].skipped) == 0


@pytest.mark.parametrize(
    "clip",
    [lambda params: clip_grad_norm_(params, 0.1), lambda params: clip_grad_value_(params, 0.02)],
    ids=["norm", "value"],
)
def test_unscaling_and_clipping_equal_clipping_without_a_scale(clip):
    data, plain, scaled = make_data(12), make_model(), make_model()
    expected = MLBFGS(plain.parameters(), **FAST)
    for batch in data:
        backward(plain, expected, batch)
        clip(plain.parameters())
        expected.step()
    optimizer = MLBFGS(scaled.parameters(), **FAST)
    train_scaled(scaled, optimizer, data, make_scaler(growth_interval=4), clip)
    assert_same(weights(scaled), weights(plain))
    assert_quasi_newton(optimizer)


@pytest.mark.parametrize("settings", [FAST, ADAPTIVE], ids=str)
def test_an_overflow_is_skipped_and_training_goes_on_as_if_it_had_not_been(settings):
    data, model, twin = make_data(15), make_model(), make_model()
    optimizer = MLBFGS(model.parameters(), weight_decay=0.1, **settings)
    scaler = make_scaler()
    train_scaled(model, optimizer, data[:7], scaler)
    before = weights(model)
    backward_with_overflow(model, optimizer, data[7], scaler)
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights(model), before)
    assert scaler.get_scale() == SCALE / 2
    (record,) = optimizer.diagnostics()
    assert int(record.skipped) == 1
    assert int(record.step) == 7
    train_scaled(model, optimizer, data[8:], scaler)
    expected = MLBFGS(twin.parameters(), weight_decay=0.1, **settings)
    assert_same(weights(model), weights(train(twin, expected, data[:7] + data[8:])))
    assert_quasi_newton(optimizer)


def test_an_overflow_at_the_first_step_is_skipped():
    data, model, twin = make_data(9), make_model(), make_model()
    optimizer, scaler = MLBFGS(model.parameters(), weight_decay=0.1, **FAST), make_scaler()
    before = weights(model)
    backward_with_overflow(model, optimizer, data[0], scaler)
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights(model), before)
    train_scaled(model, optimizer, data[1:], scaler)
    expected = MLBFGS(twin.parameters(), weight_decay=0.1, **FAST)
    assert_same(weights(model), weights(train(twin, expected, data[1:])))


@pytest.mark.parametrize(
    "clip",
    [lambda params: clip_grad_norm_(params, 1.0), lambda params: clip_grad_value_(params, 1.0)],
    ids=["norm", "value"],
)
def test_an_overflow_found_while_unscaling_is_skipped_even_if_clipping_hides_it(clip):
    data, model, twin = make_data(12), make_model(), make_model()
    optimizer, scaler = MLBFGS(model.parameters(), weight_decay=0.1, **FAST), make_scaler()
    train_scaled(model, optimizer, data[:6], scaler)
    before = weights(model)
    backward_with_overflow(model, optimizer, data[6], scaler)
    scaler.unscale_(optimizer)
    clip(model.parameters())
    scaler.step(optimizer)
    scaler.update()
    assert_same(weights(model), before)
    assert scaler.get_scale() == SCALE / 2
    assert int(optimizer.diagnostics()[0].step) == 6
    train_scaled(model, optimizer, data[7:], scaler)
    expected = MLBFGS(twin.parameters(), weight_decay=0.1, **FAST)
    assert_same(weights(model), weights(train(twin, expected, data[:6] + data[7:])))


@pytest.mark.parametrize("unscale", [False, True], ids=["in the step", "before the step"])
def test_the_step_reads_scaled_gradients_without_writing_them(unscale):
    model, data, seen = make_model(), make_data(5), []
    optimizer, scaler = MLBFGS(model.parameters(), weight_decay=0.1, maximize=True, **FAST), make_scaler()

    def remember(*_):
        seen.append([(p.grad, p.grad.clone(), p.grad._version) for p in model.parameters()])

    def compare(*_):
        for param, (grad, value, version) in zip(model.parameters(), seen[-1], strict=True):
            assert param.grad is grad
            assert torch.equal(grad, value)
            assert grad._version == version

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(compare)
    train_scaled(model, optimizer, data, scaler, clip=(lambda params: None) if unscale else None)
    assert len(seen) == 5


def test_the_scaler_hands_its_scale_over_instead_of_unscaling():
    model = make_model()
    optimizer, scaler, scales = MLBFGS(model.parameters(), **FAST), make_scaler(), []
    assert optimizer._step_supports_amp_scaling is True
    assert copy.deepcopy(optimizer)._step_supports_amp_scaling is True
    optimizer.register_step_pre_hook(lambda *_: scales.append(getattr(optimizer, "grad_scale", None)))
    train_scaled(model, optimizer, make_data(3), scaler)
    optimizer.step()  # without the scaler, the gradients count as they are
    assert scales == [SCALE, SCALE, SCALE, None]
    assert int(optimizer.diagnostics()[0].step) == 4


def test_one_scaler_serves_two_optimizers_and_skips_only_the_one_that_overflowed():
    data, models = make_data(8), [make_model(0), make_model(1)]
    optimizers = [MLBFGS(model.parameters(), **FAST) for model in models]
    scaler = make_scaler()
    before = None
    for step, batch in enumerate(data):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            scaler.scale(squared_error(model, *batch)).backward()
        if step == 4:
            models[0][0].weight.grad[0, 0] = float("nan")
            before = [weights(model) for model in models]
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
        if step == 4:
            assert_same(weights(models[0]), before[0])
            assert_different(weights(models[1]), before[1])
    assert [int(optimizer.diagnostics()[0].skipped) for optimizer in optimizers] == [1, 0]
    assert [int(optimizer.diagnostics()[0].step) for optimizer in optimizers] == [7, 8]


def test_a_scaled_run_resumes_bit_for_bit():
    data, model, scaler = make_data(16), make_model(), make_scaler(growth_interval=3)
    optimizer = MLBFGS(model.parameters(), **ADAPTIVE)
    train_scaled(model, optimizer, data[:8], scaler)
    file = io.BytesIO()
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, resumed_scaler = make_model(1), make_scaler(init_scale=1.0, growth_interval=3)
    resumed = MLBFGS(other.parameters(), lr=0.5)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    resumed_scaler.load_state_dict(saved["scaler"])
    train_scaled(model, optimizer, data[8:], scaler)
    train_scaled(other, resumed, data[8:], resumed_scaler)
    assert_same(weights(other), weights(model))
    assert resumed_scaler.get_scale() == scaler.get_scale() > SCALE


# Accumulation, clipping, gradients


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_accumulated_gradients_equal_those_of_the_big_batch(scaled):
    small, model, twin = make_data(40), make_model(), make_model()
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=SCALE)
    optimizer = MLBFGS(model.parameters(), lr=0.05, **FAST)
    for number, batch in enumerate(small, 1):
        scaler.scale(squared_error(model, *batch) / 4).backward()
        if number % 4 == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    big = [tuple(map(torch.cat, zip(*small[i : i + 4], strict=True))) for i in range(0, 40, 4)]
    train(twin, MLBFGS(twin.parameters(), lr=0.05, **FAST), big)
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-10)
    assert int(optimizer.diagnostics()[0].step) == 10
    assert_quasi_newton(optimizer)


@pytest.mark.parametrize(
    "clip",
    [lambda params: clip_grad_norm_(params, 0.1), lambda params: clip_grad_value_(params, 0.02)],
    ids=["norm", "value"],
)
def test_the_step_is_that_of_the_clipped_gradients(clip):
    data, model, twin, free = make_data(12), make_model(), make_model(), make_model()
    optimizer, expected = MLBFGS(model.parameters(), **FAST), MLBFGS(twin.parameters(), **FAST)
    for batch in data:
        backward(model, optimizer, batch)
        clip(model.parameters())
        for param, copied in zip(model.parameters(), twin.parameters(), strict=True):
            copied.grad = param.grad.clone()
        optimizer.step()
        expected.step()
    assert_same(weights(model), weights(twin))
    assert_different(weights(model), weights(train(free, MLBFGS(free.parameters(), **FAST), data)))
    assert_quasi_newton(optimizer)


def test_zeroed_gradients_equal_dropped_ones():
    data, results = make_data(12), []
    for set_to_none in (False, True):
        model = make_model()
        optimizer = MLBFGS(model.parameters(), weight_decay=0.01, **FAST)
        for batch in data:
            optimizer.zero_grad(set_to_none=set_to_none)
            squared_error(model, *batch).backward()
            optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        assert (model[0].weight.grad is None) == set_to_none
        results.append(weights(model))
    assert_same(*results)


def test_one_optimizer_per_parameter_may_step_inside_backward():
    data, model, twin = make_data(12), make_model(), make_model()
    inside = {param: MLBFGS([param], lr=0.03, **FAST) for param in model.parameters()}

    def step(param):
        inside[param].step()
        inside[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(step)
    after = [MLBFGS([param], lr=0.03, **FAST) for param in twin.parameters()]
    for batch in data:
        squared_error(model, *batch).backward()
        squared_error(twin, *batch).backward()
        for optimizer in after:
            optimizer.step()
            optimizer.zero_grad()
    assert_same(weights(model), weights(twin))
    assert all(param.grad is None for param in model.parameters())
    for optimizer in inside.values():
        assert_quasi_newton(optimizer)


def test_a_warm_up_from_a_zero_learning_rate_trains():
    data, model = make_data(4), make_model()
    optimizer = MLBFGS(model.parameters(), lr=0.1, **FAST)
    schedule = lambda step: min(step / 5, 1.0) * max(0.0, 1 - step / 60)  # noqa: E731
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    start, before = weights(model), mean_loss(model, data)
    train(model, optimizer, data[:1], scheduler)
    assert_same(weights(model), start)
    train(model, optimizer, (data * 15)[1:], scheduler)
    assert mean_loss(model, data) < 0.3 * before
    assert_quasi_newton(optimizer)


def test_memory_that_was_moved_by_hand_is_the_memory_it_goes_on_with():
    # What trainers do on moving an optimizer to another device: every tensor is replaced.
    data, model, twin = make_data(16), make_model(), make_model()
    optimizer, expected = MLBFGS(model.parameters(), **FAST), MLBFGS(twin.parameters(), **FAST)
    train(model, optimizer, data[:6])
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if isinstance(value, torch.Tensor):
                entry[name] = value.clone()
    train(model, optimizer, data[6:11])
    train(twin, expected, data[:11])
    assert_same(weights(model), weights(twin))
    other = make_model(1)
    other.load_state_dict(model.state_dict())
    resumed = MLBFGS(other.parameters())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(other, resumed, data[11:])
    train(twin, expected, data[11:])
    assert_same(weights(other), weights(twin))


def test_the_state_of_an_unused_optimizer_starts_a_used_one_anew():
    data, model, twin = make_data(14), make_model(), make_model()
    optimizer, unused = MLBFGS(model.parameters(), **FAST), MLBFGS(twin.parameters(), **FAST)
    train(model, optimizer, data[:6])
    model.load_state_dict(twin.state_dict())
    optimizer.load_state_dict(unused.state_dict())
    assert_same(weights(train(model, optimizer, data[6:])), weights(train(twin, unused, data[6:])))
    assert int(optimizer.diagnostics()[0].step) == 8


# Models


class Sequence(nn.Module):
    """An LSTM over embedded tokens, with a class at the end."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 6, padding_idx=0)
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.lstm(self.table(tokens))[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.head(self.layer(self.table(tokens)).mean(1))


def convolutional():
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("build", "shape", "low"),
    [(Sequence, (60, 5), 1), (Attention, (60, 5), 0), (convolutional, (60, 1, 6, 6), None)],
    ids=["embedding and LSTM", "transformer", "convolutions and batch norm"],
)
def test_usual_layers_learn_to_classify(build, shape, low):
    torch.manual_seed(0)
    model = build()
    inputs = torch.randn(shape) if low is None else torch.randint(low, 12, shape)
    labels = inputs.flatten(1).float().mean(1)
    labels = torch.bucketize(labels, labels.quantile(torch.tensor([1 / 3, 2 / 3])))
    optimizer = MLBFGS(model.parameters(), lr=0.01, momentum=0.9, **FAST)
    scheduler, losses = cosine(optimizer, 80), []
    for _ in range(80):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert_quasi_newton(optimizer)


def test_a_new_memory_format_in_the_middle_changes_nothing():
    results = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3)).double()
        inputs, optimizer = torch.randn(8, 3, 6, 6).double(), MLBFGS(model.parameters(), lr=0.05, **FAST)
        for step in range(12):
            if convert and step == 5:
                model.to(memory_format=torch.channels_last)
                assert not model[0].weight.is_contiguous()
            optimizer.zero_grad()
            (model(inputs) - 1).square().mean().backward()
            optimizer.step()
        results.append(flat(model))
        assert_quasi_newton(optimizer)
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_the_padding_row_of_an_embedding_keeps_still():
    torch.manual_seed(0)
    model = Sequence()
    optimizer = MLBFGS(model.parameters(), **FAST)
    tokens, labels = torch.randint(0, 12, (20, 5)), torch.randint(0, 3, (20,))
    assert (tokens == 0).any()
    before = model.table.weight.detach().clone()
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    assert not model.table.weight[0].any()
    assert not torch.equal(model.table.weight[1:], before[1:])
    assert_quasi_newton(optimizer)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrized_layers_train(parametrize):
    data, model = make_data(4), make_model()
    parametrize(model[0])
    optimizer = MLBFGS(model.parameters(), lr=0.1, **FAST)
    before, start = (
        mean_loss(model, data),
        [p.detach().clone() for p in model[0].parametrizations.parameters()],
    )
    train(model, optimizer, data * 15, cosine(optimizer, 60))
    assert mean_loss(model, data) < 0.4 * before
    for old, new in zip(start, weights(model[0].parametrizations), strict=True):
        assert not torch.equal(old, new)
    if parametrize is parametrizations.orthogonal:
        gram = model[0].weight.T @ model[0].weight
        torch.testing.assert_close(gram, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_quasi_newton(optimizer)


def test_layers_may_be_frozen_and_thawed_in_the_middle():
    data, model = make_data(4), make_model()
    optimizer = MLBFGS(model.parameters(), lr=0.1, weight_decay=0.01, **FAST)
    before = mean_loss(model, data)
    for frozen, moving in ((model[0], model[2]), (model[2], model[0])):
        model.requires_grad_(True)
        frozen.requires_grad_(False)
        still, start = weights(frozen), weights(moving)
        train(model, optimizer, data * 3)
        assert_same(weights(frozen), still)
        assert_different(weights(moving), start)
    model.requires_grad_(True)
    train(model, optimizer, data * 15, cosine(optimizer, 60))
    assert mean_loss(model, data) < 0.3 * before
    assert_quasi_newton(optimizer)


def test_two_optimizers_alternate_as_in_adversarial_training():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    critic = nn.Linear(2, 1, bias=False)
    real, noise = torch.randn(64, 2) * 0.3 + torch.tensor([1.0, -1.0]), torch.randn(64, 2)
    makers = MLBFGS(generator.parameters(), lr=0.008, momentum=0.0, **FAST)
    judges = MLBFGS(critic.parameters(), lr=0.1, momentum=0.0, **FAST)
    schedulers = [cosine(optimizer, 80) for optimizer in (makers, judges)]

    def distance():
        with torch.no_grad():
            return (generator(noise).mean(0) - real.mean(0)).norm().item()

    before = distance()
    for _ in range(80):
        judges.zero_grad()
        lead = critic(real).mean() - critic(generator(noise).detach()).mean()
        (critic.weight.square().sum() / 2 - lead).backward()
        still = weights(generator)
        judges.step()
        assert_same(weights(generator), still)
        makers.zero_grad()
        (-critic(generator(noise)).mean()).backward()  # leaves gradients in the critic, too
        still = weights(critic)
        makers.step()
        assert_same(weights(critic), still)
        for scheduler in schedulers:
            scheduler.step()
    assert distance() < 0.1 * before
    assert_quasi_newton(makers)
    assert_quasi_newton(judges)


def test_a_shuffling_data_loader_trains_reproducibly():
    inputs, targets = map(torch.cat, zip(*make_data(4), strict=True))

    def run():
        model = make_model()
        optimizer = MLBFGS(model.parameters(), lr=0.1, **FAST)
        scheduler = cosine(optimizer, 60)
        order = torch.Generator().manual_seed(3)
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=16, shuffle=True, generator=order)
        before = mean_loss(model, [(inputs, targets)])
        for _ in range(15):
            train(model, optimizer, loader, scheduler)
        assert mean_loss(model, [(inputs, targets)]) < 0.3 * before
        assert int(optimizer.diagnostics()[0].step) == 60
        return weights(model)

    assert_same(run(), run())


# Weight averaging


def test_averaging_does_not_disturb_training():
    data, model, twin = make_data(12), make_model(), make_model()
    optimizer, average = MLBFGS(model.parameters(), **FAST), AveragedModel(model)
    for batch in data:
        train(model, optimizer, [batch])
        average.update_parameters(model)
    assert_same(weights(model), weights(train(twin, MLBFGS(twin.parameters(), **FAST), data)))


def test_weights_may_be_swapped_for_their_average_and_back():
    data, model, twin = make_data(12), make_model(), make_model()
    optimizer = MLBFGS(model.parameters(), **FAST)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))

    def swap():
        for param, mean in zip(model.parameters(), average.parameters(), strict=True):
            param.data, mean.data = mean.data, param.data

    for number, batch in enumerate(data):
        train(model, optimizer, [batch])
        average.update_parameters(model)
        current = weights(model)
        swap()  # to evaluate the average
        if number > 0:
            assert_different(weights(model), current)
        swap()
    assert_same(weights(model), weights(train(twin, MLBFGS(twin.parameters(), **FAST), data)))


@pytest.mark.parametrize("decay", [None, 0.8], ids=["mean", "exponential"])
def test_averaged_models_hold_the_average_of_the_iterates(decay):
    options = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    data, model = make_data(12), make_model()
    optimizer, average, iterates = MLBFGS(model.parameters(), **FAST), AveragedModel(model, **options), []
    for batch in data:
        train(model, optimizer, [batch])
        average.update_parameters(model)
        iterates.append(flat(model))
    expected = iterates[0]
    for number, iterate in enumerate(iterates[1:], 2):
        weight = 1 / number if decay is None else 1 - decay
        expected = expected + weight * (iterate - expected)
    assert not torch.allclose(iterates[0], iterates[-1])
    torch.testing.assert_close(flat(average), expected, rtol=1e-10, atol=1e-12)


def test_stochastic_weight_averaging_with_batch_norm_lowers_the_loss():
    data = make_data(4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    optimizer = MLBFGS(model.parameters(), lr=0.1, **FAST)
    scheduler = SWALR(optimizer, swa_lr=0.02, anneal_epochs=5)
    average = AveragedModel(model)
    before = mean_loss(model.eval(), data)
    for epoch in range(15):
        train(model.train(), optimizer, data)
        if epoch >= 5:
            average.update_parameters(model)
        scheduler.step()
    update_bn([inputs for inputs, _ in data], average)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    assert int(average.n_averaged) == 10
    assert mean_loss(average.eval(), data) < 0.3 * before
    assert_quasi_newton(optimizer)


# Distributed checkpoints


LAYOUTS = {
    "default": lambda model, **options: MLBFGS(model.parameters(), weight_decay=0.01, **FAST, **options),
    "adaptive": lambda model, **options: MLBFGS(model.parameters(), **ADAPTIVE, **options),
    "no momentum": lambda model, **options: MLBFGS(model.parameters(), momentum=0.0, **FAST, **options),
    "fit": lambda model, **options: MLBFGS(model.parameters(), preset="fit", update_every=2, **options),
    "blocks of named parameters": lambda model, **options: MLBFGS(
        model.named_parameters(), blocks="layer", **FAST, **options
    ),
    "groups": lambda model, **options: MLBFGS(
        [
            {"params": list(model[0].parameters()), "weight_decay": 0.1},
            {"params": list(model[2].parameters()), "preset": "fit", "update_every": 3},
        ],
        **FAST,
        **options,
    ),
}

layouts = pytest.mark.parametrize("build", LAYOUTS.values(), ids=LAYOUTS.keys())
flattened = pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
# PyTorch warns that it writes and reads in a single process, even when told so by `no_dist`.
alone = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninit:UserWarning")


def options(flatten):
    return StateDictOptions(flatten_optimizer_state_dict=flatten)


@layouts
@flattened
@pytest.mark.parametrize("tensor_rate", [False, True], ids=["number", "tensor"])
def test_reading_the_state_of_a_fresh_optimizer_is_no_step(build, flatten, tensor_rate):
    rate = torch.tensor(0.05, dtype=torch.float64) if tensor_rate else 0.05
    data, model, twin = make_data(12), make_model(), make_model()
    optimizer, expected = build(model, lr=rate), build(twin, lr=rate)
    before = weights(model)
    assert get_optimizer_state_dict(model, optimizer, options=options(flatten))
    assert_same(weights(model), before)
    assert all(param.grad is None for param in model.parameters())
    assert all(int(record.step) == 0 for record in optimizer.diagnostics())
    assert all(int(record.skipped) == 0 for record in optimizer.diagnostics())
    train(model, optimizer, data)
    train(twin, expected, data)
    assert_same(weights(model), weights(twin))
    assert all(int(record.step) == 12 for record in optimizer.diagnostics())
    assert_quasi_newton(optimizer)


@layouts
@flattened
def test_reading_the_state_of_a_used_optimizer_changes_nothing(build, flatten):
    data, model, twin = make_data(12), make_model(), make_model()
    optimizer, expected = build(model), build(twin)
    train(model, optimizer, data[:6])
    before = tensors(optimizer)
    get_optimizer_state_dict(model, optimizer, options=options(flatten))
    after = tensors(optimizer)
    for key, entry in before.items():
        assert entry.keys() == after[key].keys()
        for name, value in entry.items():
            assert torch.equal(value, after[key][name]) if isinstance(value, torch.Tensor) else True, name
    train(model, optimizer, data[6:])
    assert_same(weights(model), weights(train(twin, expected, data)))


@layouts
@flattened
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_run_resumes_bit_for_bit_from_its_state(build, flatten, used):
    data, model, other = make_data(20), make_model(), make_model(1)
    optimizer, resumed = build(model, lr=0.05), build(other, lr=0.3)
    train(model, optimizer, data[:8])
    if used:
        train(other, resumed, data[10:15])
    saved = copy.deepcopy(
        [
            get_model_state_dict(model),
            get_optimizer_state_dict(model, optimizer, options=options(flatten)),
        ]
    )
    set_model_state_dict(other, saved[0])
    set_optimizer_state_dict(other, resumed, saved[1], options=options(flatten))
    train(model, optimizer, data[8:])
    train(other, resumed, data[8:])
    assert_same(weights(other), weights(model))
    assert all(int(record.step) == 20 for record in resumed.diagnostics())
    assert_quasi_newton(resumed)


def test_a_full_state_on_the_cpu_resumes_bit_for_bit():
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    data, model, other = make_data(16), make_model(), make_model(1)
    optimizer, resumed = MLBFGS(model.parameters(), **FAST), MLBFGS(other.parameters(), **FAST)
    train(model, optimizer, data[:8])
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=full))
    set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=full)
    train(model, optimizer, data[8:])
    train(other, resumed, data[8:])
    assert_same(weights(other), weights(model))


@alone
@layouts
@flattened
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_checkpoint_folder_resumes_bit_for_bit(tmp_path, build, flatten, used):
    data, model, other = make_data(20), make_model(), make_model(1)
    optimizer, resumed = build(model, lr=0.05), build(other, lr=0.3)
    train(model, optimizer, data[:8])
    parts = get_state_dict(model, optimizer, options=options(flatten))
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=tmp_path, no_dist=True)
    if used:
        train(other, resumed, data[10:15])
    # Loading writes to the tensors of the state that it is given, which are the optimizer's own.
    parts = get_state_dict(other, resumed, options=options(flatten))
    loaded = dict(zip(("model", "optimizer"), parts, strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        other,
        resumed,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
        options=options(flatten),
    )
    train(model, optimizer, data[8:])
    train(other, resumed, data[8:])
    assert_same(weights(other), weights(model))
    assert all(int(record.step) == 20 for record in resumed.diagnostics())
    assert_quasi_newton(resumed)


@alone
@layouts
def test_a_checkpoint_before_the_first_step_starts_the_same_run(tmp_path, build):
    data, model, other, twin = make_data(10), make_model(), make_model(1), make_model()
    optimizer, resumed, expected = build(model), build(other), build(twin)
    parts = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=tmp_path, no_dist=True)
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, resumed), strict=True))
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    train(other, resumed, data)
    assert_same(weights(other), weights(train(twin, expected, data)))


@flattened
def test_frozen_parameters_do_not_hinder_a_checkpoint(flatten):
    data, model, other = make_data(16), make_model(), make_model(1)
    for frozen in (model[0], other[0]):
        frozen.requires_grad_(False)
    optimizer, resumed = MLBFGS(model.parameters(), **FAST), MLBFGS(other.parameters(), **FAST)
    train(model, optimizer, data[:8])
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=options(flatten)))
    set_state_dict(
        other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=options(flatten)
    )
    train(model, optimizer, data[8:])
    train(other, resumed, data[8:])
    assert_same(weights(other), weights(model))
    assert_quasi_newton(resumed)


@flattened
def test_tied_parameters_count_once(flatten):
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.table = nn.Embedding(12, 6)
            self.head = nn.Linear(6, 12, bias=False)
            self.head.weight = self.table.weight
            self.middle = nn.Linear(6, 6)

        def forward(self, tokens):
            return self.head(torch.tanh(self.middle(self.table(tokens))))

    def learn(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 12)
            loss.backward()
            optimizer.step()
        return loss.item()

    tokens, model, other = torch.arange(12), Tied(0), Tied(1)
    optimizer, resumed = MLBFGS(model.parameters(), **FAST), MLBFGS(other.parameters(), **FAST)
    first = learn(model, optimizer, 1)
    learn(model, optimizer, 7)
    assert len(optimizer.state) == 3
    saved = copy.deepcopy(get_state_dict(model, optimizer, options=options(flatten)))
    set_state_dict(
        other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1], options=options(flatten)
    )
    last = learn(model, optimizer, 20)
    assert last < 0.5 * first
    assert learn(other, resumed, 20) == last
    assert_same(weights(other), weights(model))
    assert_quasi_newton(resumed)
