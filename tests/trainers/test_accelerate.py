"""Prepared by an Accelerate `Accelerator`, `MLBFGS` does what it does in a plain loop, to the last bit."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader, TensorDataset

from tests.trainers.helpers import (
    EPOCH,
    assert_different,
    assert_quasi_newton,
    assert_same,
    cosine,
    each_build,
    make_epoch,
    make_model,
    make_optimizer,
    mean_loss,
    squared_error,
    train,
    weights,
)


def restart():
    """Forget the settings that Accelerate keeps for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _restart():
    restart()


def prepare(steps, seed=0, build=make_optimizer, **options):
    """An accelerator and what it prepared: model, optimizer, loader and scheduler."""
    accelerator = Accelerator(cpu=True, **options)
    model = make_model(seed, torch.float32)
    optimizer = build(model)
    data = TensorDataset(*map(torch.cat, zip(*make_epoch(), strict=True)))
    parts = model, optimizer, DataLoader(data, batch_size=16), cosine(optimizer, steps)
    return accelerator, *accelerator.prepare(*parts)


def advance(accelerator, model, optimizer, scheduler, batch, clip=None):
    with accelerator.accumulate(model):
        with accelerator.autocast():
            loss = squared_error(model, *batch)
        accelerator.backward(loss)
        if clip is not None and accelerator.sync_gradients:
            clip(accelerator, model.parameters())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def run(accelerator, model, optimizer, loader, scheduler, epochs, clip=None):
    for _ in range(epochs):
        for batch in loader:
            advance(accelerator, model, optimizer, scheduler, batch, clip)


def plain(epochs, build=make_optimizer):
    """Model and optimizer after the same steps in a plain loop."""
    model = make_model(dtype=torch.float32)
    optimizer = build(model)
    train(model, optimizer, make_epoch() * epochs, cosine(optimizer, EPOCH * epochs))
    return model, optimizer


def test_training_lowers_the_loss():
    parts = prepare(60)
    before = mean_loss(parts[1], make_epoch())
    run(*parts, epochs=10)
    assert mean_loss(parts[1], make_epoch()) < 0.3 * before
    assert_quasi_newton(parts[2].optimizer)


@each_build
def test_the_trajectory_is_that_of_a_plain_loop(build):
    accelerator, model, optimizer, *rest = prepare(24, build=build)
    assert isinstance(optimizer, AcceleratedOptimizer)
    run(accelerator, model, optimizer, *rest, epochs=4)
    twin, expected = plain(4, build)
    assert_same(weights(accelerator.unwrap_model(model)), weights(twin))
    assert optimizer.param_groups[0]["lr"] == expected.param_groups[0]["lr"] < 1e-6
    assert not optimizer.step_was_skipped
    assert int(optimizer.optimizer.diagnostics()[0].step) == 24
    assert_quasi_newton(optimizer.optimizer)


