"""The PyTorch kernels compute what the core's plain ones compute, at every size of leaf.

Triton's interpreter runs the GPU kernels on the CPU. Only a GPU can test (`tests/gpu/test_cuda.py`) that
Triton compiles the same source, its launches, and bfloat16, to which the interpreter truncates instead of
rounding.
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
from mlbfgs_core.adapter import DiagonalRoot, Leaf, Means, StepEnd
from mlbfgs_core.preconditioner.identity import Identity
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


ROOTS = [None, 0.5, 0.7]
"""Powers of a diagonal preconditioner; None: no preconditioner."""


def number(value):
    return torch.tensor(value, dtype=torch.float64)


class Arrays:
    """Random arrays of one leaf."""

    def __init__(self, size, history_dtype=torch.float64):
        generator = torch.Generator().manual_seed(size)

        def draw(*shape):
            return torch.randn(*shape, size, generator=generator, dtype=torch.float64)

        self.history = draw(2, M).to(history_dtype)
        self.param, self.grad = draw(), draw()
        self.means = Means(*(draw() for _ in range(4)))
        self.exp_avg_sq = draw().square()

    def leaf(self, power, weight=None, *, pairs=True):
        """As a pass takes it."""
        root = Identity()
        if power is not None:
            own = None if weight is None else number(weight)
            root = DiagonalRoot(self.exp_avg_sq, own, number(1e-3), power / 4)
        return Leaf(0, torch.float64, *((self.history, self.means) if pairs else (None, None)), root)


def same(first, second):
    """Results of both kernels agree up to rounding, whatever their structure."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-11)
    elif first is not None:
        for one, other in zip(first, second, strict=True):
            same(one, other)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", ROOTS)
@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("pairs", [True, False])
def test_whiten(both, size, power, weight, pairs):
    results = []
    for kernels in both:
        own = Arrays(size)
        leaf, mean = own.leaf(power, weight, pairs=pairs), own.means.grads if pairs else None
        root, sums = kernels.whiten(leaf, own.grad, mean, number(0.4))
        assert (root.kept is None) == (power is None)
        results.append((root.kept, list(sums)))
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", ROOTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("pairs", "keeps"), [(True, True), (True, False), (False, True)])
def test_direct(both, size, power, dtype, pairs, keeps):
    results = []
    for kernels in both:
        own = Arrays(size, dtype)
        grad = own.grad.clone()
        weights = torch.linspace(-1, 1, 2 * M, dtype=torch.float64), number(0.7)
        leaf = own.leaf(power, pairs=pairs)
        if keeps:
            leaf = leaf._replace(root=leaf.root.keeping(own.exp_avg_sq + 0.5))
        results.append(kernels.direct(leaf, own.grad, weights, torch.tensor(True)))
        assert torch.equal(own.grad, grad)  # the user's own
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("squared", [True, False])
def test_average(both, size, squared):
    results = []
    for kernels in both:
        own = Arrays(size)
        own.param[:1] = 2.0 if squared else float("inf")  # enters as zero
        results.append(
            kernels.average(own.means.params, own.param, number(0.2), torch.tensor(True), squared=squared)
        )
    same(*results)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
@pytest.mark.parametrize("squared", [True, False])
def test_average_leaves_everything_where_the_step_is_not_kept(both, bad, squared):
    for kernels in both:
        own = Arrays(77)
        own.grad[3], own.means.grads[3] = bad, -1e300
        before = own.means.grads.clone()
        now = kernels.average(own.means.grads, own.grad, number(0.2), torch.tensor(False), squared=squared)
        assert torch.equal(now, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("power", [None, 1.0])
def test_direct_is_finite_for_a_gradient_that_is_not(both, bad, power):
    for kernels in both:
        own = Arrays(77)
        own.grad[3] = bad
        weights = torch.full((2 * M,), float("nan"), dtype=torch.float64), number(1.0)
        update, _ = kernels.direct(own.leaf(power), own.grad, weights, torch.tensor(False))
        assert torch.isfinite(update).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_rotate(both, size, turn, restart):
    results = []
    for kernels in both:
        means = Arrays(size).means
        results.append(kernels.rotate(means.params, means.prev_params, torch.tensor(turn), restart=restart))
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", ROOTS)
@pytest.mark.parametrize("valid", [True, False])
def test_products_of_the_next_pair(both, size, power, valid):
    results = []
    for kernels in both:
        parts = kernels.next_products(Arrays(size).leaf(power), torch.tensor(valid))
        results.append(
            (
                sum((part.ss * part.s_scale**2 for part in parts), number(0.0)),
                sum((part.sy * part.s_scale * part.y_scale for part in parts), number(0.0)),
                sum((part.yy * part.y_scale**2 for part in parts), number(0.0)),
            )
        )
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", ROOTS)
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("projects", [True, False])
def test_push_next(both, size, power, keep, projects):
    results = []
    for kernels in both:
        own, slot = Arrays(size), torch.tensor([1])
        damping = tuple(number(x) for x in (0.9, 0.2, 0.3))
        flags = torch.tensor(True), torch.tensor(keep)
        grad = own.grad if projects else None
        history, sums = kernels.push_next(own.leaf(power), slot, damping, flags, grad)
        results.append((history, sums))
    same(*results)


def test_inner_products_of_a_bfloat16_history_are_accumulated_in_float32(both):
    history = torch.ones(2, 1, 4001, dtype=torch.bfloat16)
    leaf = Leaf(0, torch.float32, history, None, Identity())
    for kernels in both:
        _, (rows, _) = kernels.whiten(leaf, torch.ones(4001), None, torch.tensor(1.0))
        assert rows.tolist() == [4001.0, 4001.0]  # bfloat16 has no 4001


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("rate", [0.3, torch.tensor(0.3, dtype=torch.float64)], ids=["float", "tensor"])
def test_the_end_of_a_step_is_the_plain_one(both, dtype, momentum, nesterov, decay, rate):
    results = []
    for kernels in both:
        own = Arrays(77)
        param, update = own.param.to(dtype), own.grad.clone()
        buffer = None if momentum is None else own.means.params.clone()
        end = StepEnd(number(0.5), rate, momentum or 0.0, decay, nesterov)
        results.append(kernels.apply(param, update, buffer, end, torch.tensor(True)))
        assert results[-1][0] is param or kernels is both[0]
    (plain, carried), (fast, buffer) = results
    torch.testing.assert_close(fast, plain, rtol=2 * torch.finfo(dtype).eps, atol=1e-15)
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


def test_the_end_of_a_step_leaves_everything_where_the_step_is_not_kept(both):
    for kernels in both:
        own = Arrays(77)
        param, buffer = own.param.clone(), own.means.params.clone()
        end = StepEnd(number(0.0), 0.3, 0.9, 0.1, nesterov=True)
        param, buffer = kernels.apply(param, own.grad.clone(), buffer, end, torch.tensor(False))
        assert torch.equal(param, own.param)
        assert torch.equal(buffer, own.means.params)


@pytest.mark.slow
def test_triton_compiles_every_kernel_for_old_and_new_gpus(tmp_path):
    fused_module()
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sums = ["whiten", "direct", "largest", "pair_products", "gram"]
    passes = ["rotate", "apply", "average", "write_pair"]
    assert sorted(done.stdout.split()) == sorted(f"_{name}" for name in (*sums, *passes))


# The effect of a failing compiler is tested in `tests/docs/test_faq.py`.
def test_without_triton_there_are_no_such_kernels(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlbfgs_torch.fused", None)
    assert units.fused_kernels.__wrapped__(torch.device("cpu")) is None
