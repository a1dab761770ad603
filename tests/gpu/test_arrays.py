"""On a CUDA GPU: arrays of CuPy, PyTorch and JAX follow NumPy's on the CPU, and no step of CuPy's waits."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import array_api_compat.numpy
import cupy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import mlbfgs_torch
from mlbfgs_arrays import MLBFGS
from mlbfgs_arrays.backends import backend_of
from mlbfgs_core import Kernels
from mlbfgs_core.adapter import DiagonalRoot, Leaf, Means, StepEnd
from mlbfgs_core.preconditioner import PRECONDITIONERS
from mlbfgs_jax import mlbfgs
from mlbfgs_torch.fused import FusedKernels
from tests.adapters.test_arrays import FAST, SETTINGS, Problem, flat

LR, MOMENTUM, DECAY = 0.01, 0.9, 0.1


@pytest.fixture(autouse=True, scope="module")
def _needs_a_gpu():
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError:
        count = 0
    assert count > 0, "these tests need a CUDA GPU, and CuPy sees none"
    assert torch.cuda.is_available(), "these tests need a CUDA GPU, and PyTorch sees none"
    assert jax.default_backend() == "gpu", f"these tests need JAX on a GPU, got {jax.default_backend()}"


class OnDevice(Problem):
    """The same quadratic in arrays of CuPy."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.curvature = {name: cupy.asarray(x) for name, x in self.curvature.items()}
        self.noise = [{name: cupy.asarray(x) for name, x in noise.items()} for noise in self.noise]

    def params(self, lay=cupy.copy):
        return {name: lay(cupy.asarray(x)) for name, x in self.start.items()}

    def grads(self, step, params):
        return {
            name: (self.curvature[name] * x + self.noise[step][name]).astype(x.dtype)
            for name, x in params.items()
        }

    def train(self, optimizer, start=0, stop=None):
        for step in range(start, len(self.noise) if stop is None else stop):
            optimizer.step(self.grads(step, optimizer.params))
        return on_host(optimizer.params)


def on_host(params):
    return flat({name: cupy.asnumpy(x) for name, x in params.items()})


def contents(optimizer, but=()):
    """Everything that an optimizer remembers and its parameters, as bytes."""
    memory = {**optimizer.state_dict(), **{f"param/{name}": x for name, x in optimizer.params.items()}}
    return {n: np.asarray(cupy.asnumpy(x)).tobytes() for n, x in memory.items() if n not in but}


def run_numpy(settings, dtype):
    problem = Problem(dtype=dtype)
    return problem.train(MLBFGS(problem.params(), LR, MOMENTUM, DECAY, **settings))


def run_cupy(settings, dtype):
    problem = OnDevice(dtype=dtype)
    return problem.train(MLBFGS(problem.params(), LR, MOMENTUM, DECAY, **settings))


def run_torch(settings, dtype):
    problem = Problem(dtype=dtype)
    params = {name: torch.nn.Parameter(torch.asarray(x).cuda()) for name, x in problem.params().items()}
    optimizer = mlbfgs_torch.MLBFGS(params.items(), LR, MOMENTUM, DECAY, **settings)
    for noise in problem.noise:
        for name, param in params.items():
            curvature, own = (torch.asarray(x[name]).cuda() for x in (problem.curvature, noise))
            param.grad = (curvature * param.detach() + own).to(param.dtype)
        optimizer.step()
    return flat({name: param.detach().cpu().numpy() for name, param in params.items()})


def run_jax(settings, dtype):
    problem = Problem(dtype=dtype)
    tx = mlbfgs(LR, MOMENTUM, DECAY, **settings)
    curvature = {name: jnp.asarray(x) for name, x in problem.curvature.items()}

    @jax.jit
    def step(params, state, noise):
        grads = {n: (curvature[n] * x + noise[n]).astype(x.dtype) for n, x in params.items()}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {name: jnp.asarray(x) for name, x in problem.params().items()}
    state = tx.init(params)
    for noise in problem.noise:
        params, state = step(params, state, noise)
    return flat({name: np.asarray(params[name]) for name in problem.start})


