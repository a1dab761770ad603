"""The Kronecker preconditioner in `mlbfgs_arrays.MLBFGS`: as in the core with a leaf for each parameter."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest

import mlbfgs_core as core
from mlbfgs_arrays import MLBFGS, cuda
from mlbfgs_arrays.backends import Host
from mlbfgs_arrays.cuda import CupyKernels
from mlbfgs_core import adapter
from mlbfgs_scipy import minimize_mlbfgs
from tests.adapters.test_arrays import VERDICT, contents
from tests.adapters.test_arrays_kernels import COMPILER, CpuKernel

pytestmark = pytest.mark.backends("numpy")

STEPS, RATE = 22, 0.03
KRONECKER = {"preconditioner": "kronecker", "check_every": 2, "update_every": 7, "history_size": 4}
SETTINGS = {
    "adaptive": {},
    "fixed": {"adaptive": False},
    "no pairs": {"history_size": 0},
    "short sides": {"max_preconditioner_dim": 4},
    "other numbers": {"factor_beta": 0.9, "precondition_frequency": 3, "preconditioner_power": 0.7},
    "clip": {"step_length": "clip"},
}
SHAPES = {
    "first": (5, 4),
    "bias": (5,),
    "second": (5, 4),
    "row": (1, 6),
    "image": (5, 2, 2),
    "scale": (),
    "other": (4, 5),
    "none": (0, 3),
}
"""`first`, `second` and `image` have matrices of one shape, and lie side by side."""
IN_BASES = ("left_factor", "left_basis", "right_factor", "right_basis")


def noise(step, name, shape):
    return np.random.default_rng([step, *name.encode()]).normal(size=shape)


def start(shapes=SHAPES, dtype="float64"):
    return {name: noise(999, name, shape).astype(dtype) for name, shape in shapes.items()}


def gradient(step, name, x):
    """Of a quadratic whose curvature changes along the first axis, with noise that belongs to the step."""
    rows = x.shape[0] if x.ndim else 1
    curvature = np.reshape(np.geomspace(0.1, 5, max(rows, 1))[:rows], (-1,) + (1,) * (x.ndim - 1))
    noisy = 0.05 * noise(step, name, x.shape)
    if x.dtype.kind == "c":
        noisy = noisy + 0.05j * noise(step, name + "i", x.shape)
    return np.reshape(curvature * x, x.shape) + noisy


def grads(step, params):
    return {name: np.asarray(gradient(step, name, x)).astype(x.dtype) for name, x in params.items()}


def train(optimizer, first=0, last=STEPS, change=None):
    for step in range(first, last):
        given = grads(step, optimizer.params)
        optimizer.step(given if change is None else change(step, given))
    return optimizer


def fortran(x):
    return np.array(x, order="F")


def real(x):
    return np.stack([x.real, x.imag], axis=-1) if x.dtype.kind == "c" else x


def unreal(x, like):
    return x[..., 0] + 1j * x[..., 1] if like.dtype.kind == "c" else x


def follow(params, settings, change=None, matrices=None, steps=STEPS):
    """The core itself, with plain kernels, a leaf for each parameter, and every part at every step."""
    params = copy.deepcopy(params)
    method = core.Method(core.Config(**{**KRONECKER, **settings}), matrices=matrices)
    state = method.init([real(x) for x in params.values()])
    with np.errstate(all="ignore"):
        for step in range(steps):
            given = grads(step, params)
            given = given if change is None else change(step, given)
            own = [None if g is None else np.array(real(g), order="C") for g in given.values()]
            updates, state = method.step(state, [real(x) for x in params.values()], own)
            for (name, x), update in zip(list(params.items()), updates, strict=True):
                if update is not None:
                    params[name] = np.asarray(x - RATE * unreal(update, x))
    return params, state


@functools.cache
def known_run(name):
    return follow(start(), SETTINGS[name])


def optimizer_of(params, rate=RATE, momentum=0.0, **settings):
    return MLBFGS(params, rate, momentum, **{**KRONECKER, **settings})


def same(params, expected, atol=1e-11):
    for name, x in expected.items():
        np.testing.assert_allclose(params[name], x, rtol=0, atol=atol, err_msg=name)


def same_state(optimizer, state, atol=1e-9):
    own, _ = optimizer.units[0].export()
    for name, arrays in adapter.leaf_arrays(state).items():
        for mine, theirs in zip(adapter.leaf_arrays(own)[name], arrays, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                np.testing.assert_allclose(mine, theirs, rtol=0, atol=atol, err_msg=name)
    assert np.array_equal(own.pairs, state.pairs)


# Trajectories.


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("small", [-1, 2**16])
def test_a_run_is_that_of_the_core_with_a_leaf_for_each_parameter(monkeypatch, name, small):
    monkeypatch.setattr(Host, "small", small)
    expected, state = known_run(name)
    optimizer = train(optimizer_of(start(), **SETTINGS[name]))
    same(optimizer.params, expected)
    same_state(optimizer, state)
    assert state.pairs[0] > 1 or not optimizer.config.takes_pairs
    assert ((0, 2, 4) in optimizer.units[0].groups) == (small > 0)


@pytest.mark.parametrize("blocks", ["layer", "parameter"])
def test_blocks_have_matrices_of_their_own(blocks):
    named = start({"a.weight": (4, 3), "a.bias": (4,), "b.weight": (4, 3)})
    optimizer = train(optimizer_of(copy.deepcopy(named), blocks=blocks))
    method = core.Method(optimizer.config, core.partition(list(named), blocks))
    state, params = method.init(list(named.values())), named
    for step in range(STEPS):
        given = grads(step, params)
        updates, state = method.step(state, list(params.values()), list(given.values()))
        params = {n: x - RATE * u for (n, x), u in zip(params.items(), updates, strict=True)}
    same(optimizer.params, params)


@pytest.mark.parametrize("small", [-1, 2**16])
@pytest.mark.parametrize("lay", [fortran, lambda x: np.repeat(x, 2, axis=-1)[..., ::2] if x.ndim else x])
def test_rows_and_columns_are_those_of_the_parameter_wherever_it_lies(monkeypatch, lay, small):
    monkeypatch.setattr(Host, "small", small)
    params = {name: lay(x) for name, x in start().items()}
    assert not params["first"].flags.c_contiguous
    expected, state = known_run("adaptive")
    optimizer = train(optimizer_of(params))
    same(params, expected)
    same_state(optimizer, state)
    turned = optimizer_of({name: x.T for name, x in params.items()})
    assert turned.units[0].members[0].matrix[1:3] == (4, 5)


def test_complex_matrices_have_those_of_their_reals_and_complex_vectors_none():
    def begin():
        params = start({"weight": (4, 3), "twin": (4, 3), "vector": (4,), "plain": (4, 6)})
        names = ("weight", "twin", "vector")
        return params | {n: params[n] + 1j * noise(998, n, params[n].shape) for n in names}

    matrices = [None if x.ndim == 1 else adapter.Matrix.of(real(x).shape, 2048) for x in begin().values()]
    expected, state = follow(begin(), {}, matrices=matrices)
    params = begin()
    params["twin"] = np.asfortranarray(params["twin"])
    optimizer = train(optimizer_of(params))
    same(params, expected)
    same_state(optimizer, state)
    assert optimizer.units[0].members[0].matrix[1:3] == (4, 6)


@pytest.mark.parametrize("absent", [("second",), ("first", "image", "bias", "row")])
def test_a_gradient_that_comes_and_goes_parts_a_leaf_and_loses_nothing(absent):
    def change(step, given):
        return {n: None if n in absent and step in (0, 3, 4, 9) else g for n, g in given.items()}

    expected, state = follow(start(), {}, change)
    optimizer = train(optimizer_of(start()), change=change)
    same(optimizer.params, expected)
    same_state(optimizer, state)


def test_a_missing_gradient_parts_matrices_in_the_middle_of_a_run_and_they_go_on():
    def change(step, given):
        return {n: None if n == "second" and step >= 12 else g for n, g in given.items()}

    expected, state = follow(start(), {}, change)
    optimizer = optimizer_of(start())
    train(optimizer, 0, 12, change)
    assert (0, 2, 4) in optimizer.units[0].groups
    train(optimizer, 12, STEPS, change)
    assert (0, 4) in optimizer.units[0].groups
    same(optimizer.params, expected)
    same_state(optimizer, state)


@pytest.mark.parametrize(("at", "bad"), [(0, np.nan), (1, np.inf), (9, np.nan), (9, 1e308), (17, np.nan)])
def test_a_non_finite_gradient_changes_nothing_factors_and_bases_included(at, bad):
    optimizer = optimizer_of(start(), momentum=0.9)
    other = train(optimizer_of(start(), momentum=0.9))
    train(optimizer, 0, at)
    before = contents(optimizer, VERDICT)
    poisoned = grads(at, optimizer.params)
    poisoned["second"][2, 1] = bad
    optimizer.step(poisoned)
    assert contents(optimizer, VERDICT) == before
    assert optimizer.diagnostics()[0].skipped == 1
    train(optimizer, at)
    assert contents(optimizer, VERDICT) == contents(other, VERDICT)


def test_layers_stacked_in_one_parameter_go_the_way_of_separate_ones():
    apart = start({"a": (4, 3), "b": (4, 3), "c": (4, 3), "bias": (4,)})
    together = {"abc": np.stack([apart[n] for n in "abc"]), "bias": apart["bias"].copy()}
    settings = {"matrix_axes": {"abc": (1, 1)}}
    one, other = optimizer_of(apart), optimizer_of(together, **settings)
    for step in range(STEPS):
        given = grads(step, one.params)
        one.step(given)
        other.step({"abc": np.stack([given[n] for n in "abc"]), "bias": given["bias"]})
    np.testing.assert_allclose(together["abc"], [apart[n] for n in "abc"], rtol=0, atol=1e-11)
    assert other.state_dict()["left_factor/abc"].shape == (3, 4, 4)
    by_function = optimizer_of(together, matrix_axes=lambda name, shape: (1, 1) if len(shape) == 3 else None)
    assert [m.matrix for m in by_function.units[0].members] == [m.matrix for m in other.units[0].members]


def test_a_parameter_may_go_without_a_matrix():
    optimizer = train(optimizer_of(start(), matrix_axes=dict.fromkeys(SHAPES)), last=3)
    diagonal = train(optimizer_of(start(), preconditioner="diagonal", shrinkage=0.0), last=3)
    assert not any(name.startswith(IN_BASES) for name in optimizer.state_dict())
    for name, x in diagonal.params.items():
        assert np.array_equal(optimizer.params[name], x)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16, "float32"])
@pytest.mark.parametrize("history_dtype", [None, "float16"])
def test_parameters_of_low_precision_have_factors_of_single_precision(dtype, history_dtype):
    params = {"w": noise(1, "w", (5, 4)).astype(dtype), "b": noise(1, "b", (5,)).astype(dtype)}
    optimizer = train(optimizer_of(params, history_dtype=history_dtype))
    state = optimizer.state_dict()
    assert {state[f"{name}/w"].dtype for name in IN_BASES} == {np.dtype("float32")}
    assert all(np.all(np.isfinite(x)) and x.dtype == dtype for x in params.values())
    basis = state["left_basis/w"][0]
    np.testing.assert_allclose(basis.T @ basis, np.eye(5), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ["zero", "dead rows", "dead columns", "one dead", "tiny", "huge"])
def test_zero_gradients_and_dead_rows_leave_everything_finite(case, dtype):
    def change(step, given):
        for g in given.values():
            if case == "zero":
                g[...] = 0
            elif case == "dead rows" and g.ndim:
                g[: g.shape[0] // 2] = 0
            elif case == "dead columns" and g.ndim > 1:
                g[:, ::2] = 0
            elif case in ("tiny", "huge"):
                g[...] *= {"tiny": 1e-30, "huge": 1e25}[case]
        if case == "one dead":
            given["second"][...] = 0
        return given

    optimizer = train(optimizer_of(start(dtype=dtype)), change=change)
    for name, value in {**optimizer.state_dict(), **optimizer.params}.items():
        assert not isinstance(value, np.ndarray) or np.all(np.isfinite(value.astype(float))), name
    assert optimizer.diagnostics()[0].skipped == 0
    if case in ("zero", "one dead"):
        assert np.array_equal(optimizer.params["second"], start(dtype=dtype)["second"])


def test_a_matrix_of_one_row_has_a_factor_for_its_columns_only():
    state = optimizer_of(start()).state_dict()
    assert "left_factor/row" not in state
    assert state["right_factor/row"].shape == (1, 6, 6)
    assert not any(f"{name}/{own}" in state for name in IN_BASES for own in ("bias", "scale", "none"))


def test_new_settings_keep_the_matrices():
    optimizer = train(optimizer_of(start()), last=10)
    config = core.Config(**{**KRONECKER, "factor_beta": 0.5, "precondition_frequency": 2})
    before = optimizer.state_dict()["left_basis/first"]
    optimizer.config = config
    train(optimizer, 10)
    assert optimizer.config is config
    assert np.any(optimizer.state_dict()["left_basis/first"] != before)


def test_momentum_decay_and_maximize_work_as_with_the_diagonal():
    down, up = optimizer_of(start(), momentum=0.9), optimizer_of(start(), momentum=0.9, maximize=True)
    for step in range(STEPS):
        given = grads(step, down.params)
        down.step(given)
        up.step({name: -g for name, g in given.items()})
    assert contents(down) == contents(up)


def test_bases_are_formed_and_turned_only_when_it_is_their_time():
    optimizer, changed = optimizer_of(start()), []
    bases = [optimizer.state_dict()["left_basis/first"]]
    for step in range(21):
        train(optimizer, step, step + 1)
        bases.append(optimizer.state_dict()["left_basis/first"])
    changed = [step for step, (a, b) in enumerate(pairwise(bases), 1) if np.any(a != b)]
    assert changed == [1, 2, 4, 7, 10, 20]


# States and checkpoints.


def lay_fortran(params):
    return {name: fortran(x) for name, x in params.items()}


@pytest.mark.parametrize("name", ["adaptive", "no pairs", "short sides"])
@pytest.mark.parametrize("lay", [copy.deepcopy, lay_fortran])
@pytest.mark.parametrize("stop", [1, 11])
def test_a_state_goes_through_a_file_and_the_run_continues_bit_for_bit(tmp_path, name, lay, stop):
    def change(step, given):
        return {n: None if n in ("second", "row") and step < 5 else g for n, g in given.items()}

    settings = SETTINGS[name]
    optimizer = optimizer_of(lay(start(dtype="float32")), momentum=0.9, **settings)
    train(optimizer, 0, stop, change)
    np.savez(tmp_path / "state.npz", **optimizer.state_dict())
    resumed = train(optimizer_of(lay(start(dtype="float32")), rate=1.0, momentum=0.5, **settings), last=3)
    for param, kept in zip(resumed.params.values(), optimizer.params.values(), strict=True):
        param[...] = kept
    resumed.load_state_dict(np.load(tmp_path / "state.npz", allow_pickle=False))
    assert contents(resumed) == contents(optimizer)
    assert contents(train(resumed, stop, change=change)) == contents(train(optimizer, stop, change=change))


@pytest.mark.parametrize("name", ["adaptive", "no pairs", "short sides"])
@pytest.mark.parametrize("lay", [copy.deepcopy, lay_fortran])
@pytest.mark.parametrize(
    ("unused", "small"), [((), 2**16), (("first", "second", "image", "row"), 2**16), (("second", "row"), -1)]
)
def test_a_run_goes_through_a_checkpoint_and_continues_bit_for_bit(
    tmp_path, monkeypatch, name, lay, unused, small
):
    monkeypatch.setattr(Host, "small", small)

    def change(step, given):
        return {n: None if n in unused and step < 15 else g for n, g in given.items()}

    settings = SETTINGS[name]
    begin = lambda: optimizer_of(lay(start(dtype="float32")), momentum=0.9, **settings)  # noqa: E731
    optimizer, resumed = train(begin(), 0, 11, change), train(begin(), 0, 2)
    optimizer.save_state(tmp_path / "run")
    resumed.load_state(tmp_path / "run")
    assert contents(resumed) == contents(optimizer)
    resumed.save_state(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "run").read_bytes()
    assert contents(train(resumed, 11, change=change)) == contents(train(optimizer, 11, change=change))


def test_parameters_that_never_had_a_gradient_are_resumed_apart_from_the_others(tmp_path):
    def change(step, given):
        return {n: None if n == "second" and step < 15 else g for n, g in given.items()}

    optimizer, resumed = train(optimizer_of(start()), 0, 11, change), optimizer_of(start())
    optimizer.save_state(tmp_path / "run")
    resumed.load_state(tmp_path / "run")
    order = ("unit0/leaves",)  # of the leaves, and so that in which they are summed
    assert contents(resumed, order) == contents(optimizer, order)
    train(optimizer, 11, change=change)
    same(train(resumed, 11, change=change).params, optimizer.params)


def test_a_checkpoint_of_c_order_is_resumed_in_fortran_order(tmp_path):
    one, other = optimizer_of(start()), optimizer_of(lay_fortran(start()))
    train(one, 0, 11).save_state(tmp_path / "run")
    other.load_state(tmp_path / "run")
    train(one, 11)
    train(other, 11)
    same(other.params, one.params)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent_and_have_the_same_matrices(duplicate):
    params = start({"stack": (3, 4, 2), "twin": (4, 2), "bias": (4,)})
    optimizer = train(
        optimizer_of(params, matrix_axes=lambda name, shape: None if name == "bias" else (len(shape) - 2, 1)),
        last=9,
    )
    twin = duplicate(optimizer)
    before = contents(twin)
    assert before == contents(optimizer)
    train(optimizer, 9)
    assert contents(twin) == before
    assert contents(train(twin, 9)) == contents(optimizer)


def test_memory_is_what_was_planned():
    params = start(dtype="float32")
    state = optimizer_of(params).state_dict()
    plan = core.plan_memory(core.Config(**KRONECKER), list(params.values()))
    assert sum(value.nbytes for value in state.values() if isinstance(value, np.ndarray)) == plan.total


def test_a_state_dict_without_the_newer_settings_is_loaded():
    optimizer = train(MLBFGS(start(), RATE, shrinkage=0.5, check_every=1), last=5)
    state = optimizer.state_dict()
    settings = json.loads(state["settings"])
    for name in ("factor_beta", "precondition_frequency", "max_preconditioner_dim"):
        del settings[name]
    resumed = MLBFGS(copy.deepcopy(optimizer.params), 1.0)
    resumed.load_state_dict({**state, "settings": json.dumps(settings)})
    assert resumed.config == optimizer.config
    assert contents(train(resumed, 5)) == contents(train(optimizer, 5))


def without(*names):
    return lambda state: {name: x for name, x in state.items() if name not in names}


def with_settings(**settings):
    return lambda state: {**state, "settings": json.dumps({**json.loads(state["settings"]), **settings})}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("left_basis/first"), "must hold 'left_basis/first', got no such entry"),
        (lambda s: {**s, "left_basis/bias": np.eye(5)[None]}, "must not hold 'left_basis/bias'"),
        (
            lambda s: {**s, "right_factor/first": np.eye(4)},
            r"'right_factor/first' of the shape \(1, 4, 4\) and the dtype float64, got \(4, 4\)",
        ),
        (
            lambda s: {
                **s,
                "unit0/leaves": json.dumps(
                    [["first", "other"], *([n] for n in SHAPES if n not in ("first", "other"))]
                ),
            },
            "beside others of its block, dtype and matrices, in 'unit0/leaves'",
        ),
        (with_settings(max_preconditioner_dim=4), "must keep max_preconditioner_dim at 2048.*got 4"),
        (with_settings(preconditioner="diagonal"), "must keep preconditioner at kronecker"),
    ],
)
def test_a_refused_state_changes_nothing(damage, words):
    optimizer = train(optimizer_of(start()), last=6)
    state = optimizer.state_dict()
    before = contents(train(optimizer, 6, 9))
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(damage(state))
    assert contents(optimizer) == before


def test_a_checkpoint_with_other_matrices_is_refused(tmp_path):
    params = start({"stack": (3, 4, 2)})
    train(optimizer_of(copy.deepcopy(params), matrix_axes={"stack": (1, 1)}), last=3).save_state(
        tmp_path / "run"
    )
    optimizer = train(optimizer_of(params), last=2)
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"must hold for 'left_factor/stack' float64 of shape \(1, 3, 3\)"):
        optimizer.load_state(tmp_path / "run")
    assert contents(optimizer) == before


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"matrix_axes": 3},
            TypeError,
            "`matrix_axes` must be None, a mapping of names or a function, got 3",
        ),
        (
            {"matrix_axes": {"firsd": None}},
            ValueError,
            "`matrix_axes` must hold names of parameters.*'firsd'",
        ),
        ({"matrix_axes": {"first": (0,)}}, ValueError, r"`matrix_axes` must give None or two ints.*\(0,\)"),
        ({"matrix_axes": {"first": (1, 1)}}, ValueError, r"must leave axes for the columns.*'first'"),
        ({"factor_beta": 1.0}, ValueError, r"`factor_beta` must be in \[0, 1\), got 1.0"),
        ({"precondition_frequency": 0}, ValueError, "`precondition_frequency` must be >= 1, got 0"),
        ({"max_preconditioner_dim": 0.5}, TypeError, "`max_preconditioner_dim` must be an int, got 0.5"),
    ],
)
def test_bad_settings_are_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        optimizer_of(start(), **arguments)


def test_settings_that_would_change_the_matrices_are_refused():
    optimizer = optimizer_of(start())
    config = core.Config(**{**KRONECKER, "max_preconditioner_dim": 4})
    with pytest.raises(ValueError, match="`config` must keep max_preconditioner_dim at 2048"):
        optimizer.config = config
    MLBFGS(start()).config = core.Config(max_preconditioner_dim=4)


def test_its_representation_tells_the_preconditioner_and_not_the_defaults_that_come_with_it():
    text = repr(MLBFGS(np.ones((3, 2)), preconditioner="kronecker"))
    assert text.endswith("weight_decay=0.0, preconditioner=kronecker)")


def test_a_vector_has_no_matrices_for_scipy():
    words = "`preconditioner` must be 'none' or 'diagonal', since a vector has no matrices, got 'kronecker'"
    with pytest.raises(ValueError, match=words):
        minimize_mlbfgs(lambda x: x @ x, np.ones(3), preconditioner="kronecker")


# The kernels of CuPy, whose passes for this preconditioner are the core's.


class FlatKernel(CpuKernel):
    """The kernel on contiguous arrays of any shape."""

    def __call__(self, *args):
        super().__call__(*(arg.reshape(-1) if getattr(arg, "ndim", 0) > 1 else arg for arg in args))


@pytest.mark.skipif(COMPILER is None, reason="the bodies of the CUDA kernels need a C++ compiler")
@pytest.mark.parametrize("name", ["adaptive", "fixed"])
def test_the_kernels_of_cupy_give_the_same_run(monkeypatch, name):
    monkeypatch.setattr(cuda, "_THREADS", 7)
    monkeypatch.setattr(cuda, "_OWN", 2)
    expected, state = follow(start(), SETTINGS[name], steps=15)
    optimizer = optimizer_of(start(), **SETTINGS[name])
    (unit,) = optimizer.units
    backend = Host()
    backend.kernels = CupyKernels(backend.xp, FlatKernel)
    unit.backend = backend
    unit._lay(unit.groups)
    same(train(optimizer, last=15).params, expected)
    same_state(optimizer, state)