@pytest.mark.parametrize(
    "clip",
    [
        None,
        lambda source, params: source.clip_grad_norm_(params, 0.1),
        lambda source, params: source.clip_grad_value_(params, 0.02),
    ],
    ids=["no clipping", "norm", "value"],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation_and_clipping_are_those_of_a_plain_loop(accumulate, clip):
    accelerator, model, optimizer, *rest = prepare(EPOCH, gradient_accumulation_steps=accumulate)
    run(accelerator, model, optimizer, *rest, epochs=accumulate, clip=clip)
    twin = make_model(dtype=torch.float32)
    expected = make_optimizer(twin)
    scheduler = cosine(expected, EPOCH)
    for number, batch in enumerate(make_epoch() * accumulate, 1):
        (squared_error(twin, *batch) / accumulate).backward()
        if number % accumulate == 0:
            if clip is not None:
                clip(torch.nn.utils, twin.parameters())
            expected.step()
            scheduler.step()
            expected.zero_grad()
    assert_same(weights(model), weights(twin))
    assert int(optimizer.optimizer.diagnostics()[0].step) == EPOCH
    if clip is not None or accumulate > 1:
        assert_different(weights(twin), weights(plain(1)[0]))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize(
    "settings", [{}, {"adaptive": True, "check_every": 1, "update_every": 5}], ids=["fixed", "adaptive"]
)
def test_a_saved_state_resumes_bit_for_bit(tmp_path, safe, settings):
    def build(model):
        return make_optimizer(model, **settings)

    accelerator, *parts = prepare(24, build=build)
    run(accelerator, *parts, epochs=2)
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    run(accelerator, *parts, epochs=2)
    restart()
    accelerator, *resumed = prepare(24, seed=1, build=lambda model: make_optimizer(model, lr=0.7))
    run(accelerator, *resumed, epochs=1)  # the memory of other steps must be gone
    accelerator.load_state(str(tmp_path))
    run(accelerator, *resumed, epochs=2)
    assert_same(weights(resumed[0]), weights(parts[0]))
    assert_same(weights(resumed[0]), weights(plain(4, build)[0]))
    assert int(resumed[1].optimizer.diagnostics()[0].step) == 24


def test_a_state_saved_in_the_middle_of_an_epoch_resumes_bit_for_bit(tmp_path):
    accelerator, model, optimizer, loader, scheduler = prepare(EPOCH)
    for number, batch in enumerate(loader):
        if number == 3:
            accelerator.save_state(str(tmp_path))
        advance(accelerator, model, optimizer, scheduler, batch)
    restart()
    accelerator, resumed, optimizer, loader, scheduler = prepare(EPOCH, seed=1)
    accelerator.load_state(str(tmp_path))
    rest = accelerator.skip_first_batches(loader, 3)
    run(accelerator, resumed, optimizer, rest, scheduler, epochs=1)
    assert_same(weights(resumed), weights(model))
    assert_same(weights(resumed), weights(plain(1)[0]))
    assert int(optimizer.optimizer.diagnostics()[0].step) == EPOCH


def test_bfloat16_is_that_of_a_plain_loop():
    accelerator, model, optimizer, *rest = prepare(60, mixed_precision="bf16")
    before = mean_loss(make_model(dtype=torch.float32), make_epoch())
    run(accelerator, model, optimizer, *rest, epochs=10)
    twin = make_model(dtype=torch.float32)
    expected = make_optimizer(twin)
    scheduler = cosine(expected, 60)
    for inputs, targets in make_epoch() * 10:
        expected.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = twin(inputs)
        (outputs.float() - targets).square().mean().backward()
        expected.step()
        scheduler.step()
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_same(weights(model), weights(twin))
    assert mean_loss(model, make_epoch()) < 0.3 * before
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert_different(weights(twin), weights(plain(10)[0]))
    assert_quasi_newton(optimizer.optimizer)


def test_two_models_with_two_optimizers_are_prepared_together():
    accelerator = Accelerator(cpu=True)
    models = [make_model(seed, torch.float32) for seed in (0, 1)]
    optimizers = [make_optimizer(model) for model in models]
    prepared = accelerator.prepare(*models, *optimizers)
    for batch in make_epoch() * 2:
        for model, optimizer in zip(prepared[:2], prepared[2:], strict=True):
            optimizer.zero_grad()
            accelerator.backward(squared_error(model, *batch))
            optimizer.step()
    for seed, model in enumerate(models):
        twin = make_model(seed, torch.float32)
        assert_same(weights(model), weights(train(twin, make_optimizer(twin), make_epoch() * 2)))


def test_a_closure_is_evaluated_once():
    accelerator, model, optimizer, loader, scheduler = prepare(EPOCH)
    evaluations = []
    for batch in loader:

        def closure(batch=batch):
            evaluations.append(batch)
            optimizer.zero_grad()
            loss = squared_error(model, *batch)
            accelerator.backward(loss)
            return loss

        optimizer.step(closure)
        scheduler.step()
    assert len(evaluations) == EPOCH
    assert_same(weights(model), weights(plain(1)[0]))


def test_gradient_scaling_skips_an_overflow_and_goes_on():
    # Accelerate scales gradients on accelerators only; its optimizer takes a scaler of any device.
    Accelerator(cpu=True)
    data, model = make_epoch(), make_model(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = AcceleratedOptimizer(make_optimizer(model), scaler=scaler)
    for number, batch in enumerate([*data[:3], data[0], *data[3:]]):
        optimizer.zero_grad()
        scaler.scale(squared_error(model, *batch)).backward()
        before = weights(model)
        if number == 3:
            model[0].weight.grad[0, 0] = float("inf")
        optimizer.step()
        if number == 3:
            assert_same(weights(model), before)
            assert scaler.get_scale() == 2.0**9
        else:
            assert_different(weights(model), before)
    twin = make_model(dtype=torch.float32)
    train(twin, make_optimizer(twin), data)
    torch.testing.assert_close(weights(model), weights(twin), rtol=1e-4, atol=1e-5)
    assert int(optimizer.optimizer.diagnostics()[0].step) == EPOCH
    assert_quasi_newton(optimizer.optimizer)
