"""The fast kernels of the array adapter compute what the core's plain ones compute.

The bodies of the CUDA kernels are compiled for the CPU here and run on NumPy arrays. Only a GPU can test
(`tests/gpu/test_arrays.py`) that CuPy compiles the same source, and its launches.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import array_api_compat.numpy as xp
import numpy as np
import pytest

import mlbfgs_core as core
from mlbfgs_arrays import cuda
from mlbfgs_arrays.cuda import CupyKernels
from mlbfgs_arrays.kernels import NumpyKernels
from mlbfgs_core.kernels import Means, Metric

pytestmark = pytest.mark.backends("numpy")

M = 3
SIZES = [0, 1, 5, 77]
COMPILER = shutil.which("c++")
C_TYPES = {"bool": "bool", "int64": "long long", "float32": "float", "float64": "double"}


class Declared(NamedTuple):
    """A parameter of a kernel: "raw T x"."""

    raw: bool
    kind: str
    name: str
    const: str

    @classmethod
    def all(cls, text, const):
        words = [part.split() for part in text.split(",")]
        return [cls(own[0] == "raw", own[-2], own[-1], const) for own in words]

    def line(self, index, c_type):
        pointer = f"({self.const}{c_type}*)arrays[{index}]"
        if self.raw:
            return f"{self.const}{c_type} *{self.name} = {pointer};\n"
        return f"{self.const}{c_type} &{self.name} = ({pointer})[i * steps[{index}]];\n"


class CpuKernel:
    """What `cupy.ElementwiseKernel` does with its arguments, in a loop on the CPU."""

    def __init__(self, in_params, out_params, operation, name, preamble):
        self.params = Declared.all(in_params, "const ") + Declared.all(out_params, "")
        self.operation, self.name, self.preamble = operation, name, preamble

    def __call__(self, *args):
        given = list(zip(self.params, args, strict=True))
        dtypes = {p.kind: arg.dtype for p, arg in given if hasattr(arg, "dtype")}
        arrays = []
        for param, arg in given:
            array = arg if hasattr(arg, "dtype") else np.asarray(arg, dtypes.get(param.kind, param.kind))
            assert array.dtype == dtypes.get(param.kind, array.dtype), f"{param} is {array.dtype}"
            assert len(param.kind) == 1 or array.dtype == param.kind, f"{param} is {array.dtype}"
            arrays.append(np.asarray(array))
        looped = [array.shape for param, array in zip(self.params, arrays, strict=True) if not param.raw]
        (size,) = np.broadcast_shapes((1,), *looped)
        pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
        steps = [0 if array.size == 1 else array.strides[0] // array.itemsize for array in arrays]
        function = compiled(self.code({kind: C_TYPES[str(d)] for kind, d in dtypes.items()}), self.name)
        function(ctypes.c_longlong(size), pointers, (ctypes.c_longlong * len(steps))(*steps))

    def code(self, types):
        types = {"bool": "bool", "int64": "long long", **types}
        return "".join(
            [
                "#include <cmath>\nusing std::isfinite; using std::pow; using std::sqrt;\n",
                *(f"typedef {c_type} {kind};\n" for kind, c_type in types.items() if len(kind) == 1),
                f"{self.preamble}\n",
                f'extern "C" void {self.name}(long long size, void **arrays, const long long *steps) {{\n',
                "for (long long i = 0; i < size; ++i) {\n",
                *(param.line(index, types[param.kind]) for index, param in enumerate(self.params)),
                f"{self.operation};\n}}\n}}\n",
            ]
        )


@functools.cache
def compiled(code, name):
    """A function of C++."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "kernel.cc"), Path(folder, "kernel.so")
        source.write_text(code)
        command = [COMPILER, "-O0", "-w", "-shared", "-fPIC", str(source), "-o", str(library)]
        subprocess.run(command, check=True)
        return getattr(ctypes.CDLL(str(library)), name)


