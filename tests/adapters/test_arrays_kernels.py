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
from mlbfgs_core.adapter import DiagonalRoot, Leaf, Means, StepEnd
from mlbfgs_core.preconditioner.identity import Identity

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


class Arrays:
    """Random arrays of one leaf."""

    def __init__(self, size, history_dtype="float64", param_dtype="float64", history=True):
        rng = np.random.default_rng(size)
        self.history = rng.normal(size=(2, M, size)).astype(history_dtype) if history else None
        self.param = rng.normal(size=size).astype(param_dtype)
        self.grad = rng.normal(size=size)
        self.means = Means(*rng.normal(size=(4, size)))
        self.exp_avg_sq = rng.normal(size=size) ** 2

    def leaf(self, power=None, weight=None):
        """What the passes take; `R` is the identity, or the diagonal of this power."""
        root = Identity()
        if power is not None:
            weight = None if weight is None else np.asarray(weight)
            root = DiagonalRoot(self.exp_avg_sq, weight, np.asarray(1e-3), power / 4)
        return Leaf(0, np.dtype("float64"), self.history, self.means, root)


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


POWERS = pytest.mark.parametrize("power", [None, 1.0, 0.3, 0.0])
"""None: no preconditioner."""


@pytest.mark.parametrize("size", SIZES)
@POWERS
@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("scatters", [True, False])
@pytest.mark.parametrize("history", [True, False])
def test_whiten(both, size, power, weight, scatters, history):
    results = []
    for kernels in both:
        arrays = Arrays(size, history=history)
        mean = arrays.means.grads if scatters else None
        root, sums = kernels.whiten(arrays.leaf(power, weight), arrays.grad, mean, np.asarray(0.4))
        results.append((root.kept, sums))
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@POWERS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("history", [True, False])
def test_direct(both, size, power, dtype, history):
    results = []
    for kernels in both:
        arrays = Arrays(size, dtype, history=history)
        weights = np.linspace(-1, 1, 2 * M), np.asarray(0.7)
        leaf, keep = arrays.leaf(power), np.asarray(True)
        results.append(kernels.direct(leaf, arrays.grad, weights, keep))
    same(*results)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@POWERS
def test_a_direction_is_zero_for_a_gradient_that_is_not_finite(both, bad, power):
    for kernels in both:
        arrays = Arrays(77)
        arrays.grad[3] = bad
        weights = np.full(2 * M, np.nan), np.asarray(1.0)
        update, square = kernels.direct(arrays.leaf(power), arrays.grad, weights, np.asarray(False))
        assert not update.any()
        assert square == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bad", [None, np.nan, -np.inf])
def test_average_of_values_that_may_not_be_finite(both, size, bad):
    results = []
    for kernels in both:
        arrays = Arrays(size, param_dtype="float32")
        arrays.param[:1] = arrays.param[:1] if bad is None else bad
        mean = kernels.average(arrays.means.params, arrays.param, np.asarray(0.2), np.asarray(True))
        assert np.isfinite(mean).all()
        results.append(mean)
    same(*results)


@pytest.mark.parametrize("size", SIZES)
def test_average_of_squares(both, size):
    weights = np.asarray(0.2), np.asarray(True)
    same(
        *(
            kernels.average(Arrays(size).exp_avg_sq, Arrays(size).grad, *weights, squared=True)
            for kernels in both
        )
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
@pytest.mark.parametrize("squared", [True, False])
def test_an_average_stays_where_the_step_is_not_kept(both, bad, squared):
    for kernels in both:
        arrays = Arrays(77)
        arrays.grad[3], before = bad, arrays.exp_avg_sq.tobytes()
        weights = np.asarray(0.2), np.asarray(False)
        after = kernels.average(arrays.exp_avg_sq, arrays.grad, *weights, squared=squared)
        assert after.tobytes() == before


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_rotate(both, size, turn, restart):
    averages = [Arrays(size).means[:2] for _ in both]
    same(
        *(
            kernels.rotate(*own, np.asarray(turn), restart=restart)
            for kernels, own in zip(both, averages, strict=True)
        )
    )


@pytest.mark.parametrize("size", SIZES)
@POWERS
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pushed_pairs_and_their_products(both, size, power, keep, valid, dtype):
    results = []
    for kernels in both:
        arrays, slot = Arrays(size, dtype), np.asarray([1])
        damping = tuple(np.asarray(x) for x in (0.9, 0.2, 0.3))
        flags = np.asarray(valid), np.asarray(keep)
        history, products = kernels.push_next(arrays.leaf(power), slot, damping, flags, arrays.grad)
        _, bare = kernels.push_next(arrays.leaf(power), slot, damping, flags, None)
        results.append((history, products, bare))
    same(*results)


@pytest.mark.parametrize("size", SIZES)
@POWERS
@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e180])
def test_products_of_a_pair_of_any_size(both, size, power, valid, scale):
    results = []
    for kernels in both:
        arrays = Arrays(size)
        arrays.means = Means(*(mean * scale for mean in arrays.means))
        parts = kernels.next_products(arrays.leaf(power), np.asarray(valid))
        top_s, top_y = (max(getattr(part, name) for part in parts) for name in ("s_scale", "y_scale"))
        results.append([top_s / scale, top_y / scale])
        for name, first, second in (("ss", "s", "s"), ("sy", "s", "y"), ("yy", "y", "y")):
            sums = 0.0
            for part in parts:
                scales = {"s": part.s_scale / (top_s or 1), "y": part.y_scale / (top_y or 1)}
                sums += getattr(part, name) * scales[first] * scales[second]
            results[-1].append(np.asarray(sums))
    same(*results)


