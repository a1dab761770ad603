"""Measures of calibration, changes of a step, means of parameters, and the tables from committed results."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.generalisation import changes, tables
from benchmarks.generalisation.calibration import expected_calibration_error, measure, temperature
from benchmarks.generalisation.images import IMAGES, available
from benchmarks.generalisation.store import Store
from benchmarks.generalisation.variation_tables import noise
from benchmarks.tasks.data import FASHION_MNIST
from mlbfgs_torch import MLBFGS


def test_calibration_error_is_the_one_computed_by_hand():
    """Confidences .9 and .9 (one right), .6 and .7 (both right): (|1.8 - 1| + |.6 - 1| + |.7 - 1|) / 4."""
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.7], dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], dim=1).log()
    targets = torch.tensor([0, 1, 0, 0])
    assert expected_calibration_error(logits, targets, bins=10) == pytest.approx((0.8 + 0.4 + 0.3) / 4)
    assert expected_calibration_error(logits, targets, bins=1) == pytest.approx((3.1 - 3) / 4)


@pytest.mark.parametrize("factor", [0.25, 1.0, 6.0])
def test_temperature_undoes_a_factor_on_calibrated_logits(factor):
    logits = torch.tensor([[0.75, 0.25], [0.9, 0.1]]).log().repeat_interleave(20, dim=0)
    targets = torch.tensor([0] * 15 + [1] * 5 + [0] * 18 + [1] * 2)
    assert temperature(logits, targets) == pytest.approx(1, rel=1e-6)
    assert temperature(factor * logits, targets) == pytest.approx(factor, rel=1e-6)
    found = measure(0.0, (factor * logits, targets), (factor * logits, targets))
    assert found.accuracy == 33 / 40
    assert found.calibrated_error == pytest.approx(0, abs=1e-6)
    assert found.calibrated <= found.loss


@pytest.mark.parametrize("rescale", [False, True])
def test_cautious_step_keeps_the_components_against_the_gradient(rescale):
    old = torch.tensor([1.0, 1.0, 1.0, 1.0])
    step = torch.tensor([0.1, -0.1, 0.2, -0.2])
    gradient = torch.tensor([-1.0, -1.0, 1.0, 0.0])
    new = changes.cautious(rescale=rescale)(old, old + step, gradient, 1.0)
    torch.testing.assert_close(new, torch.tensor([1.4 if rescale else 1.1, 1.0, 1.0, 1.0]))


def test_cautious_decay_acts_where_the_step_leads_towards_zero():
    old = torch.tensor([1.0, 1.0, -1.0, -1.0])
    step = torch.tensor([0.1, -0.1, 0.1, -0.1])
    new = changes.cautious_decay(0.5)(old, old + step, torch.zeros(4), 0.2)
    torch.testing.assert_close(new, old + step - torch.tensor([0.0, 0.1, -0.1, 0.0]))


@pytest.mark.parametrize("rescale", [False, True])
def test_pairs_are_taken_from_changed_steps(rescale):
    """So the curvature that is found lies between those of the paraboloid, 1 and 10."""
    weight = torch.nn.Parameter(torch.ones(10))
    slopes = torch.linspace(1, 10, 10)
    inner = MLBFGS([weight], lr=1e-2, preconditioner="none")
    optimizer = changes.Changed(inner, changes.cautious(rescale=rescale))
    for _ in range(120):
        weight.grad = slopes * weight.detach()
        optimizer.step()
        (found,) = inner.diagnostics()
        assert found.pairs.item() == 0 or 1 <= found.mu.item() <= 10
    assert found.pairs.item() > 5
    assert (slopes * weight.square()).sum() < 0.1


def test_stochastic_rounding_gives_neighbours_whose_mean_is_the_value():
    value = torch.tensor([1.0, 1 + 2**-9, -3.3, 1e-20, 0.0]).repeat(20_000, 1)
    rounded = changes.stochastic(value, torch.Generator().manual_seed(0))
    assert torch.equal(changes.nearest(rounded), rounded)
    assert ((rounded - value).abs() <= value.abs() * 2**-7).all()
    torch.testing.assert_close(rounded[:, 0], value[:, 0], rtol=0, atol=0)
    torch.testing.assert_close(rounded.double().mean(dim=0), value[0].double(), rtol=2e-4, atol=0)


def test_means_are_those_of_the_parameters_of_the_run():
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = changes.Averaged(model, torch.optim.SGD(model.parameters(), lr=0.1), changes.second_half(6))
    seen = []
    for step in range(6):
        model.weight.grad = torch.full((1, 2), float(step))
        optimizer.step()
        seen.append(model.weight.detach().clone())
    optimizer.eval()
    torch.testing.assert_close(model.weight.detach(), torch.stack(seen[3:]).mean(dim=0))
    optimizer.train()
    assert torch.equal(model.weight, seen[-1])


def test_schedule_free_is_a_mean_of_the_base_steps():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = changes.ScheduleFree(torch.optim.SGD([weight], lr=1.0), beta=0.5)
    for _ in range(3):
        weight.grad = torch.tensor([-1.0])
        optimizer.step()
    assert weight.item() == pytest.approx((3 + 2) / 2)
    optimizer.eval()
    assert weight.item() == pytest.approx(2)


def test_parts_of_a_set_of_images_are_disjoint():
    parts = IMAGES["digits"].parts()
    rows = torch.cat([part.inputs.flatten(1) for part in parts])
    assert tuple(len(part.targets) for part in parts) == IMAGES["digits"].sizes
    assert len(rows.unique(dim=0)) == len(rows)


def test_fashion_mnist_is_left_out_where_its_file_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv(FASHION_MNIST, str(tmp_path / "none.npz"))
    assert available() == ("digits", "mnist", "shifted")


def test_results_are_kept_with_four_digits(tmp_path):
    store = Store(tmp_path / "results.json")
    store.put("a", "b", values=[1.23456, math.inf])
    store.put("a", "c", values=[0.0])
    again = Store(store.path)
    assert again.get("a", "b") == [1.235, math.inf]
    assert again.get("a", "c") == [0.0]
    assert again.get("a", "d") is None


def test_noise_is_pooled_over_the_tasks_with_several_seeds():
    """Logarithms -d and d differ by 2 d, so that the variance of one is 2 d^2; the mean is of two tasks."""
    ratios = [[math.exp(-0.1), math.exp(0.1)], [1.0]]
    assert noise(ratios) == pytest.approx(math.sqrt(0.02 * 1.5) / 2)


def test_committed_tables_are_those_of_the_committed_results():
    texts = tables.texts(Store())
    assert len(texts) == 8
    for name, text in texts.items():
        assert (tables.DOCS / "_generated" / f"{name}.md").read_text("utf-8") == text + "\n"