@pytest.mark.parametrize("run", [run_cupy, run_torch, run_jax])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-9), ("float32", 1e4 * np.finfo("float32").eps)])
def test_trajectory_on_the_gpu_is_that_of_numpy_on_the_cpu(run, name, dtype, bound):
    expected = run_numpy(SETTINGS[name], dtype)
    np.testing.assert_allclose(run(SETTINGS[name], dtype), expected, rtol=bound, atol=bound)


class OnNumpy(NamedTuple):
    """How the next test asks for arrays, kernels and dtypes."""

    send: Any = np.asarray
    fetch: Any = np.asarray
    kernels: Any = Kernels(array_api_compat.numpy)
    dtype: Any = np.dtype("float64")


def on_cupy():
    return OnNumpy(cupy.asarray, cupy.asnumpy, backend_of(cupy.zeros(1)).kernels)


def on_torch():
    def send(x):
        return torch.asarray(x).cuda()

    return OnNumpy(send, lambda x: x.cpu().numpy(), FusedKernels(torch.device("cuda")), torch.float64)


@pytest.mark.parametrize("size", [5, 3_000_000])
@pytest.mark.parametrize("power", [None, 1.0, 0.7])
@pytest.mark.parametrize("history_dtype", ["float64", "float16"])
@pytest.mark.parametrize("library", [on_cupy, on_torch])
def test_kernels_on_the_gpu_are_the_plain_ones_on_the_cpu(library, size, power, history_dtype):
    rng = np.random.default_rng(0)
    history = rng.normal(size=(2, 2, size)).astype(history_dtype)
    values = rng.normal(size=(6, size))
    results = []
    for send, fetch, kernels, dtype in (OnNumpy(), library()):
        own, grad, *means, root = send(history.copy()), *(send(x.copy()) for x in values)
        means, squares = Means(*means), root**2
        half, true, slot = send(np.asarray(0.5)), send(np.asarray(True)), send(np.asarray([1]))
        root = PRECONDITIONERS["none"]
        if power is not None:
            root = DiagonalRoot(squares, half, send(np.asarray(1e-3)), power / 4)
        leaf, weights = Leaf(0, dtype, own, means, root), (send(np.linspace(-1, 1, 4)), half)
        root, sums = kernels.whiten(leaf, grad, means.grads, half)
        leaf = leaf._replace(root=root.update(kernels, grad, true))
        pushed = kernels.push_next(leaf, slot, (half, half, half), (true, true), grad)
        pair = kernels.next_products(leaf, true)
        directed = kernels.direct(leaf, grad, weights, true)
        end = StepEnd(half, half, 0.9, 0.1, nesterov=True)
        ended = kernels.apply(means.prev_params, grad, means.prev_grads, end, true)
        averaged = kernels.average(means.params, grad, half, true)
        turned = kernels.rotate(means.params, means.grads, true, restart=True)
        product = sum(part.sy * part.s_scale * part.y_scale for part in pair)
        kinds = [*sums, *pushed, product, *directed, *ended, averaged, *leaf.root.arrays.values(), *turned]
        results.append([fetch(x) for x in kinds])
    for expected, result in zip(*results, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-9 * size**0.5)


def fortran(x):
    return x.copy(order="F")


def every_second(x):
    around = cupy.full((*(2 * n for n in x.shape), 2), 7, x.dtype)
    view = around[(*(slice(None, None, 2) for _ in x.shape), 0, ...)]
    view[...] = x
    return view


def backwards(x):
    turn = (*(slice(None, None, -1) for _ in x.shape), ...)
    return x[turn].copy()[turn]


@pytest.mark.parametrize("lay", [fortran, every_second, backwards])
def test_parameters_of_any_strides_are_updated_in_place(lay):
    problem = OnDevice()
    expected = problem.train(MLBFGS(problem.params(), LR, weight_decay=DECAY, **FAST))
    params = problem.params(lay)
    optimizer = MLBFGS(params, LR, weight_decay=DECAY, **FAST)
    np.testing.assert_allclose(problem.train(optimizer), expected, rtol=1e-9, atol=1e-11)
    assert all(optimizer.params[name] is x for name, x in params.items())


