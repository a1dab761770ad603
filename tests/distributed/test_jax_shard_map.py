"""Inside `jax.shard_map` the leaves are shards, and a run is that of one device up to rounding."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mlbfgs_jax import mlbfgs, scale_by_mlbfgs
from tests.distributed.jax_hlo import collectives
from tests.distributed.jax_training import (
    RATE,
    SETTINGS,
    SHAPES,
    Layout,
    Run,
    assert_same,
    assert_skipped,
    deviation,
    loss,
    make_batch,
    make_mesh,
    make_params,
    need_devices,
    place,
)

STEPS = 40
TOLERANCE = 100 * np.finfo("float64").eps
"""Up to 5 eps was measured."""
LAYOUTS = {
    "one axis": Layout({"x": 8}, {"bias": P(), "hidden": P("x"), "out": P(None, "x")}, P("x")),
    "two axes": Layout(
        {"x": 2, "y": 4}, {"bias": P("y"), "hidden": P("x", "y"), "out": P("x")}, P(("x", "y"))
    ),
    "an axis without parameters": Layout(
        {"x": 4, "y": 2}, {"bias": P("x"), "hidden": P("x"), "out": P()}, P(("x", "y"))
    ),
    "replicated": Layout({"x": 8}, {"bias": P(), "hidden": P(), "out": P()}, P("x")),
}
NAMES = {
    "one axis": "x",
    "two axes": ("x", "y"),
    "an axis without parameters": ("x", "y"),
    "replicated": None,
}
CASES = [
    ("one axis", ()),
    ("two axes", ()),
    ("an axis without parameters", (("preset", "fit"), ("blocks", "parameter"))),
    ("replicated", ()),
]
each_case = pytest.mark.parametrize(("name", "settings"), CASES, ids=str)

need_devices()


def gathered(params, specs):
    """Whole parameters of shards."""
    result = {}
    for name, leaf in params.items():
        for dim, axis in enumerate(specs[name]):
            if axis is not None:
                leaf = lax.all_gather(leaf, axis, axis=dim, tiled=True)
        result[name] = leaf
    return result


def state_specs(tx, specs):
    """How the state of parameters with these specifications is sharded."""
    state = jax.eval_shape(tx.init, make_params())
    return optax.tree.map_params(
        tx,
        lambda leaf, name: P(*(None,) * (leaf.ndim - len(SHAPES[name])), *specs[name]),
        state,
        {name: name for name in specs},
        transform_non_params=lambda _: P(),
    )


class ShardMapRun(Run):
    """Training with the whole step inside `shard_map`; gradients of shards are summed by their types."""

    def __init__(self, tx, layout):
        super().__init__(tx)
        self.layout, self.mesh = layout, make_mesh(layout, AxisType.Auto)
        self.specs = layout.params, state_specs(tx, layout.params)
        sizes = int(np.prod(list(layout.axes.values())))

        def local_loss(params, batch):
            return loss(gathered(params, layout.params), batch) / sizes

        def step(params, state, batch, poison):
            grads = jax.grad(local_loss)(params, batch)
            grads["hidden"] = grads["hidden"] + poison
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        batch = (layout.batch, layout.batch)
        mapped = self.mapped(step, (*self.specs, batch, layout.params["hidden"]), self.specs)
        self.poisoned = jax.jit(mapped, donate_argnums=(0, 1))
        self.healthy = place(np.zeros((8, 16)), self.mesh, layout.params["hidden"])
        self.step = lambda params, state, batch: self.poisoned(params, state, batch, self.healthy)

    def mapped(self, function, in_specs, out_specs):
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def placed_params(self, params):
        return place(params, self.mesh, self.layout.params)

    def placed_batch(self, batch):
        return place(batch, self.mesh, self.layout.batch)


@functools.cache
def on_mesh(name, settings):
    tx = mlbfgs(RATE, axis_name=NAMES[name], pack=False, **SETTINGS, **dict(settings))
    return ShardMapRun(tx, LAYOUTS[name])


@functools.cache
def on_one_device(settings):
    run = Run(mlbfgs(RATE, **SETTINGS, **dict(settings)))
    return [jax.tree.map(np.array, (params, state)) for params, state in run.train(*run.start(), 0, STEPS)]


@each_case
def test_a_run_inside_shard_map_is_that_of_one_device(name, settings):
    run, expected = on_mesh(name, settings), on_one_device(settings)
    for number, (params, state) in enumerate(run.train(*run.start(), 0, STEPS)):
        assert deviation(params, expected[number][0]) < TOLERANCE, number
    other = expected[-1][1]
    assert int(state[0].pairs[0]) >= 4
    np.testing.assert_allclose(state[0].gram, other[0].gram, atol=1e-10)
    np.testing.assert_allclose(state[0].mean_square, other[0].mean_square, rtol=1e-12)
    assert_same(state[0].size, other[0].size)


@each_case
def test_init_inside_and_outside_gives_the_same(name, settings):
    run = on_mesh(name, settings)
    params, state = run.start()
    inside = jax.jit(run.mapped(run.tx.init, (run.specs[0],), run.specs[1]))(params)
    assert_same(inside, state)
    sizes = [16, 8 * 16, 16 * 8]
    assert inside[0].size.tolist() == (sizes if "blocks" in dict(settings) else [sum(sizes)])
    for leaf, spec in zip(jax.tree.leaves(inside), jax.tree.leaves(run.specs[1]), strict=True):
        assert leaf.sharding.is_equivalent_to(NamedSharding(run.mesh, spec), leaf.ndim)


@each_case
def test_a_nan_in_the_gradient_of_one_shard_skips_the_step_on_all(name, settings):
    run = on_mesh(name, settings)
    *_, (params, state) = run.train(*run.start(), 0, 11)
    before = jax.tree.map(np.array, (params, state))
    poison = np.zeros((8, 16))
    poison[5, 9] = np.nan
    poison = place(poison, run.mesh, run.layout.params["hidden"])
    assert_skipped(run.poisoned(params, state, run.placed_batch(make_batch(11)), poison), before)


def test_a_step_sends_two_sums_of_coefficients_however_many_leaves_there_are():
    run = on_mesh("two axes", ())
    mapped = run.mapped(run.tx.update, (run.specs[0], run.specs[1], run.specs[0]), run.specs)
    params, state = run.start()
    program = jax.jit(mapped).lower(params, state, params).compile()
    found = collectives(program.as_text())
    assert {operation.kind for operation in found} == {"all-reduce"}
    always = [operation for operation in found if operation.computation == "ENTRY"]
    m = SETTINGS["history_size"]
    assert [operation.numbers for operation in always] == [2 * m + 3, 1]


# What it refuses


def mapped_update(layout, check_vma=True, spread=False, **kw):
    tx, mesh = scale_by_mlbfgs(**kw), make_mesh(layout, AxisType.Auto)
    params = place(make_params(), mesh, layout.params)

    def update(params):
        grads = params
        if spread:
            grads = {**params, "bias": params["bias"] * (1.0 + lax.axis_index("x"))}
        updates, _ = tx.update(grads, tx.init(params), params)
        return updates

    specs = layout.params
    run = jax.shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=check_vma)
    return jax.eval_shape(run, params)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"axis_name": 3}, TypeError, r"`axis_name` must be None, a str or a tuple of str, got 3"),
        ({"axis_name": ["x"]}, TypeError, r"`axis_name` must be None, a str or a tuple of str, got \['x'\]"),
        ({"axis_name": "z"}, NameError, "z"),
        ({"axis_name": "x", "check_vma": False}, ValueError, r"`axis_name` must be an axis .* got 'x'"),
        ({"axis_name": "x", "spread": True}, ValueError,
         r"`updates` must be the same on every copy .* varies over \['x'\] at 'bias'"),
    ],
)  # fmt: skip
def test_bad_arguments_name_the_argument_the_rule_and_the_value(settings, error, message):
    with pytest.raises(error, match=message):
        mapped_update(LAYOUTS["one axis"], **settings)


def test_a_right_call_is_not_refused():
    shapes = mapped_update(LAYOUTS["one axis"], axis_name="x")
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, make_params())
