"""The PyTorch kernels mean what the core's plain ones mean, at every size of leaf.

Triton's interpreter runs those of a GPU on the CPU. What is left to a GPU (`tests/gpu/test_cuda.py`) is that
Triton compiles the same text, its launches, and bfloat16, to which the interpreter does not round but cuts.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from itertools import cycle
from pathlib import Path

import array_api_compat.torch as xp
import pytest
import torch
from torch import nn

import mlbfgs_core as core
from mlbfgs_core.kernels import Means, Metric
from mlbfgs_torch import MLBFGS, units
from mlbfgs_torch import kernels as fast_kernels
from mlbfgs_torch.kernels import TorchKernels

pytestmark = pytest.mark.backends("torch")

M = 3
SIZES = [0, 1, 5, 40, 64, 77, 200]
"""Below, at and above both a split product and a tile of the small limits that the fixture sets."""

SETTINGS = [
    {"check_every": 1, "history_size": 4},
    {"preset": "fit", "update_every": 4, "history_dtype": "float16"},
    {"preset": "paper", "update_every": 3},
    {"preset": "formulas", "update_every": 3},
]
MIXED = (torch.float64, torch.float32)


def fused_module():
    if sys.platform != "linux":
        pytest.skip("Triton is built for Linux only")
    return import_module("mlbfgs_torch.fused")


@pytest.fixture(params=["PyTorch", "Triton"])
def both(request, monkeypatch):
    """The plain kernels, and the fast ones with limits so small that short leaves take every path."""
    plain = core.Kernels(xp, 10**9)
    if request.param == "PyTorch":
        monkeypatch.setitem(fast_kernels._TILE, "cpu", 64)
        monkeypatch.setattr(fast_kernels, "_PART", 16)
        return plain, TorchKernels(torch.device("cpu"))
    fused = fused_module()
    monkeypatch.setattr(fused, "_BLOCK", 16)
    monkeypatch.setattr(fused, "_PROGRAMS", 3)
    return plain, fused.FusedKernels(torch.device("cpu"))


class Leaf:
    """Random arrays of one leaf."""

    def __init__(self, size, history_dtype=torch.float64):
        generator = torch.Generator().manual_seed(size)

        def draw(*shape):
            return torch.randn(*shape, size, generator=generator, dtype=torch.float64)

        self.history = draw(2, M).to(history_dtype)
        self.param, self.grad = draw(), draw()
        self.means = Means(*(draw() for _ in range(4)))
        self.moment = draw().square()

    def metric(self, power=0.5, weight=0.3, kept=None):
        if power == 0:
            return None
        weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
        floor = torch.tensor(1e-3, dtype=torch.float64)
        return Metric(self.moment, weight, floor, power, kept)


def same(first, second):
    """Results of both kernels agree to rounding, whatever they are made of."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-11)
    elif first is not None:
        for one, other in zip(first, second, strict=True):
            same(one, other)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5, 0.7])
@pytest.mark.parametrize("weight", [None, 0.3])
def test_project(both, size, power, weight):
    results = []
    for kernels in both:
        leaf = Leaf(size)
        scatter = torch.tensor(0.4, dtype=torch.float64)
        results.append(
            kernels.project(
                leaf.history, leaf.grad, leaf.means.grads, scatter, leaf.metric(power, weight), torch.float64
            )
        )
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("keeps_root", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_combine(both, size, power, keeps_root, dtype):
    results = []
    for kernels in both:
        leaf = Leaf(size, dtype)
        kept = leaf.moment + 0.5 if keeps_root and power else None
        results.append(
            kernels.combine(
                leaf.history,
                leaf.grad,
                torch.linspace(-1, 1, 2 * M, dtype=torch.float64),
                torch.tensor(0.7, dtype=torch.float64),
                leaf.metric(power, None, kept),
                torch.tensor(True),
                torch.float64,
            )
        )
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5])
def test_update_means(both, size, power):
    results = []
    for kernels in both:
        leaf = Leaf(size)
        weight, keep = torch.tensor(0.2, dtype=torch.float64), torch.tensor(True)
        arguments = (leaf.means.params, leaf.means.grads, leaf.metric(power), leaf.param, leaf.grad)
        results.append(kernels.update_means(*arguments, weight, keep))
    same(*results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_update_means_leaves_everything_where_the_step_is_not_kept(both, bad):
    for kernels in both:
        leaf = Leaf(77)
        leaf.grad[3], leaf.param[70] = bad, bad
        before = [leaf.means.params.clone(), leaf.means.grads.clone(), leaf.moment.clone()]
        weight, keep = torch.tensor(0.2, dtype=torch.float64), torch.tensor(False)
        arguments = (leaf.means.params, leaf.means.grads, leaf.metric(), leaf.param, leaf.grad)
        for now, old in zip(kernels.update_means(*arguments, weight, keep), before, strict=True):
            assert torch.equal(now, old)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_combine_is_finite_for_a_gradient_that_is_not(both, bad):
    for kernels in both:
        leaf = Leaf(77)
        leaf.grad[3] = bad
        coefficients = torch.full((2 * M,), float("nan"), dtype=torch.float64)
        gamma = torch.tensor(1.0, dtype=torch.float64)
        keep, metric = torch.tensor(False), leaf.metric(weight=None)
        update, _ = kernels.combine(leaf.history, leaf.grad, coefficients, gamma, metric, keep, torch.float64)
        assert torch.isfinite(update).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_rotate(both, size, turn, restart):
    results = [kernels.rotate(Leaf(size).means, torch.tensor(turn), restart=restart) for kernels in both]
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("keep", [True, False])
def test_pairs_and_their_products(both, size, power, keep):
    results = []
    for kernels in both:
        leaf, slot = Leaf(size), torch.tensor([1])
        metric, valid = leaf.metric(power, None), torch.tensor(True)
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (0.3, 0.9, 0.2)]
        history = kernels.write_pair(
            leaf.history, slot, leaf.means, metric, valid, numbers[0], tuple(numbers[1:]), torch.tensor(keep)
        )
        gram = kernels.gram(history, slot, leaf.grad, metric, torch.float64)
        bare = kernels.gram(history, slot, None, metric, torch.float64)
        results.append((history, gram, bare))
        parts = kernels.pair_products(leaf.means, metric, valid)
        results[-1] += (
            sum((part.ss * part.s_scale**2 for part in parts), torch.tensor(0.0, dtype=torch.float64)),
            sum((part.sy * part.s_scale * part.y_scale for part in parts), torch.tensor(0.0)),
            sum((part.yy * part.y_scale**2 for part in parts), torch.tensor(0.0)),
        )
    same(*results)


