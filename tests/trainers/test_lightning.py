"""In a Lightning `Trainer`, `MLBFGS` does what it does in a plain loop, to the last bit."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.utils.data import DataLoader

from mlbfgs_torch import MLBFGS
from tests.trainers.helpers import (
    EPOCH,
    FAST,
    assert_different,
    assert_quasi_newton,
    assert_same,
    backward,
    cosine,
    each_build,
    flat,
    make_data,
    make_epoch,
    make_model,
    make_optimizer,
    mean_loss,
    squared_error,
    train,
    weights,
)

pytestmark = [
    # Lightning advises worker processes for loading; six small batches in memory need none.
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    # Lightning asks PyTorch's trees a question in a form that PyTorch calls deprecated.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
]


def make_loader():
    return DataLoader(make_epoch(), batch_size=None)


class Regression(LightningModule):
    def __init__(self, steps=24, seed=0, build=make_optimizer):
        super().__init__()
        self.model, self.steps, self.build = make_model(seed, torch.float32), steps, build
        self.evaluations = self.closures = 0

    def training_step(self, batch, _):
        self.evaluations += 1
        return squared_error(self.model, *batch)

    def configure_optimizers(self):
        optimizer = self.build(self.model)
        scheduler = cosine(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        def counted():
            self.closures += 1
            return optimizer_closure()

        super().optimizer_step(epoch, batch_idx, optimizer, counted)


def fit(module, max_steps=24, ckpt_path=None, weights_only=None, loader=None, **options):
    quiet = {
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
    }
    trainer = Trainer(accelerator="cpu", devices=1, max_steps=max_steps, **{**quiet, **options})
    trainer.fit(module, loader or make_loader(), ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer


def plain(steps=24, build=make_optimizer):
    """Model and optimizer after the same steps in a plain loop."""
    model = make_model(dtype=torch.float32)
    optimizer = build(model)
    train(model, optimizer, (make_epoch() * steps)[:steps], cosine(optimizer, steps))
    return model, optimizer


def test_fitting_lowers_the_loss():
    module = Regression(60)
    before = mean_loss(module.model, make_epoch())
    trainer = fit(module, 60)
    assert mean_loss(module.model, make_epoch()) < 0.3 * before
    assert trainer.global_step == 60
    assert_quasi_newton(trainer.optimizers[0])


@each_build
def test_the_trajectory_is_that_of_a_plain_loop(build):
    module = Regression(build=build)
    trainer = fit(module)
    model, optimizer = plain(build=build)
    assert_same(weights(module.model), weights(model))
    assert trainer.optimizers[0].param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] < 1e-6
    assert int(trainer.optimizers[0].diagnostics()[0].step) == 24
    assert_quasi_newton(trainer.optimizers[0])


def test_the_closure_is_evaluated_once_per_step():
    module = Regression(10)
    fit(module, 10)
    assert module.closures == module.evaluations == 10


@pytest.mark.parametrize("algorithm", [None, "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulation_and_clipping_are_those_of_a_plain_loop(accumulate, algorithm):
    module = Regression(12)
    limit = {None: None, "norm": 0.1, "value": 0.02}[algorithm]
    trainer = fit(
        module,
        12,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    )
    model = make_model(dtype=torch.float32)
    optimizer = make_optimizer(model)
    scheduler, clip = cosine(optimizer, 12), clip_grad_norm_ if algorithm == "norm" else clip_grad_value_
    for number, batch in enumerate((make_epoch() * 12)[: 12 * accumulate], 1):
        (squared_error(model, *batch) / accumulate).backward()
        if number % accumulate == 0:
            if limit is not None:
                clip(model.parameters(), limit)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert_same(weights(module.model), weights(model))
    assert module.evaluations == 12 * accumulate
    assert int(trainer.optimizers[0].diagnostics()[0].step) == 12
    if algorithm is not None or accumulate > 1:
        assert_different(weights(model), weights(plain(12)[0]))


@pytest.mark.parametrize("weights_only", [None, True], ids=["any pickle", "weights only"])
def test_a_saved_checkpoint_resumes_bit_for_bit(tmp_path, weights_only):
    path = tmp_path / "half.ckpt"
    fit(Regression(24), -1, max_epochs=2).save_checkpoint(path)
    resumed = Regression(24, seed=1, build=lambda model: make_optimizer(model, lr=0.7, history_size=5))
    trainer = fit(resumed, -1, max_epochs=4, ckpt_path=path, weights_only=weights_only)
    assert resumed.evaluations == 12
    assert_same(weights(resumed.model), weights(plain(24)[0]))
    assert int(trainer.optimizers[0].diagnostics()[0].step) == 24


# Lightning warns that the folder from which it resumes, and in which it goes on, is not empty.
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_the_checkpoints_of_a_callback_resume_bit_for_bit(tmp_path):
    def keeper():
        callbacks = [ModelCheckpoint(tmp_path, save_top_k=-1, enable_version_counter=False)]
        return {"max_epochs": 4, "callbacks": callbacks, "enable_checkpointing": True}

    fit(Regression(24), -1, **keeper())
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) == 4
    for number, path in enumerate(paths[:3], 1):
        resumed = Regression(24, seed=1)
        fit(resumed, -1, ckpt_path=path, **keeper())
        assert resumed.evaluations == 24 - number * EPOCH
        assert_same(weights(resumed.model), weights(plain(24)[0]))


def test_a_second_fit_goes_on_with_the_same_optimizer():
    module, model = Regression(), make_model(dtype=torch.float32)
    optimizer, expected = make_optimizer(module.model), make_optimizer(model)
    module.configure_optimizers = lambda: optimizer
    for _ in range(2):
        fit(module, 12)
    assert_same(weights(module.model), weights(train(model, expected, make_epoch() * 4)))
    assert int(optimizer.diagnostics()[0].step) == 24


def test_bfloat16_autocast_is_that_of_a_plain_loop():
    module = Regression(60)
    before = mean_loss(module.model, make_epoch())
    trainer = fit(module, 60, precision="bf16-mixed")
    model = make_model(dtype=torch.float32)
    optimizer = make_optimizer(model)
    scheduler = cosine(optimizer, 60)
    for batch in make_epoch() * 10:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = squared_error(model, *batch)
        loss.backward()
        optimizer.step()
        scheduler.step()
    assert_same(weights(module.model), weights(model))
    assert mean_loss(module.model, make_epoch()) < 0.3 * before
    assert_different(weights(model), weights(plain(60)[0]))
    assert_quasi_newton(trainer.optimizers[0])


def test_double_precision_trains_in_float64():
    module = Regression(24)
    loader = DataLoader(make_data(EPOCH, torch.float64), batch_size=None)
    trainer = fit(module, 24, precision="64-true", loader=loader)
    (optimizer,) = trainer.optimizers
    assert {param.dtype for param in module.parameters()} == {torch.float64}
    assert {entry["history"].dtype for entry in optimizer.state.values()} == {torch.float64}
    assert_quasi_newton(optimizer)


class Iterates(Callback):
    """The weights after every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(flat(pl_module.model))