def test_half_precision_is_rounded_once():
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=1000).astype("float16"), (0.01 * rng.normal(size=1000)).astype("float16")
    on_device = cupy.asarray(x)
    MLBFGS(on_device, 0.3, 0.0, 0.2, preset="lbfgs").step(cupy.asarray(grad))
    exact = x.astype(float) * (1 - 0.3 * 0.2) - 0.3 * grad.astype(float)
    error = np.abs(on_device.get().astype(float) - exact)
    assert np.all(error <= np.spacing(np.abs(exact).astype("float16")).astype(float) * (0.5 + 1e-3))


def test_complex_parameters_are_pairs_of_reals():
    rng = np.random.default_rng(0)
    real = cupy.asarray(rng.normal(size=(6, 2)))
    pair = every_second(real.view("complex128")[:, 0].copy())
    for x in (real, pair):
        optimizer = MLBFGS(x, LR, **FAST)
        for step in range(14):
            optimizer.step((step % 3 + 1) * x)
    cupy.testing.assert_allclose(cupy.stack([pair.real, pair.imag], axis=-1), real, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["default", "every step", "lbfgs"])
def test_a_non_finite_gradient_changes_nothing_but_a_count(poison, name):
    problem = OnDevice()
    optimizer = MLBFGS(problem.params(), LR, 0.9, DECAY, **SETTINGS[name])
    verdict = ("unit0/skipped", "unit0/accepted", "unit0/due")
    for step in range(8):
        grads = problem.grads(step, optimizer.params)
        grads["hidden.bias"][2] = poison
        before = contents(optimizer, verdict)
        optimizer.step(grads)
        assert contents(optimizer, verdict) == before
        optimizer.step(problem.grads(step, optimizer.params))
    assert int(optimizer.diagnostics()[0].skipped) == 8


def test_a_non_finite_parameter_stays_and_does_not_spoil_the_others():
    problem = OnDevice()
    params = problem.params()
    params["hidden.bias"][1] = np.nan
    optimizer = MLBFGS(params, LR, **FAST)
    for step in range(12):
        grads = problem.grads(step, params)
        grads["hidden.bias"][1] = 0
        optimizer.step(grads)
    assert np.isnan(on_host(params)).sum() == 1
    assert int(optimizer.diagnostics()[0].pairs[0]) > 0


def test_a_gradient_that_comes_and_goes_and_a_schedule_on_the_device():
    results = []
    for kind in (Problem, OnDevice):
        problem = kind()
        rate = np.asarray(0.05) if kind is Problem else cupy.asarray(0.05)
        optimizer = MLBFGS(problem.params(), rate, **FAST)
        for step in range(16):
            rate *= 0.9
            grads = problem.grads(step, optimizer.params)
            optimizer.step({**grads, "scale": None} if step % 5 == 3 else grads)
        results.append(on_host(optimizer.params))
    np.testing.assert_allclose(*results, rtol=1e-9, atol=1e-11)


def test_a_state_goes_through_a_file_to_another_gpu_run_and_to_the_cpu(tmp_path):
    problem = OnDevice(dtype="float32")
    optimizer = MLBFGS(problem.params(), LR, **FAST)
    problem.train(optimizer, stop=9)
    cupy.savez(tmp_path / "state.npz", **optimizer.state_dict())
    loaded = np.load(tmp_path / "state.npz", allow_pickle=False)
    resumed = MLBFGS(copy.deepcopy(optimizer.params), 1.0, **FAST)
    resumed.load_state_dict(loaded)
    assert contents(resumed) == contents(optimizer)
    other = Problem(dtype="float32")
    host = MLBFGS({name: x.get() for name, x in optimizer.params.items()}, 1.0, **FAST)
    host.load_state_dict(optimizer.state_dict())
    expected = problem.train(optimizer, 9)
    assert np.array_equal(problem.train(resumed, 9), expected)
    np.testing.assert_allclose(other.train(host, 9), expected, rtol=1e-3, atol=1e-3)


