"""Statements of the pages on the paper's claims that no other test makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.claims import hessian, network, noise, published, quadratics


@pytest.fixture(scope="module")
def calm():
    """Positions and gradients of gradient descent on a quadratic whose minimum is not at the origin."""
    path = np.array(list(quadratics.descend(published.CALM, "gradient descent", 0, steps=80)))
    return path + 1.0, published.CALM.curvature * path


def secant_errors(calm, **kind):
    pairs = published.averaged_pairs(*calm, **kind)
    assert len(pairs) == 7
    return [np.linalg.norm(y - published.CALM.curvature * s) / np.linalg.norm(y) for s, y in pairs]


def test_the_published_averages_obey_the_secant_equation(calm):
    assert max(secant_errors(calm)) < 1e-10


@pytest.mark.parametrize(
    "kind",
    [{"restart": True}, {"weights": (1.0, 1.0)}, {"decays": (0.9, 0.99), "weights": (0.1, 0.01)}],
    ids=["only the gradient's restarted", "no factor 1 - beta", "two decays"],
)
def test_each_departure_of_the_authors_averages_breaks_the_secant_equation(calm, kind):
    assert max(secant_errors(calm, **kind)) > 0.1


def test_the_published_bounds_do_not_survive_a_rescaling_of_the_loss():
    assert published.scaled_loss("formulas", 1.0, told=False) < 1e-2
    assert published.scaled_loss("formulas", 1e4, told=False) == np.inf
    assert published.scaled_loss("formulas", 1e-4, told=False) > 0.1


def test_the_published_recipe_does_not_diverge_at_any_scale_of_the_loss():
    assert max(published.scaled_loss("paper", scale, told=False) for scale in published.SCALES) < 1e-2


def test_losses_at_every_scale_are_those_of_fit():
    losses = [published.scaled_loss("fit", scale, told=False) for scale in (1e-4, 1.0, 1e4)]
    np.testing.assert_allclose(losses, losses[1], rtol=1e-2)
    assert losses[1] < 1e-6


@pytest.mark.parametrize("period", [2, 5, 10])
def test_noise_of_mini_batches_in_y_is_that_of_the_theory(period):
    for size in noise.BATCHES:
        averaged = noise.noise_ratio(size, period, averaged=True)
        assert averaged == pytest.approx(np.sqrt(2 / period), rel=0.1)
        assert noise.noise_ratio(size, period, averaged=False) == pytest.approx(np.sqrt(2), rel=0.1)


def test_averages_take_noise_out_of_the_pairs_of_a_network():
    for size in (64, 256):  # with 16 pairs are noise, one way or the other
        own = noise.relative_error(size, 20, averaged=True)
        assert own < 0.9 * noise.relative_error(size, 20, averaged=False)


def test_the_networks_hessian_is_the_derivative_of_its_gradient():
    x, step = network.start(0).numpy(), 1e-5
    matrix = network.hessian(x)
    direction = np.random.default_rng(0).standard_normal(len(x))
    change = network.full_gradient(x + step * direction) - network.full_gradient(x - step * direction)
    np.testing.assert_allclose(matrix @ direction, change / (2 * step), atol=1e-7)
    np.testing.assert_allclose(network.hessian_product(x, direction), matrix @ direction, atol=1e-12)
    assert float(network.loss(torch.as_tensor(x))) == pytest.approx(np.log(10), rel=0.1)


def test_averaged_pairs_of_a_network_see_the_curvature_of_plain_ones_without_noise_and_better_with_it():
    full, noisy = hessian.network_states("full"), hessian.network_states("gradients")
    plain, *averaged = ("L-BFGS pairs", "momentum pairs", "window means")
    for name in averaged:
        assert hessian.deviation(full[name]) < 1.5 * hessian.deviation(full[plain])
        assert hessian.deviation(noisy[name]) < 0.5 * hessian.deviation(noisy[plain])