def test_inner_products_of_a_bfloat16_history_are_accumulated_in_float32(both):
    history = torch.ones(2, 1, 4001, dtype=torch.bfloat16)
    grad = torch.ones(4001)
    for kernels in both:
        seen = kernels.project(history, grad, None, torch.tensor(1.0), None, torch.float32)
        assert seen.rows.tolist() == [4001.0, 4001.0]  # bfloat16 has no 4001


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rate", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["float", "tensor"])
def test_descend_is_momentum_with_decoupled_decay_rounded_once(both, dtype, momentum, nesterov, decay, rate):
    _, kernels = both
    leaf = Leaf(77)
    param, update, buffer = leaf.param.to(dtype), leaf.grad.clone(), leaf.means.params.clone()
    given = None if momentum is None else buffer
    before = param.double().clone()
    length, keep = torch.tensor(0.5, dtype=torch.float64), torch.tensor(True)
    kernels.descend(param, update, length, given, rate, momentum or 0.0, decay, keep, nesterov=nesterov)
    carried = 0.9 * leaf.means.params + 0.5 * leaf.grad
    looking_ahead = 0.5 * leaf.grad + 0.9 * carried
    change = 0.5 * leaf.grad if momentum is None else looking_ahead if nesterov else carried
    expected = (before * (1 - 0.3 * decay) - 0.3 * change).to(dtype)
    torch.testing.assert_close(param, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-15)
    if momentum is not None:
        torch.testing.assert_close(buffer, carried, rtol=1e-15, atol=1e-15)


def trained(params, steps, settings, spoiled=None):
    """An optimizer after steps whose gradients change from one to the next; one may be spoiled by a NaN."""
    optimizer = MLBFGS(params, momentum=0.9, weight_decay=0.01, **{"lr": 0.005, **settings})
    for step in range(steps):
        for param in params:
            param.grad = (1 + step % 3) * param.detach()
        if step == spoiled:
            params[0].grad[2] = float("nan")
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("dtypes", "bound"), [((torch.float64,), 1e-8), (MIXED, 1e-2), ((torch.float16,), 5e-2)], ids=str
)
def test_training_is_the_same_with_either_kernels(both, settings, dtypes, bound, monkeypatch):
    def train(kernels):
        monkeypatch.setattr(units, "HOSTS", set())  # coefficients are tensors, as on a GPU
        monkeypatch.setattr(units.Unit, "kernels", kernels)
        torch.manual_seed(0)
        kinds = zip([(7, 5), (), (3, 2)], cycle(dtypes))
        params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, dtype in kinds]
        optimizer = trained(params, 14, settings, spoiled=7)
        assert int(optimizer.diagnostics()[0].pairs[0]) > 0
        return [param.detach() for param in params]

    _, fast = both
    for one, other in zip(train(TorchKernels(torch.device("cpu"))), train(fast), strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


def test_descend_leaves_everything_where_the_step_is_not_kept(both):
    _, kernels = both
    leaf = Leaf(77)
    param, buffer = leaf.param.clone(), leaf.means.params.clone()
    length, keep = torch.tensor(0.0, dtype=torch.float64), torch.tensor(False)
    kernels.descend(param, leaf.grad, length, buffer, 0.3, 0.9, 0.1, keep, nesterov=True)
    assert torch.equal(param, leaf.param)
    assert torch.equal(buffer, leaf.means.params)


@pytest.mark.slow
def test_triton_compiles_every_kernel_for_old_and_new_gpus(tmp_path):
    fused_module()
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    passes = ["largest", "pair_products", "rotate", "descend", "update_means", "write_pair"]
    assert sorted(done.stdout.split()) == sorted(
        f"_{name}" for name in ["project", "combine", "gram", *passes]
    )


# What a compiler that fails leads to stands in `tests/docs/test_faq.py`.
def test_without_triton_there_are_no_such_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlbfgs_torch.fused", None)
    assert units.fused_kernels.__wrapped__(torch.device("cpu")) is None
