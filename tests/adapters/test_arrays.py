"""`mlbfgs_arrays.MLBFGS` on NumPy arrays follows the readable twin, wherever its parameters lie in memory."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import warnings

import array_api_strict
import ml_dtypes
import numpy as np
import pytest

import mlbfgs_core as core
from mlbfgs_arrays import MLBFGS
from mlbfgs_arrays.backends import Host
from mlbfgs_core import adapter
from mlbfgs_core.reference import Reference

pytestmark = pytest.mark.backends("numpy")

FAST = {"check_every": 1, "history_size": 4}
SETTINGS = {
    "default": {},
    "every step": FAST,
    "fixed": {"adaptive": False, "update_every": 3},
    "fit": {"preset": "fit", "update_every": 6},
    "lbfgs": {"preset": "lbfgs"},
    "paper": {"preset": "paper", "update_every": 4},
    "formulas": {"preset": "formulas", "update_every": 4},
    "no pairs": {"history_size": 0},
    "no pairs, no preconditioner": {"history_size": 0, "preconditioner": "none"},
}
SHAPES = {"hidden.weight": (5, 4), "hidden.bias": (5,), "scale": (), "none": (0, 3)}
DIM = 26


class Problem:
    """A quadratic in many parameters, with noise in its gradients that belongs to the step."""

    def __init__(self, steps=24, dtype="float64"):
        rng = np.random.default_rng(0)
        self.dtype = dtype
        self.start = {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}
        curvature = np.geomspace(0.05, 5, DIM)
        self.curvature = dict(zip(SHAPES, self.cut(curvature), strict=True))
        self.noise = [
            dict(zip(SHAPES, self.cut(0.01 * own), strict=True)) for own in rng.normal(size=(steps, DIM))
        ]

    @staticmethod
    def cut(flat):
        parts = np.split(flat, np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, SHAPES.values(), strict=True)]

    def params(self, lay=np.copy):
        return {name: lay(x) for name, x in self.start.items()}

    def grads(self, step, params):
        return {
            name: np.asarray(self.curvature[name] * x + self.noise[step][name]).astype(x.dtype)
            for name, x in params.items()
        }

    def train(self, optimizer, start=0, stop=None):
        """Steps of the optimizer; its parameters, as one vector."""
        for step in range(start, len(self.noise) if stop is None else stop):
            optimizer.step(self.grads(step, optimizer.params))
        return flat(optimizer.params)


def flat(params):
    values = params.values() if isinstance(params, dict) else params
    return np.concatenate([np.ravel(x) for x in values])


def follow(config, problem, steps, lr, momentum, decay, skip=(), nesterov=True):
    """The readable twin, with momentum and decay by hand."""
    twin, x = Reference(config, [DIM]), flat(problem.start).astype(float)
    velocity = np.zeros(DIM)
    for step in range(steps):
        grad = flat(problem.curvature) * x + flat(problem.noise[step])
        if step in skip:
            continue
        (direction,) = twin.step([x], [grad])
        velocity = momentum * velocity + direction
        change = direction + momentum * velocity if nesterov else velocity
        rate = lr(step) if callable(lr) else lr
        x = x * (1 - rate * decay) - rate * change
    return x


def contents(optimizer, but=()):
    """Everything that an optimizer remembers and its parameters, as bytes."""
    memory = {name: np.asarray(value).tobytes() for name, value in optimizer.state_dict().items()}
    arrays = {f"param/{name}": x.tobytes() for name, x in optimizer.params.items()}
    return {name: x for name, x in {**memory, **arrays}.items() if name not in but}


VERDICT = ("unit0/skipped", "unit0/accepted", "unit0/due")
"""What a skipped step changes: its count, and what the state says about the last step."""


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("momentum", "decay"), [(0.9, 0.01), (0.0, 0.0)])
def test_trajectory_is_that_of_the_readable_twin(name, momentum, decay, nesterov):
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, momentum, decay, nesterov=nesterov, **SETTINGS[name])
    expected = follow(core.Config(**SETTINGS[name]), problem, 24, 0.05, momentum, decay, nesterov=nesterov)
    np.testing.assert_allclose(problem.train(optimizer), expected, rtol=1e-8, atol=1e-10)
    assert optimizer.diagnostics()[0].pairs[0] > 0 or not optimizer.config.takes_pairs


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 1e-3),
        ({"step_length": "unit"}, 0.1),
        *(({"preset": name}, 0.1) for name in ("paper", "formulas", "lbfgs", "fit")),
    ],
)
def test_the_learning_rate_fits_the_step_length_where_none_is_given(settings, rate):
    assert MLBFGS(np.ones(2), **settings).lr == rate
    assert MLBFGS(np.ones(2), 0.5, **settings).lr == 0.5


@pytest.mark.parametrize(
    ("preset", "nesterov"),
    [
        (None, True),
        ("default", True),
        ("paper", False),
        ("formulas", False),
        ("lbfgs", False),
        ("fit", False),
    ],
)
def test_momentum_looks_ahead_as_the_preset_says(preset, nesterov):
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, 0.9, preset=preset)
    assert optimizer.nesterov is nesterov
    expected = follow(core.Config(preset=preset), problem, 24, 0.05, 0.9, 0.0, nesterov=nesterov)
    np.testing.assert_allclose(problem.train(optimizer), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.backends("torch")
@pytest.mark.parametrize("name", SETTINGS)
def test_trajectory_is_that_of_the_torch_optimizer(name):
    import torch

    import mlbfgs_torch

    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, weight_decay=0.1, **SETTINGS[name])
    params = {name: torch.nn.Parameter(torch.asarray(x)) for name, x in problem.params().items()}
    other = mlbfgs_torch.MLBFGS(params.items(), 0.05, weight_decay=0.1, **SETTINGS[name])
    for step in range(24):
        for name_, grad in problem.grads(step, {n: p.detach().numpy() for n, p in params.items()}).items():
            params[name_].grad = torch.asarray(grad)
        other.step()
    expected = flat({name: param.detach().numpy() for name, param in params.items()})
    np.testing.assert_allclose(problem.train(optimizer), expected, rtol=1e-9, atol=1e-11)


def test_an_array_a_sequence_and_a_mapping_give_the_same_run():
    curvature, results = np.geomspace(0.1, 4, 9), []
    for wrap in (lambda x: x, lambda x: [x], lambda x: (x,), lambda x: {"x": x}):
        x = np.linspace(1, 2, 9)
        optimizer = MLBFGS(wrap(x), 0.05, **FAST)
        for _ in range(12):
            optimizer.step(wrap(curvature * x))
        results.append(x)
        assert type(optimizer.params) is (list if isinstance(wrap(x), tuple) else type(wrap(x)))
    assert all(np.array_equal(x, results[0]) for x in results)


def fortran(x):
    """A copy with the first axis innermost."""
    return x.copy(order="F")


def every_second(x):
    """A view of every second value of a larger array."""
    around = np.full((*(2 * n for n in x.shape), 2), 7, x.dtype)
    view = around[(*(slice(None, None, 2) for _ in x.shape), 0, ...)]
    view[...] = x
    return view


def backwards(x):
    """A view with negative strides."""
    turn = (*(slice(None, None, -1) for _ in x.shape), ...)
    return x[turn].copy()[turn]


@pytest.mark.parametrize("lay", [fortran, every_second, backwards])
@pytest.mark.parametrize("small", [0, 2**16])
def test_parameters_of_any_strides_are_updated_in_place(monkeypatch, lay, small):
    monkeypatch.setattr(Host, "small", small)
    problem = Problem()
    params = problem.params(lay)
    expected = problem.train(MLBFGS(problem.params(), 0.05, weight_decay=0.1, **FAST))
    around = {name: x.base.copy() for name, x in params.items() if lay is every_second}
    optimizer = MLBFGS(dict(params), 0.05, weight_decay=0.1, **FAST)
    problem.train(optimizer)
    assert all(optimizer.params[name] is x for name, x in params.items())
    np.testing.assert_allclose(flat(params), expected, rtol=1e-9, atol=1e-11)
    for name, before in around.items():
        changed = params[name].base != before
        assert changed.sum() == params[name].size


@pytest.mark.parametrize("lay", [fortran, every_second, backwards])
def test_gradients_of_any_strides_are_read_right_and_not_written_to(lay):
    problem = Problem()
    expected = problem.train(MLBFGS(problem.params(), 0.05, maximize=True, **FAST), stop=10)
    optimizer = MLBFGS(problem.params(), 0.05, maximize=True, **FAST)
    for step in range(10):
        grads = {n: lay(g) for n, g in problem.grads(step, optimizer.params).items()}
        before = {name: grad.copy() for name, grad in grads.items()}
        for grad in grads.values():
            grad.flags.writeable = False
        optimizer.step(grads)
        assert all(np.array_equal(grads[name], grad) for name, grad in before.items())
    assert np.array_equal(flat(optimizer.params), expected)


@pytest.mark.parametrize("blocks", ["all", "parameter"])
@pytest.mark.parametrize("name", SETTINGS)
def test_small_parameters_side_by_side_give_the_same_trajectory(monkeypatch, blocks, name):
    def run():
        problem = Problem()
        optimizer = MLBFGS(problem.params(), 0.05, blocks=blocks, **SETTINGS[name])
        return problem.train(optimizer), len(optimizer.units[0].groups)

    together, few = run()
    monkeypatch.setattr(Host, "small", -1)
    apart, many = run()
    assert (few, many) == ((1, 4) if blocks == "all" else (4, 4))
    np.testing.assert_allclose(together, apart, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    rng = np.random.default_rng(0)
    x, grad = rng.normal(size=1000).astype(dtype), (0.01 * rng.normal(size=1000)).astype(dtype)
    lr, decay = 0.3, 0.2
    wide, step = x.astype("float32"), grad.astype("float32")
    once = (wide * np.float32(1 - lr * decay) - step * np.float32(lr)).astype(dtype)
    twice = (wide * np.float32(1 - lr * decay)).astype(dtype).astype("float32") - step * np.float32(lr)
    optimizer = MLBFGS(x, lr, 0.0, decay, preset="formulas")  # whose first direction is the gradient
    optimizer.step(grad)
    assert np.array_equal(x, once)
    assert not np.array_equal(x, twice.astype(dtype))
    assert optimizer.state_dict()["mean_params/param0"].dtype == np.float32


def test_half_precision_takes_gradients_in_float32():
    x = np.ones(3, dtype="float16")
    MLBFGS(x, 0.5).step(np.asarray([3, 0, 4], dtype="float32"))
    assert x[1] == 1
    assert x.dtype == "float16"


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("lay", [np.copy, every_second, fortran])
def test_complex_parameters_are_pairs_of_reals(dtype, lay):
    rng = np.random.default_rng(0)
    real = np.dtype(dtype).char.lower()
    starts = [rng.normal(size=(*shape, 2)).astype(real) for shape in ((3, 4), (), (0, 2), (5,))]
    as_complex = [lay(np.ascontiguousarray(x).view(dtype)[..., 0]) for x in starts]
    as_real = [x.copy() for x in starts]
    complex_run, real_run = MLBFGS(as_complex, 0.05, **FAST), MLBFGS(as_real, 0.05, **FAST)
    for step in range(14):
        complex_run.step([(step % 3 + 1) * x for x in as_complex])
        real_run.step([(step % 3 + 1) * x for x in as_real])
    for one, other in zip(as_complex, as_real, strict=True):
        bound = 1e3 * np.finfo(real).eps
        np.testing.assert_allclose(np.stack([one.real, one.imag], axis=-1), other, rtol=bound, atol=bound)
        assert one.dtype == dtype
    assert complex_run.state_dict()["history/param0"].shape == (2, 4, 3, 4, 2)


def test_several_dtypes_share_a_block():
    rng = np.random.default_rng(0)
    start, curvature = rng.normal(size=(3, 5)), np.geomspace(0.1, 3, 15).reshape(3, 5)
    dtypes = ("float64", "float32", "float16")

    def rounded(x):
        return [part.astype(dtype) for part, dtype in zip(x.reshape(3, 5), dtypes, strict=True)]

    def grads(params):
        return [(c * x).astype(x.dtype) for c, x in zip(curvature, params, strict=True)]

    params = rounded(start)
    optimizer = MLBFGS(params, 0.05, **FAST)
    twin, x, velocity = Reference(core.Config(**FAST), [15]), flat(params).astype(float), np.zeros(15)
    for _ in range(10):
        optimizer.step(grads(params))
        (direction,) = twin.step([x], [flat(grads(rounded(x))).astype(float)])
        velocity = 0.9 * velocity + direction
        x = flat(rounded(x - 0.05 * (direction + 0.9 * velocity))).astype(float)
    np.testing.assert_allclose(flat(params), x, atol=2 * np.finfo("float16").eps)
    assert optimizer.diagnostics()[0].pairs.shape == (1,)
    memory = optimizer.state_dict()
    assert [memory[f"history/param{i}"].dtype for i in range(3)] == ["float64", "float32", "float32"]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 6, 7])
@pytest.mark.parametrize("name", ["default", "every step", "lbfgs"])
def test_a_non_finite_gradient_changes_nothing_but_a_count_and_the_run_is_that_without_it(poison, at, name):
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, 0.9, 0.1, nesterov=True, **SETTINGS[name])
    for step in range(12):
        grads = problem.grads(step, optimizer.params)
        if step == at:
            grads["hidden.bias"][2] = poison
            before = contents(optimizer, VERDICT)
            with np.errstate(all="raise"):
                optimizer.step(grads)
            assert contents(optimizer, VERDICT) == before
            assert optimizer.diagnostics()[0].skipped == 1
        else:
            optimizer.step(grads)
    expected = follow(core.Config(**SETTINGS[name]), problem, 12, 0.05, 0.9, 0.1, skip=(at,))
    np.testing.assert_allclose(flat(optimizer.params), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_parameter_stays_and_does_not_spoil_the_others(name, bad):
    problem = Problem()
    params = problem.params()
    params["hidden.weight"][1, 2] = bad
    problem.start["hidden.weight"][1, 2] = 0  # the twin's is zero, has no gradient, and so stays

    def grads(step, values):
        result = Problem.grads(problem, step, values)
        result["hidden.weight"][1, 2] = 0
        return result

    problem.grads = grads
    expected = problem.train(MLBFGS(problem.params(), 0.05, weight_decay=0.1, **SETTINGS[name]))
    optimizer = MLBFGS(params, 0.05, weight_decay=0.1, **SETTINGS[name])
    result = problem.train(optimizer)
    np.testing.assert_array_equal(params["hidden.weight"][1, 2], bad)
    np.testing.assert_allclose(np.delete(result, 6), np.delete(expected, 6), rtol=1e-9, atol=1e-11)
    assert optimizer.diagnostics()[0].pairs[0] > 0 or not optimizer.config.takes_pairs


def test_a_parameter_without_a_gradient_keeps_still_and_the_others_go_their_way():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, weight_decay=0.1, **FAST)
    twin = MLBFGS(
        {name: problem.params()[name] for name in ("hidden.weight", "scale")}, 0.05, weight_decay=0.1, **FAST
    )
    for step in range(12):
        grads = problem.grads(step, optimizer.params)
        twin.step({name: grads[name] for name in twin.params})
        optimizer.step({**grads, "hidden.bias": None, "none": None})
    assert np.array_equal(optimizer.params["hidden.bias"], problem.start["hidden.bias"])
    for name, x in twin.params.items():
        np.testing.assert_allclose(optimizer.params[name], x, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("absent", list(SHAPES))
@pytest.mark.parametrize("blocks", ["all", "layer"])
def test_a_gradient_that_comes_and_goes_parts_a_leaf_once_and_loses_nothing(monkeypatch, absent, blocks):
    def run():
        problem = Problem()
        optimizer, groups = MLBFGS(problem.params(), 0.05, 0.9, 0.1, blocks=blocks, **FAST), []
        for step in range(24):
            grads = problem.grads(step, optimizer.params)
            missing = {3: absent, 8: absent, 11: "scale", 12: "hidden.bias", 15: absent}.get(step)
            before = optimizer.params[missing].copy() if missing else None
            memory = optimizer.state_dict()
            optimizer.step({**grads, missing: None} if missing else grads)
            if missing:
                assert np.array_equal(optimizer.params[missing], before)
                for name in (f"momentum_buffer/{missing}", f"exp_avg_sq/{missing}"):
                    assert np.array_equal(optimizer.state_dict()[name], memory[name])
            groups.append(len(optimizer.units[0].groups))
        return flat(optimizer.params), groups

    together, groups = run()
    monkeypatch.setattr(Host, "small", -1)
    apart, _ = run()
    assert groups[3] == groups[10] == groups[2] + 1
    np.testing.assert_allclose(together, apart, rtol=1e-8, atol=1e-10)


def test_a_step_without_any_gradient_is_none():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), weight_decay=0.1, **FAST)
    problem.train(optimizer, stop=5)
    before = contents(optimizer)
    optimizer.step(dict.fromkeys(SHAPES))
    assert contents(optimizer) == before
    single = np.ones(3)
    MLBFGS(single).step(None)
    assert np.array_equal(single, np.ones(3))


def test_schedules_assign_the_numbers_between_steps():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), **FAST)

    def rate(step):
        return 0.05 * (1 + np.cos(np.pi * step / 12)) / 2

    for step in range(12):
        optimizer.lr = rate(step)
        optimizer.step(problem.grads(step, optimizer.params))
    expected = follow(core.Config(**FAST), problem, 12, rate, 0.9, 0.0)
    np.testing.assert_allclose(flat(optimizer.params), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.asarray], ids=repr)
def test_numbers_of_numpy_are_numbers(kind):
    results = []
    for made in (float, kind):
        problem = Problem()
        optimizer = MLBFGS(problem.params(), made(0.0625), made(0.5), made(0.25), beta=made(0.75))
        optimizer.lr, optimizer.momentum, optimizer.weight_decay = made(0.125), made(0.75), made(0.5)
        assert {type(optimizer.momentum), type(optimizer.weight_decay), type(optimizer.config.beta)} == {
            float
        }
        results.append(problem.train(optimizer, stop=8))
    assert np.array_equal(*results)


def test_whole_numbers_of_numpy_are_numbers():
    optimizer = MLBFGS(np.ones(2), np.int64(1), np.uint8(0), np.asarray(0), history_size=np.int32(2))
    assert (optimizer.lr, optimizer.momentum, optimizer.weight_decay) == (1, 0, 0)
    assert optimizer.state_dict()["history/param0"].shape == (2, 2, 2)


def test_a_learning_rate_may_be_a_0d_array_that_changes():
    problem, rate = Problem(), np.asarray(0.0)
    optimizer = MLBFGS(problem.params(), rate, **FAST)
    assert optimizer.lr is rate
    for step in range(12):
        rate[...] = 0.01 * step
        optimizer.step(problem.grads(step, optimizer.params))
    expected = follow(core.Config(**FAST), problem, 12, lambda step: 0.01 * step, 0.9, 0.0)
    np.testing.assert_allclose(flat(optimizer.params), expected, rtol=1e-8, atol=1e-10)


def test_a_step_with_a_rate_of_zero_is_a_normal_step():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.0, weight_decay=0.1, **FAST)
    problem.train(optimizer, stop=4)
    assert np.array_equal(flat(optimizer.params), flat(problem.start))
    assert optimizer.diagnostics()[0].step == 4
    assert optimizer.state_dict()["momentum_buffer/hidden.weight"].any()


def test_momentum_is_allocated_once_it_is_not_zero():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, 0.0, **FAST)
    problem.train(optimizer, stop=6)
    assert "momentum_buffer/scale" not in optimizer.state_dict()
    optimizer.momentum = 0.5
    assert not optimizer.state_dict()["momentum_buffer/scale"].any()
    problem.train(optimizer, 6)
    twin, x, velocity = Reference(core.Config(**FAST), [DIM]), flat(problem.start), np.zeros(DIM)
    for step in range(24):
        (direction,) = twin.step([x], [flat(problem.curvature) * x + flat(problem.noise[step])])
        velocity = direction + (0.5 * velocity if step > 6 else 0)
        x = x - 0.05 * (direction + (0.5 * velocity if step >= 6 else 0))
    np.testing.assert_allclose(flat(optimizer.params), x, rtol=1e-8, atol=1e-10)


def test_nesterov_may_be_changed_between_steps():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, 0.9, nesterov=False, **FAST)
    problem.train(optimizer, stop=6)
    optimizer.nesterov = True
    problem.train(optimizer, 6)
    twin, x, velocity = Reference(core.Config(**FAST), [DIM]), flat(problem.start), np.zeros(DIM)
    for step in range(24):
        (direction,) = twin.step([x], [flat(problem.curvature) * x + flat(problem.noise[step])])
        velocity = 0.9 * velocity + direction
        x = x - 0.05 * (velocity if step < 6 else direction + 0.9 * velocity)
    np.testing.assert_allclose(flat(optimizer.params), x, rtol=1e-8, atol=1e-10)


def test_maximize_climbs_as_minimizing_the_negative_descends():
    results = []
    for sign, maximize in ((1.0, False), (-1.0, True)):
        problem = Problem()
        optimizer = MLBFGS(problem.params(), 0.05, maximize=maximize, **FAST)
        for step in range(12):
            optimizer.step({n: sign * g for n, g in problem.grads(step, optimizer.params).items()})
        results.append(flat(optimizer.params))
    assert np.array_equal(*results)


def test_new_settings_hold_from_the_next_step_on():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, adaptive=False, update_every=1000)
    problem.train(optimizer, stop=6)
    optimizer.config = core.Config(adaptive=False, update_every=3)
    problem.train(optimizer, 6, 7)
    assert optimizer.diagnostics()[0].window == 0
    assert optimizer.config.update_every == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"history_size": 0}, "history_size at 5, .*, got 0"),
        ({"history_size": 3}, "history_size at 5, .*, got 3"),
        ({"history_dtype": "float32"}, "history_dtype at float64, .*, got float32"),
        ({"preconditioner": "none"}, "preconditioner at diagonal, .*, got none"),
    ],
)
def test_settings_that_would_change_the_shapes_are_refused(settings, words):
    optimizer = MLBFGS(np.ones(3))
    with pytest.raises(ValueError, match="`config` must keep " + words):
        optimizer.config = core.Config(**settings)
    assert optimizer.config == core.Config()
    optimizer.config = core.Config(history_dtype="float64")


@pytest.mark.parametrize(
    ("blocks", "count"), [("all", 1), ("layer", 2), ("parameter", 4), (lambda name: "bias" in name, 2)]
)
def test_blocks_partition_named_parameters(blocks, count):
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, blocks=blocks, **FAST)
    problem.train(optimizer, stop=8)
    (record,) = optimizer.diagnostics()
    assert record.pairs.shape == (count,)
    assert (np.delete(record.pairs, 3) if count == 4 else record.pairs).all()


def saved(optimizer, path):
    """A state as NumPy stores and loads it, without pickle."""
    np.savez(path, **optimizer.state_dict())
    return np.load(path, allow_pickle=False)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("lay", [np.copy, fortran, every_second])
def test_a_state_goes_through_a_file_and_the_run_continues_bit_for_bit(tmp_path, name, lay):
    problem = Problem(dtype="float32")
    optimizer = MLBFGS(problem.params(lay), 0.05, weight_decay=0.1, **SETTINGS[name])
    for step in range(11):
        grads = problem.grads(step, optimizer.params)
        optimizer.step(
            {n: None if (step, n) in ((3, "scale"), (5, "hidden.bias")) else g for n, g in grads.items()}
        )
    loaded = saved(optimizer, tmp_path / "state.npz")
    shapes = ("history_size", "preset", "preconditioner")
    fixed = {key: value for key, value in SETTINGS[name].items() if key in shapes}
    resumed = MLBFGS(problem.params(lay), 1.0, 0.5, 0.7, nesterov=not optimizer.nesterov, **fixed)
    problem.train(resumed, stop=3)
    for param, kept in zip(resumed.params.values(), optimizer.params.values(), strict=True):
        param[...] = kept
    resumed.load_state_dict(loaded)
    assert (resumed.lr, resumed.momentum, resumed.weight_decay) == (0.05, optimizer.momentum, 0.1)
    assert resumed.nesterov is optimizer.nesterov
    assert resumed.config == optimizer.config
    assert contents(resumed) == contents(optimizer)
    assert np.array_equal(problem.train(resumed, 11), problem.train(optimizer, 11))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_goes_through_a_checkpoint_and_continues_bit_for_bit(tmp_path, name):
    problem = Problem(dtype="float32")
    optimizer, resumed = (MLBFGS(problem.params(), 0.05, 0.9, 0.1, **SETTINGS[name]) for _ in range(2))
    problem.train(optimizer, stop=11)
    optimizer.save_state(tmp_path / "run")
    resumed.load_state(tmp_path / "run")
    assert contents(resumed) == contents(optimizer)
    assert np.array_equal(problem.train(resumed, 11), problem.train(optimizer, 11))


def test_a_state_dict_keeps_the_settings_that_its_preset_had_when_it_was_saved():
    as_before = {"beta": 0.9, "damping": (0.01, 10.0, 0.9), "step_length": "none"}
    optimizer = MLBFGS(np.ones(3), preset="paper", **as_before)
    resumed = MLBFGS(np.ones(3), preset="paper")
    resumed.load_state_dict(optimizer.state_dict())
    assert {name: getattr(resumed.config, name) for name in as_before} == as_before


def as_once(state):
    """A state dict as versions before the settings `preconditioner...` wrote it."""
    settings = json.loads(state["settings"])
    power = {"none": 0.0, "diagonal": settings.pop("preconditioner_power")}[settings.pop("preconditioner")]
    settings |= {"preset": None, "metric_power": power, "metric_beta": settings.pop("preconditioner_beta")}
    names = {"exp_avg_sq": "moment", "unit0/middle_matrix": "unit0/operator"}
    result = {}
    for name, value in state.items():
        field, slash, param = name.partition("/")
        result[names.get(name, names.get(field, field) + slash + param)] = value
    return {**result, "settings": json.dumps(settings)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preconditioner_power": 0.3, "preconditioner_beta": 0.9},
        {"preconditioner": "none"},
        {"preset": "paper", "update_every": 4},
    ],
)
def test_a_state_dict_of_an_older_version_is_continued_bit_for_bit(settings):
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, **settings)
    problem.train(optimizer, stop=11)
    state = as_once(optimizer.state_dict())
    assert ("moment/scale" in state) == (optimizer.config.preconditioner == "diagonal")
    fixed = {key: settings[key] for key in ("preset", "preconditioner") if key in settings}
    resumed = MLBFGS(copy.deepcopy(optimizer.params), 1.0, **fixed)
    resumed.load_state_dict(state)
    assert resumed.config == optimizer.config
    assert contents(resumed) == contents(optimizer)
    assert np.array_equal(problem.train(resumed, 11), problem.train(optimizer, 11))


def test_a_parameter_may_be_called_as_an_array_once_was():
    optimizer, other = (MLBFGS({"operator": np.ones(3), "moment": np.ones(2)}) for _ in range(2))
    optimizer.step(optimizer.params)
    other.load_state_dict(optimizer.state_dict())
    params = ("param/operator", "param/moment")
    assert contents(other, params) == contents(optimizer, params)


@pytest.mark.parametrize("preconditioner", ["none", "diagonal"])
@pytest.mark.parametrize("blocks", ["all", "parameter"])
def test_without_pairs_it_is_the_base_optimizer_with_steps_of_one_length(preconditioner, blocks):
    problem = Problem()
    settings = {"history_size": 0, "preconditioner": preconditioner, "blocks": blocks}
    optimizer = MLBFGS(problem.params(), 0.05, 0.9, 0.1, nesterov=False, **settings)
    x, v, velocity = flat(problem.start), np.zeros(DIM), np.zeros(DIM)
    for step in range(24):
        grad = flat(problem.curvature) * x + flat(problem.noise[step])
        v = 0.99 * v + 0.01 * grad**2
        direction = grad / np.sqrt(v / (1 - 0.99 ** (step + 1))) if preconditioner == "diagonal" else grad
        velocity = 0.9 * velocity + direction / np.sqrt(np.mean(direction**2))
        x = x * (1 - 0.05 * 0.1) - 0.05 * velocity
    np.testing.assert_allclose(problem.train(optimizer), x, rtol=1e-10, atol=1e-12)
    assert not any(name.startswith(("history", "mean", "prev")) for name in optimizer.state_dict())


def test_a_state_dict_is_a_copy():
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, **FAST)
    problem.train(optimizer, stop=6)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    problem.train(optimizer, 6)
    assert all(np.array_equal(value, before[name]) for name, value in state.items())
    assert {type(value) for value in state.values()} == {np.ndarray, str, float}


@pytest.mark.parametrize("small", [-1, 2**16])
def test_a_loaded_state_is_a_copy(monkeypatch, small):
    monkeypatch.setattr(Host, "small", small)
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, **FAST)
    problem.train(optimizer, stop=6)
    state = optimizer.state_dict()
    resumed = MLBFGS(copy.deepcopy(optimizer.params), 0.05, **FAST)
    resumed.load_state_dict(state)
    for value in state.values():
        if isinstance(value, np.ndarray):
            value[...] = 0
    assert np.array_equal(problem.train(resumed, 6), problem.train(optimizer, 6))


def changed(**entries):
    return lambda state: {**state, **entries}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda state: {k: v for k, v in state.items() if k != "history/scale"},
            "must hold 'history/scale', got no",
        ),
        (lambda state: {k: v for k, v in state.items() if k != "settings"}, "must hold 'settings', got no"),
        (lambda state: {k: v for k, v in state.items() if k != "momentum"}, "must hold 'momentum', got no"),
        (lambda state: {k: v for k, v in state.items() if k != "nesterov"}, "must hold 'nesterov', got no"),
        (changed(nesterov=0.5), "must hold 0 or 1 as 'nesterov', got 0.5"),
        (changed(**{"history/other": np.ones(3)}), "must not hold 'history/other'"),
        (
            changed(**{"exp_avg_sq/scale": np.ones(3)}),
            r"'exp_avg_sq/scale' of the shape \(\) and the dtype float64, got \(3,\)",
        ),
        (changed(**{"mean_grads/scale": np.float32(0)}), r"got \(\) and float32"),
        (changed(**{"unit0/gram": 3.0}), "must hold an array as 'unit0/gram', got float"),
        (changed(**{"unit0/blocks": '[["scale"]]'}), "must be of the blocks"),
        (changed(**{"unit0/leaves": '[["scale"]]'}), "must hold each parameter once"),
        (
            changed(**{"unit0/leaves": '[["scale", "hidden.weight"], ["hidden.bias", "none"]]'}),
            "beside others of its block",
        ),
        (changed(**{"unit0/leaves": "[3]"}), "must hold lists of names as 'unit0/leaves'"),
        (changed(settings="{"), "must hold valid 'settings', got '{'"),
        (changed(settings='{"beta": 3}'), "must hold valid 'settings'"),
        (changed(settings=json.dumps({"history_size": 3})), "must keep history_size at 4"),
        (changed(lr=-1.0), "`lr` must be finite and >= 0, got -1.0"),
    ],
)
def test_a_refused_state_changes_nothing(damage, words):
    problem = Problem()
    optimizer = MLBFGS(problem.params(), 0.05, blocks="layer", **FAST)
    problem.train(optimizer, stop=6)
    state = optimizer.state_dict()
    problem.train(optimizer, 6, 9)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(damage(state))
    assert contents(optimizer) == before
    problem.train(optimizer, 9)


def test_a_state_without_momentum_is_refused_only_where_momentum_is_asked_for():
    optimizer = MLBFGS(np.ones(3), momentum=0.0)
    state = optimizer.state_dict()
    MLBFGS(np.ones(3)).load_state_dict(state)
    with pytest.raises(ValueError, match=r"must hold buffers for a momentum of 0\.9, got none"):
        optimizer.load_state_dict({**state, "momentum": 0.9})
    with pytest.raises(TypeError, match="`state_dict` must be a mapping, got list"):
        optimizer.load_state_dict([])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("lay", [np.copy, fortran])
def test_copies_are_independent_and_continue_like_the_original(duplicate, lay, nesterov):
    problem = Problem(dtype="float32")
    apart = {"blocks": lambda name: name == "scale"}
    optimizer = MLBFGS(problem.params(lay), 0.05, nesterov=nesterov, **apart, **FAST)
    problem.train(optimizer, stop=9)
    params, twin = duplicate((optimizer.params, optimizer))
    before = contents(twin)
    expected = problem.train(optimizer, 9)
    assert contents(twin) == before
    assert all(twin.params[name] is x for name, x in params.items())
    assert np.array_equal(problem.train(twin, 9), expected)


def test_a_unit_gives_and_takes_its_content_in_the_order_of_axes():
    problem = Problem()
    units = []
    for lay in (np.copy, fortran):
        optimizer = MLBFGS(problem.params(lay), 0.05, blocks="layer", **FAST)
        problem.train(optimizer, stop=9)
        units += optimizer.units
    (one, one_momentum), (other, other_momentum) = (unit.export() for unit in units)
    assert units[0].names == tuple(SHAPES)
    assert units[0].blocks == ((0, 1), (2, 3))
    assert [x.shape for x in one.mean_params] == list(SHAPES.values())
    for name, arrays in adapter.leaf_arrays(one).items():
        for a, b in zip(arrays, adapter.leaf_arrays(other)[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(flat(one_momentum), flat(other_momentum), rtol=1e-9, atol=1e-11)
    third = MLBFGS(problem.params(every_second), 0.05, blocks="layer", **FAST)
    third.units[0].restore(one, one_momentum)
    state, momentum = third.units[0].export()
    assert all(np.array_equal(a, b) for a, b in zip(state.history, one.history, strict=True))
    assert np.array_equal(flat(momentum), flat(one_momentum))
    assert not np.shares_memory(state.history[0], one.history[0])


@pytest.mark.parametrize("stop", range(6, 12))
def test_a_unit_continues_from_what_it_takes(stop):
    problem = Problem()
    optimizer, other = (MLBFGS(problem.params(), 0.05, blocks="layer", **FAST) for _ in range(2))
    problem.train(optimizer, stop=stop)
    problem.train(other, stop=3)
    for name, x in other.params.items():
        x[...] = optimizer.params[name]
    other.units[0].restore(*optimizer.units[0].export())
    assert np.array_equal(problem.train(other, stop), problem.train(optimizer, stop))


@pytest.mark.parametrize("blocks", ["all", "parameter"])
@pytest.mark.parametrize("history_size", [0, 5])
@pytest.mark.parametrize("preconditioner", ["none", "diagonal"])
def test_memory_is_what_was_planned(history_size, preconditioner, blocks):
    params = Problem(dtype="float32").params()
    settings = {"history_size": history_size, "preconditioner": preconditioner}
    state = MLBFGS(params, momentum=0.0, blocks=blocks, **settings).state_dict()
    partition = core.partition(list(params), blocks)
    plan = core.plan_memory(core.Config(**settings), list(params.values()), partition)
    assert sum(value.nbytes for value in state.values() if isinstance(value, np.ndarray)) == plan.total


def test_the_package_needs_no_cupy():
    code = "import sys, numpy as np, mlbfgs_arrays as m; m.MLBFGS(np.ones(2)).step(np.ones(2))"
    subprocess.run([sys.executable, "-c", f"{code}; assert 'cupy' not in sys.modules"], check=True)


def test_its_representation_tells_size_place_and_what_is_not_usual():
    optimizer = MLBFGS([np.ones(3), np.ones((2, 1000))], 0.2, preset="fit", history_size=5)
    assert repr(optimizer) == (
        "MLBFGS(2,003 values on the host; lr=0.2, momentum=0.0, weight_decay=0.0, "
        "update_every=21, min_cosine=0.3, shrinkage=1.0, step_length=clip, preconditioner=none)"
    )


def read_only(x):
    x.flags.writeable = False
    return x


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "`params` must hold at least one array, got none"),
        ({}, ValueError, "at least one array, got none"),
        (3.0, TypeError, "must be a NumPy or CuPy array, a sequence or a mapping of such arrays, got float"),
        ("abc", TypeError, "got str"),
        (array_api_strict.ones(3), TypeError, "got Array"),
        ([array_api_strict.ones(3)], TypeError, "must be NumPy or CuPy arrays, got Array for 'param0'"),
        ({"w": [1.0]}, TypeError, "got list for 'w'"),
        ({"w": np.float64(1)}, TypeError, "got float64 for 'w'"),
        ({"w": np.ones(3, dtype=int)}, TypeError, "must be of one of the dtypes .*, got int64 for 'w'"),
        ({"w": np.ones(3, dtype=">f8")}, TypeError, "got >f8 for 'w'"),
        ({1: np.ones(3)}, TypeError, "must have strings as names, got 1"),
        ({"w": read_only(np.ones(3))}, ValueError, "updated in place, got a read-only array for 'w'"),
        (
            np.lib.stride_tricks.as_strided(np.ones(3), (4, 3), (0, 8)),
            ValueError,
            "got 'param0', which overlaps itself",
        ),
        ([np.ones(3)] * 2, ValueError, "must not share memory, got 'param0' and 'param1'"),
    ],
)
def test_bad_parameters_are_refused(params, error, words):
    with pytest.raises(error, match=words):
        MLBFGS(params)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "`lr` must be finite and >= 0, got -1.0"),
        ({"lr": np.float32(-1)}, ValueError, "`lr` must be finite and >= 0, got -1.0"),
        ({"lr": np.asarray(np.nan)}, ValueError, "`lr`"),
        ({"lr": "0.1"}, TypeError, "`lr` must be a number, got '0.1'"),
        ({"lr": True}, TypeError, "`lr` must be a number, got True"),
        ({"lr": np.ones(1)}, TypeError, r"`lr` must be a number, got an array of shape \(1,\)"),
        ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"lr": np.asarray(-1.0)}, ValueError, "`lr` must be finite and >= 0, got -1.0"),
        ({"lr": np.asarray(True)}, TypeError, r"`lr` must be a number, got an array of shape \(\)"),
        ({"lr": np.complex64(1)}, TypeError, "`lr` must be a number, got"),
        ({"lr": array_api_strict.asarray(0.1)}, TypeError, "`lr` must be a number, got array_api_strict"),
        ({"momentum": np.asarray([0.5])}, TypeError, "`momentum` must be a number, got an array"),
        ({"momentum": np.float32(1)}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"weight_decay": np.asarray(-1)}, ValueError, "`weight_decay` must be finite and >= 0, got -1"),
        ({"weight_decay": -0.1}, ValueError, "`weight_decay` must be finite and >= 0, got -0.1"),
        ({"maximize": 1}, TypeError, "`maximize` must be a bool, got 1"),
        ({"nesterov": 1}, TypeError, "`nesterov` must be a bool, got 1"),
        ({"shrinkage": 1.5}, ValueError, r"`shrinkage` must be in \[0, 1\], got 1.5"),
        ({"history_size": -1}, ValueError, "`history_size` must be >= 0, got -1"),
        ({"metric_power": 0.5}, TypeError, "`metric_power`; it is now `preconditioner_power`"),
        ({"history_dtype": "bfloat16"}, ValueError, "`history_dtype`"),
        ({"preset": "best"}, ValueError, "`preset`"),
        ({"eps": 1e-8}, TypeError, "unknown setting `eps`; leave it out"),
        ({"learning_rate": 0.1}, TypeError, "unknown setting `learning_rate`; `lr` is its name here"),
        ({"blocks": "layer"}, ValueError, "`blocks`='layer' needs names with dots"),
    ],
)
def test_bad_settings_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        MLBFGS(np.ones(2), **arguments)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_a_bad_number_is_refused_when_it_is_assigned(name):
    optimizer = MLBFGS(np.ones(2))
    before = getattr(optimizer, name)
    with pytest.raises(ValueError, match=f"`{name}` must be .*, got -1.0"):
        setattr(optimizer, name, -1.0)
    assert getattr(optimizer, name) == before
    with pytest.raises(TypeError, match="`config` must be a Config, got dict"):
        optimizer.config = {}
    with pytest.raises(TypeError, match="`nesterov` must be a bool, got 'yes'"):
        optimizer.nesterov = "yes"
    assert optimizer.nesterov is True


@pytest.mark.parametrize(
    ("grads", "error", "words"),
    [
        ([np.ones(2)], TypeError, "`grads` must be a mapping with the parameters' names, got list"),
        (np.ones(2), TypeError, "got ndarray"),
        ({"a": np.ones(2)}, ValueError, "a gradient or None for every parameter, got none for 'b'"),
        ({"a": None, "b": None, "c": None}, ValueError, "must hold the parameters' names only, got 'c'"),
        ({"a": np.ones(2), "b": np.ones(4)}, ValueError, r"the shape \(3,\) for 'b', got \(4,\)"),
        ({"a": np.ones(2), "b": np.ones(3, "float32")}, TypeError, "dtype float64 for 'b', got float32"),
        ({"a": np.ones(2), "b": np.ones(3, complex)}, TypeError, "dtype float64 for 'b', got complex128"),
        (
            {"a": np.ones(2), "b": [1.0, 1.0, 1.0]},
            TypeError,
            "a NumPy array or None for 'b', got builtins.list",
        ),
        (
            {"a": np.ones(2), "b": array_api_strict.ones(3)},
            TypeError,
            "a NumPy array or None for 'b', got array_api",
        ),
    ],
)
def test_bad_gradients_are_refused_before_anything_changes(grads, error, words):
    params = {"a": np.ones(2), "b": np.ones(3)}
    optimizer = MLBFGS(params)
    optimizer.step({"a": np.ones(2), "b": np.ones(3)})
    before = contents(optimizer)
    with pytest.raises(error, match=words):
        optimizer.step(grads)
    assert contents(optimizer) == before


@pytest.mark.parametrize(
    ("grads", "words"),
    [
        ([np.ones(2)], "must be a sequence of 2, one for each parameter, got 1"),
        (np.ones((2, 2)), "must be a sequence of 2, one for each parameter, got ndarray"),
        ({"param0": np.ones(2)}, "must be a sequence of 2, one for each parameter, got dict"),
        (None, "must be a sequence of 2, one for each parameter, got NoneType"),
    ],
)
def test_gradients_in_a_sequence_are_counted(grads, words):
    with pytest.raises((TypeError, ValueError), match="`grads` " + words):
        MLBFGS([np.ones(2), np.ones(2)]).step(grads)


def test_gradients_that_are_never_finite_are_told_once():
    params = {"x": np.ones(3)}
    optimizer = MLBFGS(params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            optimizer.step({"x": np.full(3, np.nan)})
        assert len(caught) == 1
        for _ in range(40):
            optimizer.step({"x": np.full(3, np.nan)})
    (warning,) = caught
    assert str(warning.message).startswith("MLBFGS has refused the last 20 gradients")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("form", [dict, list])
def test_an_array_put_in_the_place_of_a_parameter_is_refused(form):
    arrays = {"x": np.ones(3), "y": np.ones(2)}
    params = arrays if form is dict else list(arrays.values())
    key, grads = ("y", dict(arrays)) if form is dict else (1, list(arrays.values()))
    optimizer = MLBFGS(params)
    optimizer.step(copy.deepcopy(grads))
    old, params[key] = params[key], np.zeros(2)
    before = arrays["x"].copy()
    with pytest.raises(ValueError, match=r"`params` must keep the arrays that were given \(write to one: "):
        optimizer.step(copy.deepcopy(grads))
    np.testing.assert_array_equal(arrays["x"], before)
    params[key] = old
    optimizer.step(copy.deepcopy(grads))
    assert copy.deepcopy(optimizer).params is not None


def test_a_mapping_that_makes_a_new_array_each_time_is_taken_as_it_was(tmp_path):
    np.savez(tmp_path / "file.npz", w=np.ones(3))
    with np.load(tmp_path / "file.npz") as content:
        optimizer = MLBFGS(content, 0.1)
        optimizer.step({"w": np.ones(3)})
    assert optimizer.params["w"][0] < 1