@pytest.fixture(params=["CuPy", "NumPy"])
def both(request, monkeypatch):
    """The plain kernels, and the fast ones with limits so small that short leaves take every path."""
    plain = core.Kernels(xp, 10**9)
    if request.param == "NumPy":
        fast = NumpyKernels()
        fast.tile = 16
        return plain, fast
    if COMPILER is None:
        pytest.skip("the bodies of the CUDA kernels need a C++ compiler (c++) to run on the CPU")
    monkeypatch.setattr(cuda, "_THREADS", 7)
    monkeypatch.setattr(cuda, "_OWN", 2)
    return plain, CupyKernels(xp, CpuKernel)


class Leaf:
    """Random arrays of one leaf."""

    def __init__(self, size, history_dtype="float64", param_dtype="float64"):
        rng = np.random.default_rng(size)
        self.history = rng.normal(size=(2, M, size)).astype(history_dtype)
        self.param = rng.normal(size=size).astype(param_dtype)
        self.grad = rng.normal(size=size)
        self.means = Means(*rng.normal(size=(4, size)))
        self.moment = rng.normal(size=size) ** 2

    def metric(self, power=0.5, weight=0.3, kept=None):
        if power == 0:
            return None
        weight = None if weight is None else np.asarray(weight)
        return Metric(self.moment, weight, np.asarray(1e-3), power, kept)


def same(first, second):
    """Results of both kernels agree up to rounding, whatever their structure."""
    if first is None or second is None:
        assert first is second
    elif isinstance(first, (np.ndarray, np.generic)):
        np.testing.assert_allclose(first, second, rtol=1e-11, atol=1e-11)
        assert first.dtype == second.dtype
    else:
        for one, other in zip(first, second, strict=True):
            same(one, other)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("power", "weight"), [(0, None), (0.5, 0.3), (0.5, None), (0.7, 0.3)])
