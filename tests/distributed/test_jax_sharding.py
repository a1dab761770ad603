"""Under `jit` the state is sharded like the parameters, and a run is that of one device up to rounding."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mlbfgs_jax
from mlbfgs_jax import mlbfgs
from tests.distributed.jax_training import (
    LAYOUTS,
    RATE,
    SETTINGS,
    SHAPES,
    Layout,
    MeshRun,
    Run,
    after,
    assert_same,
    assert_skipped,
    deviation,
    make_batch,
    make_mesh,
    make_params,
    need_devices,
    place,
)

STEPS = 40
GROWTH = {"default": 100, "fit": 100, "lbfgs": 1e6}
"""Largest deviation from one device, in units of eps. Measured: up to 3 with default settings, 5 with "fit",
and 1300 with "lbfgs", which takes each pair from two mini-batches and amplifies rounding."""
CASES = [
    ("default", "float64", "data", AxisType.Auto),
    ("default", "float64", "fully sharded", AxisType.Auto),
    ("default", "float32", "fully sharded", AxisType.Explicit),
    ("default", "float64", "tensor", AxisType.Auto),
    ("default", "float64", "tensor", AxisType.Explicit),
    ("default", "float32", "data and tensor", AxisType.Auto),
    ("default", "float64", "data and tensor", AxisType.Explicit),
    ("fit", "float64", "data and tensor", AxisType.Auto),
    ("lbfgs", "float64", "fully sharded", AxisType.Explicit),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case)))
each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)

need_devices()


def optimizer(preset="default"):
    settings = {"history_size": 4} if preset == "lbfgs" else SETTINGS
    return mlbfgs(RATE, preset=preset, **settings)


@functools.cache
def on_one_device(preset, dtype):
    """Parameters after each step."""
    run = Run(optimizer(preset), dtype)
    return [jax.tree.map(np.array, params) for params, _ in run.train(*run.start(), 0, STEPS)]


@functools.cache
def on_mesh(preset, dtype, name, kind):
    """A run, all of whose steps use one compiled function."""
    return MeshRun(optimizer(preset), LAYOUTS[name], kind, dtype)


def assert_sharded_like(params, state):
    """Every parameter-sized array of the state lies like its parameter, every other on all devices."""
    place = {name: leaf.sharding for name, leaf in params.items()}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        told = jax.tree_util.keystr(path)
        name = getattr(path[-1], "key", None)
        if name is None:
            assert leaf.sharding.is_fully_replicated, told
            assert leaf.sharding.device_set == place["out"].device_set, told
            continue
        front = (None,) * (2 if ".history" in told else 0)
        expected = NamedSharding(place[name].mesh, P(*front, *place[name].spec))
        assert leaf.sharding.is_equivalent_to(expected, leaf.ndim), told


@contextlib.contextmanager
def compilations():
    """The events of compilation within."""
    found = []

    def listen(event, duration, **_):
        if "/compile/" in event:
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@each_case
def test_a_run_on_a_mesh_is_that_of_one_device(case):
    preset, dtype, *_ = case
    run, expected = on_mesh(*case), on_one_device(*case[:2])
    tolerance = GROWTH[preset] * np.finfo(dtype).eps
    for number, (params, state) in enumerate(run.train(*run.start(), 0, STEPS)):
        assert deviation(params, expected[number]) < tolerance, number
    assert int(state[0].pairs[0]) >= 4
    assert int(state[0].step) == STEPS


@each_case
def test_the_state_is_sharded_like_the_parameters_before_and_after_each_step(case):
    run = on_mesh(*case)
    params, state = run.start()
    asked = jax.tree.map(lambda leaf: leaf.sharding, params)
    assert_sharded_like(params, state)
    steps = run.train(params, state, 0, 10)
    for params, state in steps:
        assert all(p.sharding.is_equivalent_to(asked[name], p.ndim) for name, p in params.items())
        assert_sharded_like(params, state)


@each_case
def test_only_the_first_step_is_compiled_and_every_step_donates(case):
    run = on_mesh(*case)
    params, state = run.start()
    params, state = run.take(params, state, make_batch(0, run.dtype))
    with compilations() as found:
        for number in range(1, 4):
            before = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.ndim]
            params, state = run.take(params, state, make_batch(number, run.dtype))
            assert all(leaf.is_deleted() for leaf in before)
        assert found == []
        jax.jit(lambda x: x + 1)(state[0].step)
        assert found != []


@each_case
def test_a_nan_in_the_batch_of_one_device_skips_the_step_everywhere(case):
    run = on_mesh(*case)
    params, state = after(run, 11)
    before = jax.tree.map(np.array, (params, state))
    inputs, targets = make_batch(11, run.dtype)
    inputs = inputs.copy()
    inputs[7, 3] = np.nan
    params, state = run.take(params, state, (inputs, targets))
    assert_skipped((params, state), before)
    for leaf in jax.tree.leaves(state):
        whole = np.asarray(leaf)
        for shard in leaf.addressable_shards:  # copies on all devices are the same
            np.testing.assert_array_equal(shard.data, whole[shard.index])


# Before the first step


def init_on(layout, kind):
    tx, mesh = optimizer(), make_mesh(layout, kind)
    return tx, place(make_params(), mesh, layout.params)


@each_kind
@pytest.mark.parametrize("name", LAYOUTS)
def test_init_outside_and_under_jit_and_abstract_gives_the_same(name, kind):
    layout = LAYOUTS[name]
    tx, params = init_on(layout, kind)
    state = tx.init(params)
    assert_sharded_like(params, state)
    with jax.set_mesh(params["out"].sharding.mesh):
        compiled = jax.jit(tx.init)(params)
        abstract = jax.eval_shape(tx.init, params)
    assert_sharded_like(params, compiled)
    assert_same(compiled, state)
    assert jax.tree.map(kind_of, abstract) == jax.tree.map(kind_of, state)
    if kind is AxisType.Explicit:
        assert jax.tree.map(jax.typeof, compiled) == jax.tree.map(jax.typeof, state)
        if name == "data":  # replicated, hence packed
            assert not jax.tree.leaves(abstract[0].history)
            return
        assert abstract[0].history["hidden"].sharding.spec == P(
            None, None, *layout.params["hidden"], *fill(layout)
        )


def kind_of(leaf):
    return leaf.shape, leaf.dtype


def fill(layout):
    """What makes a specification name every axis of the array."""
    return (None,) * (2 - len(layout.params["hidden"]))


def test_large_leaves_of_explicit_axes_need_no_mesh_that_is_set():
    tx, mesh = optimizer(), make_mesh(LAYOUTS["fully sharded"], AxisType.Explicit)
    params = place({"out": np.ones((64, 512))}, mesh, P("data"))
    state = tx.init(params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert updates["out"].sharding.spec == P("data", None)
    assert after[0].history["out"].sharding.spec == P(None, None, "data", None)
    assert jax.tree.map(kind_of, after) == jax.tree.map(kind_of, state)


def test_a_compiled_init_needs_no_mesh_that_is_set():
    tx, params = init_on(LAYOUTS["fully sharded"], AxisType.Auto)
    assert_sharded_like(params, jax.jit(tx.init)(params))


# Checkpoints


def targets(tx, params):
    """Abstract state of abstract parameters, sharded as a compiled `init` would give it."""
    shapes = jax.eval_shape(tx.init, params)
    shardings = jax.jit(tx.init).lower(params).compile().output_shardings
    return jax.tree.map(abstract_array, shapes, shardings)


def abstract_array(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


SMALLER = {
    "four devices": Layout({"data": 4}, LAYOUTS["fully sharded"].params, P("data")),
    "two by two": LAYOUTS["data and tensor"]._replace(axes={"data": 2, "model": 2}),
}


@functools.cache
def half_a_run():
    return jax.tree.map(
        np.array, after(on_mesh("default", "float64", "fully sharded", AxisType.Auto), STEPS // 2)
    )


def assert_goes_on(run, params, state):
    """From half a run on, it is the run of one device; and the first half came as it was."""
    assert_same((params, state), half_a_run())
    assert_sharded_like(params, state)
    expected = on_one_device("default", "float64")
    steps = run.train(params, state, STEPS // 2, STEPS)
    for number, (params, state) in enumerate(steps, STEPS // 2):
        assert deviation(params, expected[number]) < GROWTH["default"] * np.finfo("float64").eps
    assert int(state[0].step) == STEPS


@functools.cache
def smaller(name):
    return MeshRun(optimizer(), SMALLER[name], devices=jax.devices()[:4])


@pytest.mark.parametrize("name", SMALLER)
def test_orbax_restores_a_run_on_another_mesh(name, tmp_path):
    run = on_mesh("default", "float64", "fully sharded", AxisType.Auto)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", after(run, STEPS // 2))
    other = smaller(name)
    params = {
        leaf: jax.ShapeDtypeStruct(
            shape, "float64", sharding=NamedSharding(other.mesh, other.layout.params[leaf])
        )
        for leaf, shape in SHAPES.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "run", (params, targets(other.tx, params)))
    assert_goes_on(other, *restored)


@pytest.mark.parametrize("name", SMALLER)
@pytest.mark.parametrize("abstract", [False, True])
def test_the_neutral_checkpoint_restores_a_run_on_another_mesh(name, abstract, tmp_path):
    run = on_mesh("default", "float64", "fully sharded", AxisType.Auto)
    mlbfgs_jax.save_state(tmp_path / "run", *after(run, STEPS // 2))
    other = smaller(name)
    params, state = other.start()
    if abstract:
        params = jax.tree.map(lambda leaf: abstract_array(leaf, leaf.sharding), params)
        state = targets(other.tx, params)
    assert_goes_on(other, *mlbfgs_jax.load_state(tmp_path / "run", params, state))


def test_the_neutral_checkpoint_takes_a_state_of_explicit_axes_from_eval_shape(tmp_path):
    run = on_mesh("default", "float64", "tensor", AxisType.Explicit)
    params, state = after(run, 10)
    mlbfgs_jax.save_state(tmp_path / "run", params, state)
    with jax.set_mesh(run.mesh):
        restored = mlbfgs_jax.load_state(tmp_path / "run", params, jax.eval_shape(run.tx.init, params))
    assert_same(restored, (params, state))
    for name, leaf in restored[1][0].history.items():
        assert jax.typeof(leaf) == jax.typeof(state[0].history[name])


# Packing


def packed(state):
    return not jax.tree.leaves(state[0].history)


@pytest.mark.parametrize("name", ["data", "fully sharded", "data and tensor"])
@each_kind
def test_only_what_types_say_is_replicated_is_packed(name, kind):
    """Of automatic axes types say nothing; of explicit ones those leaves are packed that are replicated."""
    tx, params = init_on(LAYOUTS[name], kind)
    state = tx.init(params)
    assert packed(state) == (kind is AxisType.Explicit and name == "data")
    assert bool(state[0].packed) == packed(state)


def test_what_was_packed_before_it_lay_on_a_mesh_is_refused_with_what_to_do():
    tx, params = optimizer(), make_params("float64")
    state = tx.init(params)
    assert packed(state)
    mesh = make_mesh(LAYOUTS["data"], AxisType.Auto)
    params, state = jax.device_put((params, state), NamedSharding(mesh, P()))
    with pytest.raises(ValueError, match=r"`state` must not have packed what may be sharded.*pack=True"):
        jax.jit(tx.update)(params, state, params)
    told = mlbfgs(RATE, pack=True, **SETTINGS)
    updates, _ = jax.jit(told.update)(params, told.init(params), params)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


def test_packing_a_sharded_leaf_is_refused_by_name():
    _, params = init_on(LAYOUTS["fully sharded"], AxisType.Explicit)
    match = r"`pack` must not be True where a parameter is sharded.*of shape \(16,\) over .*'data'.*'bias'"
    with pytest.raises(ValueError, match=match):
        mlbfgs(RATE, pack=True).init(params)


def test_a_packed_run_on_a_mesh_is_that_of_one_device():
    run = MeshRun(mlbfgs(RATE, pack=True, **SETTINGS), LAYOUTS["data"], AxisType.Auto)
    expected = on_one_device("default", "float64")
    for number, (params, state) in enumerate(run.train(*run.start(), 0, STEPS)):
        assert deviation(params, expected[number]) < GROWTH["default"] * np.finfo("float64").eps
    assert packed(state)
    assert int(state[0].pairs[0]) >= 4


def test_factors_and_bases_of_sharded_matrices_are_those_of_one_device():
    tx = mlbfgs(
        RATE, **{**SETTINGS, "preconditioner": "kronecker", "precondition_frequency": 3, "check_every": 2}
    )
    alone = Run(tx)
    expected = [jax.tree.map(np.array, params) for params, _ in alone.train(*alone.start(), 0, 12)]
    sharded = MeshRun(tx, LAYOUTS["data and tensor"], AxisType.Auto)
    for (params, state), own in zip(sharded.train(*sharded.start(), 0, 12), expected, strict=True):
        assert all(np.max(np.abs(np.array(params[name]) - own[name])) < 1e-11 for name in own)
    assert int(state[0].pairs[0]) > 0