def test_a_run_saved_on_the_gpu_goes_on_in_numpy(tmp_path):
    problem, other = OnDevice(), Problem()
    optimizer = MLBFGS(problem.params(), LR, **FAST)
    problem.train(optimizer, stop=9)
    optimizer.save_state(tmp_path / "run.safetensors")
    host = MLBFGS(other.params(), LR, **FAST)
    host.load_state(tmp_path / "run.safetensors")
    np.testing.assert_array_equal(flat(host.params), on_host(optimizer.params))
    np.testing.assert_allclose(other.train(host, 9), problem.train(optimizer, 9), rtol=1e-9, atol=1e-11)


def test_a_copy_is_independent():
    problem = OnDevice()
    optimizer = MLBFGS(problem.params(), LR, **FAST)
    problem.train(optimizer, stop=6)
    twin = copy.deepcopy(optimizer)
    before = contents(twin)
    expected = problem.train(optimizer, 6)
    assert contents(twin) == before
    assert np.array_equal(problem.train(twin, 6), expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_step_reads_from_the_device(monkeypatch, name):
    problem = OnDevice()
    optimizer = MLBFGS(problem.params(), LR, weight_decay=DECAY, **SETTINGS[name])
    problem.train(optimizer, stop=1)
    original, sent = cupy.ndarray.get, []

    def get(self, stream=None, order="C", out=None, blocking=True):
        assert not blocking, "a step waits for the device"
        sent.append(self.size)
        return original(self, stream, order, out, blocking)

    monkeypatch.setattr(cupy.ndarray, "get", get)
    for step in range(1, 24):
        optimizer.step(problem.grads(step, optimizer.params))
    assert sent == [2] * 23


SPIN = """
extern "C" __global__ void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def test_a_step_returns_while_the_device_is_still_busy_with_what_came_before():
    problem = OnDevice()
    optimizer = MLBFGS(problem.params(), LR, weight_decay=DECAY, **FAST)
    problem.train(optimizer, stop=20)  # every kernel is compiled and loaded, and the pool has memory
    grads = problem.grads(20, optimizer.params)
    cycles = 5_000_000_000  # some three seconds
    busy = cupy.cuda.Event(disable_timing=True)
    cupy.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(cycles),))
    busy.record()
    optimizer.step(grads)
    assert not busy.done
    busy.synchronize()
    assert int(optimizer.diagnostics()[0].step) == 21


def test_parameters_on_the_cpu_and_on_the_gpu_train_together_and_one_nan_skips_both():
    params = {"host": np.ones(4), "device": cupy.ones(4)}
    optimizer = MLBFGS(params, LR, adaptive=False, update_every=2)
    for _ in range(6):
        optimizer.step({name: x.copy() for name, x in params.items()})
    assert all(bool((x < 1).all()) for x in params.values())
    before = contents(optimizer, [f"unit{i}/{f}" for i in (0, 1) for f in ("skipped", "accepted", "due")])
    optimizer.step({"host": params["host"].copy(), "device": params["device"] * np.nan})
    assert contents(optimizer, set(contents(optimizer)) - set(before)) == before
    assert [int(record.skipped) for record in optimizer.diagnostics()] == [1, 1]
    with pytest.raises(TypeError, match="must hold a CuPy array or None for 'device'"):
        optimizer.step({"host": params["host"], "device": np.ones(4)})


def test_parameters_on_several_gpus_train_together():
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("this test needs two GPUs, and there is one")
    params = []
    for number in range(2):
        with cupy.cuda.Device(number):
            params.append(cupy.ones(4))
    optimizer = MLBFGS(params, LR, adaptive=False, update_every=2)
    assert len(optimizer.units) == 2
    for _ in range(6):
        optimizer.step([x.copy() for x in params])
    assert np.array_equal(params[0].get(), params[1].get())
    with pytest.raises(ValueError, match="must lie on cuda:1 for 'param1', got an array on cuda:0"):
        optimizer.step([params[0], params[0]])