@pytest.fixture(params=[0, 1], ids=["plain", "fast"])
def each(request, both):
    """The plain kernels, and the fast ones."""
    return both[request.param]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("momentum", [None, 0.9])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1, 1 / 0.3])
def test_the_end_of_a_step_is_momentum_with_decoupled_decay_rounded_once(
    each, dtype, momentum, decay, nesterov
):
    arrays = Arrays(77, param_dtype=dtype)
    arrays.param[5:7] = np.nan, np.inf
    param, update, buffer = arrays.param.copy(), arrays.grad.copy(), arrays.means.params.copy()
    given = None if momentum is None else arrays.means.params
    end = StepEnd(np.asarray(0.5), 0.3, momentum, decay, nesterov)
    moved, carried = each.apply(arrays.param, arrays.grad, given, end, np.asarray(True))
    expected_buffer = 0.9 * buffer + 0.5 * update
    looking_ahead = 0.5 * update + 0.9 * expected_buffer
    change = 0.5 * update if momentum is None else looking_ahead if nesterov else expected_buffer
    expected = (param.astype("float64") * (1 - 0.3 * decay) - 0.3 * change).astype(dtype)
    expected[5:7] = np.nan, np.inf
    np.testing.assert_allclose(moved, expected, rtol=2 * np.finfo(dtype).eps, atol=1e-15)
    assert moved.dtype == dtype
    if momentum is None:
        assert carried is None
    else:
        np.testing.assert_allclose(carried, expected_buffer, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_end_of_a_step_leaves_everything_where_the_step_is_not_kept(each, nesterov):
    arrays = Arrays(77)
    arrays.param[:2], arrays.means.params[:2] = -0.0, -0.0
    before = arrays.param.tobytes(), arrays.means.params.tobytes()
    end = StepEnd(np.asarray(np.nan), 0.3, 0.9, 0.1, nesterov)
    after = each.apply(arrays.param, arrays.grad, arrays.means.params, end, np.asarray(False))
    assert tuple(array.tobytes() for array in after) == before


def test_a_learning_rate_may_be_an_array(each):
    results = []
    for rate in (0.3, np.asarray(0.3)):
        arrays, end = Arrays(5), StepEnd(np.asarray(0.5), rate, 0.9, 0.1, nesterov=True)
        results.append(each.apply(arrays.param, arrays.grad, arrays.means.params, end, np.asarray(True)))
    same(*results)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preconditioner_power": 0.3},
        {"preconditioner": "none"},
        {"history_size": 0},
        {"history_size": 0, "preconditioner": "none"},
        {"history_dtype": "float32"},
        {"preset": "fit", "update_every": 4},
    ],
    ids=str,
)
def test_a_run_on_the_fast_kernels_is_that_on_the_plain_ones(both, settings):
    results = []
    for kernels in both:
        rng, method = (
            np.random.default_rng(0),
            core.Method(core.Config(check_every=1, **settings), None, kernels),
        )
        x, curvature, buffer = rng.normal(size=77), np.geomspace(0.1, 5, 77), np.zeros(77)
        state = method.init([x])
        for _ in range(16):
            grad = curvature * x + 0.01 * rng.normal(size=77)
            (update,), factor, state = method.unscaled_step(state, [x], [grad])
            end = StepEnd(kernels.to_leaf(factor, update.dtype), 0.02, 0.9, 0.1, nesterov=True)
            kernels.apply(x, update, buffer, end, state.accepted)
        results.append((x, buffer, state.pairs))
    np.testing.assert_array_equal(results[0][2], results[1][2])
    assert results[0][2][0] > 0 or settings.get("history_size") == 0
    for one, other in zip(results[0][:2], results[1][:2], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)
