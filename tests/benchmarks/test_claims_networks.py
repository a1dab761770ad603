"""The small ResNet of the claims, the parts of the authors' code, and the runs that are kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.claims import parts, resnet, small_resnet, style, tuning
from benchmarks.claims.authors import Authors
from benchmarks.claims.tuning import Curve, Runs
from benchmarks.tasks import networks
from mlbfgs_torch import MLBFGS


def path(optimizer_of, steps):
    """The parameters of a small regression after each step, as one vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    optimizer, generator = optimizer_of(model), torch.Generator().manual_seed(1)
    slopes, points = torch.randn(8, 3, generator=generator, dtype=torch.float64), []
    for _ in range(steps):
        x = torch.randn(32, 8, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x) - torch.sin(x @ slopes)).square().mean().backward()
        optimizer.step()
        points.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    return torch.stack(points)


def test_the_authors_code_without_its_parts_is_the_preset():
    own = path(lambda model: Authors([list(model.parameters())], lr=0.03, weight_decay=2e-3), 220)
    preset = path(
        lambda model: MLBFGS(
            model.parameters(), lr=0.03, preset="paper", weight_decay=2e-3, decoupled_weight_decay=False
        ),
        220,
    )
    torch.testing.assert_close(own, preset, rtol=1e-9, atol=1e-9)


def test_the_authors_blocks_are_those_of_the_preset():
    own = path(lambda model: Authors([[*model[0].parameters()], [*model[2].parameters()]], lr=0.03), 160)
    preset = path(
        lambda model: MLBFGS(model.named_parameters(), lr=0.03, preset="paper", blocks="layer"), 160
    )
    torch.testing.assert_close(own, preset, rtol=1e-9, atol=1e-9)


def test_steps_before_the_first_pair_are_those_of_sgd():
    own = path(lambda model: Authors([list(model.parameters())], lr=0.03, sgd_first=True), 101)
    sgd = path(lambda model: torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), 101)
    torch.testing.assert_close(own[:99], sgd[:99])
    assert not torch.allclose(own[99:], sgd[99:])


def test_the_second_average_smooths_both_members_of_a_pair():
    optimizer = Authors([[nn.Parameter(torch.zeros(3))]], second=0.9)
    (block,) = optimizer.blocks
    for mean in ([1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [4.0, 1.0, 1.0]):
        block.means = [torch.tensor(mean), 0.5 * torch.tensor(mean)]
        block.refresh(optimizer.second)
    (first, damped), (second, _) = block.pairs
    torch.testing.assert_close(first, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(damped, (0.99 * 0.5 + 0.01) * first)  # mu is within the bounds
    torch.testing.assert_close(second, 0.9 * first + 0.1 * torch.tensor([2.0, 0.0, 1.0]))


def test_what_is_left_out_moves_along_its_gradient_over_the_norm_of_the_blocks_direction():
    inside, outside = (nn.Parameter(torch.tensor([3.0, 4.0])) for _ in range(2))
    inside.grad, outside.grad = torch.tensor([0.0, 5.0]), torch.tensor([1.0, 0.0])
    Authors([[inside]], [outside], lr=1.0).step()
    torch.testing.assert_close(outside.detach(), torch.tensor([2.8, 4.0]))
    torch.testing.assert_close(inside.detach(), torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize(
    ("name", "blocks", "out"),
    [("resnet18", 4, 5), ("classifier", 3, 2), ("autoencoder", 6, 2)],
)
def test_each_parameter_of_a_network_is_in_one_block_or_left_out(name, blocks, out):
    model = small_resnet.resnet(0) if name == "resnet18" else getattr(networks, name)()
    network, every = parts.NETWORKS[name], set(model.parameters())
    for settings in ({}, {"blocks": True}, {"left_out": True}, parts.PARTS["all"][1]):
        inside, outside = parts.split(model, network, settings)
        members = [param for block in inside for param in block] + outside
        assert len(members) == len(every) == len(set(members))
        assert len(outside) == (out if settings.get("left_out") else 0)
        if settings == {"blocks": True}:
            assert len(inside) == blocks


def test_the_small_network_has_the_layers_of_resnet_18():
    model = small_resnet.resnet(0)
    kernels = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(kernels) + 1 == 18  # and the last layer
    assert sum(param.numel() for param in model.parameters()) == 176_258
    assert model(torch.zeros(2, 1, 14, 14)).shape == (2, 10)


def test_without_fashion_mnist_digits_take_its_place(monkeypatch, capsys):
    monkeypatch.delenv("FASHION_MNIST", raising=False)
    digits = np.zeros((5_000, 784)), np.arange(5_000) % 10
    digits[0][:, 0] = 1
    monkeypatch.setattr(small_resnet, "mnist_data", lambda: digits)
    small_resnet.images.cache_clear()
    found = small_resnet.images()
    small_resnet.images.cache_clear()
    assert found.name == "MNIST, 5,000 digits"
    assert found.train[0].shape == (4_000, 1, 14, 14)
    assert "FASHION_MNIST names no file" in capsys.readouterr().out


def test_a_search_goes_on_until_the_best_rate_is_no_end(tmp_path):
    asked = []

    def train(lr, seed):
        asked.append((round(2 * math.log10(lr)), seed))
        return Curve([10.0, abs(math.log10(lr) + 3) + 0.1], [0.0, 0.0])

    runs = Runs("kept", tmp_path)
    runs.tune("name", (-3, -2, -1), 2, train)
    assert asked == [(-3, 0), (-2, 0), (-1, 0), (-4, 0), (-5, 0), (-6, 0), (-6, 1)]
    Runs("kept", tmp_path).tune("name", (-3, -2, -1), 2, train)  # all of them are kept
    assert len(asked) == 7


def test_runs_on_other_data_are_not_mixed(tmp_path, capsys):
    runs = Runs("kept", tmp_path)
    assert runs.learn_from("one")
    runs.keep("name -2 0", [[1.0], [1.0]])
    assert not Runs("kept", tmp_path).learn_from("another")
    assert "kept.json holds runs on one" in capsys.readouterr().out


def test_a_level_is_reached_between_two_marks():
    assert tuning.first_at([4.0, 2.0, 1.0], 3.0) == 0.25
    assert tuning.first_at([4.0, 2.0, 1.0], 0.5) == math.inf


def test_tables_are_those_of_the_kept_runs(monkeypatch):
    written = {}
    monkeypatch.setattr(style, "text", lambda name, words: written.update({name: words + "\n"}))
    resnet.table(Runs("resnet"))
    parts.table()
    assert set(written) == {"resnet", "parts"}
    for name, words in written.items():
        assert words == (style.DOCS / "_generated" / f"claims_{name}.md").read_text("utf-8")