@pytest.mark.parametrize("scatters", [True, False])
def test_project(both, size, power, weight, scatters):
    results = []
    for kernels in both:
        leaf = Leaf(size)
        mean, metric = leaf.means.grads if scatters else None, leaf.metric(power, weight)
        results.append(
            kernels.project(leaf.history, leaf.grad, mean, np.asarray(0.4), metric, np.dtype("float64"))
        )
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("keeps_root", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_combine(both, size, power, keeps_root, dtype):
    results = []
    for kernels in both:
        leaf = Leaf(size, dtype)
        kept = leaf.moment + 0.5 if keeps_root and power else None
        metric, coefficients = leaf.metric(power, None, kept), np.linspace(-1, 1, 2 * M)
        gamma, keep = np.asarray(0.7), np.asarray(True)
        results.append(
            kernels.combine(leaf.history, leaf.grad, coefficients, gamma, metric, keep, np.dtype("float64"))
        )
    same(*results)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_combine_is_zero_for_a_gradient_that_is_not_finite(both, bad):
    for kernels in both:
        leaf = Leaf(77)
        leaf.grad[3] = bad
        coefficients, gamma, keep = np.full(2 * M, np.nan), np.asarray(1.0), np.asarray(False)
        metric = leaf.metric(weight=None)
        update, square = kernels.combine(
            leaf.history, leaf.grad, coefficients, gamma, metric, keep, np.dtype("float64")
        )
        assert not update.any()
        assert square == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("bad", [None, np.nan, -np.inf])
def test_update_means(both, size, power, bad):
    results = []
    for kernels in both:
        leaf = Leaf(size, param_dtype="float32")
        leaf.param[:1] = leaf.param[:1] if bad is None else bad
        weight, keep = np.asarray(0.2), np.asarray(True)
        arguments = (leaf.means.params, leaf.means.grads, leaf.metric(power), leaf.param, leaf.grad)
        results.append(kernels.update_means(*arguments, weight, keep))
    same(*results)
    assert all(np.isfinite(array).all() for array in results[1] if array is not None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_update_means_leaves_everything_where_the_step_is_not_kept(both, bad):
    for kernels in both:
        leaf = Leaf(77)
        leaf.grad[3], leaf.param[70] = bad, bad
        before = [leaf.means.params.copy(), leaf.means.grads.copy(), leaf.moment.copy()]
        arguments = (leaf.means.params, leaf.means.grads, leaf.metric(), leaf.param, leaf.grad)
        after = kernels.update_means(*arguments, np.asarray(0.2), np.asarray(False))
        assert [array.tobytes() for array in after] == [array.tobytes() for array in before]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_rotate(both, size, turn, restart):
    same(*(kernels.rotate(Leaf(size).means, np.asarray(turn), restart=restart) for kernels in both))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pushed_pairs_and_their_products(both, size, power, keep, dtype):
    results = []
    for kernels in both:
        leaf, slot = Leaf(size, dtype), np.asarray([1])
        metric, valid = leaf.metric(power, None), np.asarray(True)
        norm, *damping = (np.asarray(x) for x in (0.3, 0.9, 0.2))
        pushed = (slot, leaf.means, metric, valid, norm, tuple(damping), np.asarray(keep))
        history, products = kernels.push(leaf.history, *pushed, leaf.grad)
        _, bare = kernels.push(history, *pushed, None)
        results.append((history, products, bare))
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("power", [0, 0.5])
@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e180])
def test_products_of_a_pair_of_any_size(both, size, power, valid, scale):
    results = []
    for kernels in both:
        leaf = Leaf(size)
        means = Means(*(mean * scale for mean in leaf.means))
        parts = kernels.pair_products(means, leaf.metric(power, None), np.asarray(valid))
        top_s, top_y = (max(getattr(part, name) for part in parts) for name in ("s_scale", "y_scale"))
        results.append([top_s / scale, top_y / scale])
        for name, first, second in (("ss", "s", "s"), ("sy", "s", "y"), ("yy", "y", "y")):
            sums = 0.0
            for part in parts:
                scales = {"s": part.s_scale / (top_s or 1), "y": part.y_scale / (top_y or 1)}
                sums += getattr(part, name) * scales[first] * scales[second]
            results[-1].append(np.asarray(sums))
    same(*results)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_descend_is_momentum_with_decoupled_decay_rounded_once(both, dtype, momentum, decay, nesterov):
    _, kernels = both
    leaf = Leaf(77, param_dtype=dtype)
    leaf.param[5] = np.nan
    param, update, buffer = leaf.param.copy(), leaf.grad.copy(), leaf.means.params.copy()
    given = None if momentum is None else leaf.means.params
    numbers = (np.asarray(0.5), given, 0.3, momentum, decay, np.asarray(True))
    kernels.descend(leaf.param, leaf.grad, *numbers, nesterov=nesterov)
    carried = 0.9 * buffer + 0.5 * update
    looking_ahead = 0.5 * update + 0.9 * carried
    change = 0.5 * update if momentum is None else looking_ahead if nesterov else carried
    expected = (param.astype("float64") * (1 - 0.3 * decay) - 0.3 * change).astype(dtype)
    np.testing.assert_allclose(leaf.param, expected, rtol=2 * np.finfo(dtype).eps, atol=1e-15)
    if momentum is not None:
        np.testing.assert_allclose(leaf.means.params, carried, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("nesterov", [True, False])
def test_descend_leaves_everything_where_the_step_is_not_kept(both, nesterov):
    _, kernels = both
    leaf = Leaf(77)
    leaf.param[:2], leaf.means.params[:2] = -0.0, -0.0
    before = leaf.param.tobytes(), leaf.means.params.tobytes()
    numbers = (np.asarray(np.nan), leaf.means.params, 0.3, 0.9, 0.1, np.asarray(False))
    kernels.descend(leaf.param, leaf.grad, *numbers, nesterov=nesterov)
    assert (leaf.param.tobytes(), leaf.means.params.tobytes()) == before


def test_a_learning_rate_may_be_an_array(both):
    _, kernels = both
    results = []
    for rate in (0.3, np.asarray(0.3)):
        leaf = Leaf(5)
        numbers = (np.asarray(0.5), leaf.means.params, rate, 0.9, 0.1, np.asarray(True))
        kernels.descend(leaf.param, leaf.grad, *numbers, nesterov=True)
        results.append(leaf.param)
    same(*results)