def test_exponential_weight_averaging_ends_with_the_average_of_an_undisturbed_run():
    module, iterates = Regression(24), Iterates()
    fit(module, 24, callbacks=[iterates, EMAWeightAveraging(decay=0.8)])
    assert torch.equal(iterates.seen[-1], flat(plain(24)[0]))
    average = iterates.seen[0]
    for iterate in iterates.seen[1:]:
        average = 0.8 * average + 0.2 * iterate
    torch.testing.assert_close(flat(module.model), average, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(average, iterates.seen[-1])


def test_stochastic_weight_averaging_ends_with_the_mean_over_epochs():
    module, iterates = Regression(), Iterates()
    module.configure_optimizers = lambda: make_optimizer(module.model)
    averaging = StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=5, annealing_epochs=2, device=None)
    before = mean_loss(module.model, make_epoch())
    trainer = fit(module, -1, max_epochs=12, callbacks=[averaging, iterates])
    starts = torch.stack(iterates.seen[EPOCH - 1 : -1 : EPOCH])[3:]  # of the epochs from the fifth on
    assert len(iterates.seen) == 12 * EPOCH
    torch.testing.assert_close(flat(module.model), starts.mean(0), rtol=1e-4, atol=1e-6)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02)
    assert mean_loss(module.model, make_epoch()) < 0.3 * before
    assert_quasi_newton(trainer.optimizers[0])


def test_a_backbone_is_thawed_in_the_middle():
    class Tuned(LightningModule):
        def __init__(self):
            super().__init__()
            model = make_model(dtype=torch.float32)
            self.backbone, self.head = model[0], model[1:]

        def training_step(self, batch, _):
            return squared_error(nn.Sequential(self.backbone, self.head), *batch)

        def configure_optimizers(self):
            trainable = [param for param in self.parameters() if param.requires_grad]
            optimizer = MLBFGS(trainable, lr=0.05, **FAST)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(weights(pl_module.backbone))

    seen, module = [], Tuned()
    model = nn.Sequential(module.backbone, module.head)
    start, before = weights(module.backbone), mean_loss(model, make_epoch())
    thawing = BackboneFinetuning(unfreeze_backbone_at_epoch=3, train_bn=False)
    trainer = fit(module, -1, max_epochs=10, callbacks=[thawing, Watch()])
    assert_same(seen[2], start)
    assert_different(seen[3], start)
    assert len(trainer.optimizers[0].param_groups) == 2
    assert mean_loss(model, make_epoch()) < 0.5 * before
    assert_quasi_newton(trainer.optimizers[0])


class Adversaries(LightningModule):
    """Two models, each with its optimizer and its turn at every batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = make_model(0, torch.float32), make_model(1, torch.float32)

    def losses(self, inputs, targets):
        yield squared_error(self.first, inputs, targets)
        yield squared_error(self.second, inputs, self.first(inputs)) + squared_error(
            self.second, inputs, targets
        )

    def training_step(self, batch, _):
        optimizers, losses = self.optimizers(), self.losses(*batch)
        for optimizer in optimizers:
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(next(losses))
            optimizer.step()
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self):
        optimizers = [make_optimizer(self.first), make_optimizer(self.second, lr=0.05)]
        return optimizers, [cosine(optimizer, 18) for optimizer in optimizers]


def test_manual_optimization_of_two_models_is_that_of_a_plain_loop():
    module, twin = Adversaries(), Adversaries()
    trainer = fit(module, max_steps=-1, max_epochs=3)
    optimizers, schedulers = twin.configure_optimizers()
    for batch in make_epoch() * 3:
        losses = twin.losses(*batch)
        for optimizer in optimizers:
            twin.zero_grad()
            next(losses).backward()
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    assert_same(weights(module), weights(twin))
    assert [int(optimizer.diagnostics()[0].step) for optimizer in trainer.optimizers] == [18, 18]
    for optimizer in trainer.optimizers:
        assert_quasi_newton(optimizer)


def test_manual_optimization_passes_a_closure_that_is_evaluated_once():
    class Manual(Regression):
        def __init__(self):
            super().__init__(12)
            self.automatic_optimization = False

        def training_step(self, batch, _):
            optimizer = self.optimizers()

            def closure():
                self.evaluations += 1
                loss = squared_error(self.model, *batch)
                optimizer.zero_grad()
                self.manual_backward(loss)
                return loss

            assert optimizer.step(closure=closure).item() > 0
            self.lr_schedulers().step()

    module = Manual()
    fit(module, 12)
    assert module.evaluations == 12
    assert_same(weights(module.model), weights(plain(12)[0]))


def test_a_batch_with_an_infinite_loss_changes_nothing():
    clean = make_epoch()
    spoiled = copy.deepcopy(clean)
    spoiled.insert(3, (clean[0][0], torch.full_like(clean[0][1], float("inf"))))
    module = Regression(1000)
    module.configure_optimizers = lambda: make_optimizer(module.model)
    trainer = fit(module, 2 * EPOCH + 2, loader=DataLoader(spoiled, batch_size=None))
    model = make_model(dtype=torch.float32)
    optimizer = make_optimizer(model)
    for batch in clean * 2:
        backward(model, optimizer, batch)
        optimizer.step()
    assert_same(weights(module.model), weights(model))
    (record,) = trainer.optimizers[0].diagnostics()
    assert (int(record.step), int(record.skipped)) == (2 * EPOCH, 2)
