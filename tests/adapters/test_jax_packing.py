"""Parameters that lie in packs learn as if each were alone; what may be sharded stays alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mlbfgs_jax import load_state, mlbfgs, save_state, scale_by_mlbfgs

pytestmark = pytest.mark.backends("jax")

FAST = {"check_every": 2, "update_every": 5, "history_size": 3}
SETTINGS = [
    FAST,
    {"preset": "fit", "update_every": 6},
    {"beta": 0.9, "step_length": "unit", "preconditioner": "none", **FAST},
    {"history_size": 0},
    {"history_dtype": "bfloat16", "adaptive": False, **FAST},
]
SHAPES = {
    "a": {"scale": (), "bias": (3,), "kernel": (5, 3)},
    "b": {"bias": (130,), "empty": (0, 2), "kernel": (2, 3, 4)},
}


def make_tree(seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return {
        layer: {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in leaves.items()}
        for layer, leaves in SHAPES.items()
    }


CURVATURES = jax.tree.map(lambda leaf: 0.5 + jnp.abs(leaf), make_tree(9))
PRESENT = [
    *[{}] * 7,
    *[{("a", "bias"), ("b", "kernel")}] * 4,
    *[{}] * 4,
    *[{("a", "scale"), ("a", "bias"), ("a", "kernel")}] * 7,
    *[{}] * 9,
]
"""The parameters without a gradient at each step: frozen for less than a window, and for longer."""


def gradients(params, step, without):
    noise = make_tree(100 + step)
    grads = jax.tree.map(lambda c, p, e: c * p + 0.3 * e, CURVATURES, params, noise)
    for layer, name in without:
        grads[layer][name] = None
    return grads


def run(tx, spoilt=(5, 17)):
    """Parameters after each step."""
    params, history = make_tree(), []
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(len(PRESENT)):
        grads = gradients(params, step, PRESENT[step])
        if step in spoilt:
            grads["b"]["bias"] = grads["b"]["bias"].at[1].set(jnp.inf)
        updates, state = update(grads, state, params)
        params = jax.tree.map(
            lambda u, p: p if u is None else p + u, updates, params, is_leaf=lambda leaf: leaf is None
        )
        history.append(params)
    return history, state


def assert_close(a, b, tolerance=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b)


@pytest.mark.parametrize("blocks", ["all", "layer"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_packed_run_is_that_of_parameters_alone(settings, blocks):
    """With parameters that are frozen and unfrozen, and with gradients that are not finite."""
    packed, alone = (
        run(mlbfgs(0.01, weight_decay=0.1, blocks=blocks, pack=pack, **settings)) for pack in (True, False)
    )
    tolerance = 1e-2 if "history_dtype" in settings else 1e-8
    for now, expected in zip(packed[0], alone[0], strict=True):
        assert_close(now, expected, tolerance)
    first, other = packed[1][0], alone[1][0]
    assert settings.get("history_size") == 0 or int(jnp.sum(other.pairs)) > 2
    for name in ("leaf_steps", "leaf_window", "leaf_prev_window", "pairs", "step", "skipped", "size"):
        np.testing.assert_array_equal(getattr(first, name), getattr(other, name), err_msg=name)


def test_the_default_packs_all_that_is_not_sharded():
    state = mlbfgs(0.1, **FAST).init(make_tree())
    assert not jax.tree.leaves((state[0].history, state[0].mean_grads, state[1].trace))
    flat = ("mean_params", "mean_grads", "prev_params", "prev_grads", "exp_avg_sq", "trace")
    expected = {f"packed_{name}": 1 for name in flat} | {"packed_history": 3}
    assert {name: array.ndim for name, (array,) in state[0].packed.items()} == expected


@pytest.mark.parametrize("pack", ["auto", True, False])
@pytest.mark.parametrize("settings", [*SETTINGS[:2], {"blocks": "layer"}, {"blocks": "parameter"}], ids=str)
def test_init_compiled_and_abstract_has_the_structure_of_every_later_state(pack, settings):
    tx, params = mlbfgs(0.1, pack=pack, **settings), make_tree()
    state = tx.init(params)
    _, after = jax.jit(tx.update)(params, state, params)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    for other in (jax.jit(tx.init)(params), jax.eval_shape(tx.init, params), tx.init(abstract), after):
        assert jax.tree.map(jax.typeof, other) == jax.tree.map(jax.typeof, state)


def test_several_dtypes_lie_in_several_packs_and_halves_with_float32():
    params = make_tree(dtype="float32")
    params["a"] = jax.tree.map(lambda leaf: leaf.astype("float64"), params["a"])
    params["b"]["bias"] = params["b"]["bias"].astype("bfloat16")
    state = scale_by_mlbfgs().init(params)
    assert sorted(str(array.dtype) for array in state.packed["packed_mean_grads"]) == ["float32", "float64"]
    wide = jax.tree.map(lambda leaf: leaf.astype("float32") if leaf.dtype == "bfloat16" else leaf, params)
    assert jax.tree.structure(scale_by_mlbfgs().init(wide)) == jax.tree.structure(state)


def test_a_complex_parameter_lies_in_a_pack_as_pairs_of_reals():
    params = {"z": jnp.asarray([1.0 + 2.0j, 3.0j]), "x": jnp.ones(3)}
    updates = [
        scale_by_mlbfgs(pack=pack).update(
            params, scale_by_mlbfgs(pack=pack).init(params), params
        )[0]
        for pack in (True, False)
    ]  # fmt: skip
    assert_close(*updates)


@pytest.mark.parametrize(("made", "used"), [(True, False), (False, True)])
def test_a_state_of_the_other_structure_is_refused_with_what_to_do(made, used):
    params = make_tree()
    state = mlbfgs(0.1, pack=made).init(params)
    told = "some" if made else "no"
    match = f"`state` must be one of pack={used}, got one with {told} parameters packed.*`save_state`"
    with pytest.raises(ValueError, match=match):
        mlbfgs(0.1, pack=used).update(params, state, params)


@pytest.mark.parametrize(("before", "after"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("blocks", ["all", "layer"])
def test_a_neutral_checkpoint_goes_from_one_structure_to_the_other(before, after, blocks, tmp_path):
    source, target = (mlbfgs(0.01, pack=pack, blocks=blocks, **FAST) for pack in (before, after))
    params, state, whole = make_tree(), None, []
    for tx in (source, target):
        if state is None:
            state = tx.init(params)
        else:
            save_state(tmp_path / "run", params, state, blocks=blocks)
            place = jax.eval_shape(tx.init, params)
            params, state = load_state(tmp_path / "run", params, place, blocks=blocks)
        for step in range(12):
            updates, state = jax.jit(tx.update)(gradients(params, step, ()), state, params)
            params = optax.apply_updates(params, updates)
            whole.append(params)
    params, state = make_tree(), source.init(make_tree())
    for number in range(24):
        updates, state = jax.jit(source.update)(gradients(params, number % 12, ()), state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params, whole[number])
    assert int(state[0].pairs[0]) > 2


def test_flaxs_serialization_restores_packs():
    tx, params = mlbfgs(0.1, **FAST), make_tree()
    _, state = tx.update(params, tx.init(params), params)
    data = serialization.to_bytes(state)
    restored = serialization.from_bytes(tx.init(params), data)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_map_params_treats_packs_as_no_parameters():
    tx, params = mlbfgs(0.1, **FAST), make_tree()
    state = tx.init(params)
    marked = optax.tree.map_params(
        tx, lambda leaf: "parameter", state, transform_non_params=lambda leaf: "other"
    )
    assert set(jax.tree.leaves(marked)) == {"other"}
    assert marked[0].packed == "other"
    assert_close(optax.tree.map_params(tx, lambda leaf: leaf, state), state)


@pytest.mark.parametrize("wrap", [optax.masked, optax.partition], ids=["masked", "partition"])
def test_parameters_that_a_mask_leaves_out_are_not_packed(wrap):
    params = make_tree()
    chosen = jax.tree.map(lambda leaf: leaf.ndim > 0, params)
    inner = mlbfgs(0.01, **FAST)
    tx = (
        optax.masked(inner, chosen)
        if wrap is optax.masked
        else optax.partition({True: inner, False: optax.sgd(0.1)}, chosen)
    )
    state = tx.init(params)
    for step in range(6):
        _, state = jax.jit(tx.update)(gradients(params, step, ()), state, params)
    held = state.inner_state[0] if wrap is optax.masked else state.inner_states[True].inner_state[0]
    assert held.leaf_steps.shape == (5,)
    assert not jax.tree.leaves(held.history)


# Which leaves.


def sharded(kind, spec, shape=(8, 4)):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(kind,))
    return jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_mesh_of_one_device_hinders_nothing(kind):
    params = {name: sharded(kind, PartitionSpec("x")) for name in "ab"}
    assert not jax.tree.leaves(scale_by_mlbfgs().init(params).history)


@pytest.mark.parametrize(
    ("pack", "error", "match"),
    [
        ("always", ValueError, "`pack` must be True, False or 'auto', got 'always'"),
        (1, TypeError, "`pack` must be True, False or 'auto', got 1"),
    ],
)
def test_what_pack_may_be(pack, error, match):
    with pytest.raises(error, match=match):
        mlbfgs(0.1, pack=pack)


def test_pack_with_an_axis_name_is_refused():
    with pytest.raises(ValueError, match="`pack` must not be True with `axis_name`"):
        mlbfgs(0.1, pack=True, axis_name="x")


# What XLA is given.


def abstract(leaves):
    return [jax.ShapeDtypeStruct(((40, 30), (30,), (5, 8))[i % 3], "float32") for i in range(leaves)]


def lowered(tx, leaves):
    params = abstract(leaves)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params)


def instructions(tx, leaves):
    """Instructions of the optimized program outside of fusions: what XLA generates code for, and copies."""
    text = lowered(tx, leaves).compile().as_text()
    parts = [part for part in text.split("\n\n") if not part.startswith("%fused")]
    return sum(line.startswith("  ") and " = " in line for part in parts for line in part.splitlines())


def test_a_compiled_update_is_a_fraction_of_optaxs_lbfgs_and_grows_slower():
    peer = optax.lbfgs(1e-3, memory_size=5, linesearch=None)
    few, many = (instructions(mlbfgs(1e-3, pack=True), leaves) for leaves in (12, 48))
    theirs = [instructions(peer, leaves) for leaves in (12, 48)]
    assert many < 0.6 * theirs[1]
    assert many - few < 0.25 * (theirs[1] - theirs[0])


def test_no_array_of_the_size_of_a_history_is_copied():
    text = lowered(mlbfgs(1e-3, pack=True), 12).compile().as_text()
    (history,) = jax.eval_shape(scale_by_mlbfgs(pack=True).init, abstract(12)).packed["packed_history"]
    size = history.shape[-1]
    copies = [line for line in text.splitlines() if " copy(" in line and f"{size}]" in line]
    assert f"[2,5,{size}]" in text
    assert copies == []


def conditionals(jaxpr):
    """The predicates of all conditionals in a program."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            found.append(equation.invars[0].aval.shape)
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            found += conditionals(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize("pack", [True, False])
def test_decisions_stay_decisions_in_an_ensemble(pack):
    tx = mlbfgs(0.01, pack=pack, **FAST)
    params = make_tree()
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), params)
    states = jax.vmap(tx.init)(members)
    alone = conditionals(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr)
    together = conditionals(jax.make_jaxpr(jax.vmap(tx.update))(members, states, members).jaxpr)
    assert len(alone) >= 3
    assert together == alone
    assert set(together) == {()}


@pytest.mark.parametrize("pack", [True, False])
def test_members_of_an_ensemble_learn_as_if_each_were_alone(pack):
    """Though they take pairs at different times, and one skips steps."""
    tx, count = mlbfgs(0.01, pack=pack, **FAST), 4

    def gradient(params, step, member):
        noise = make_tree(1000 * member + step)
        grads = jax.tree.map(lambda c, p, e: c * p + 0.4 * member * e, CURVATURES, params, noise)
        if member == 2 and step in (4, 11):
            grads["a"]["bias"] = grads["a"]["bias"].at[0].set(jnp.nan)
        return grads

    members = [make_tree(member) for member in range(count)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    states, state_of = [tx.init(params) for params in members], jax.jit(jax.vmap(tx.init))(stacked)
    one, every = jax.jit(tx.update), jax.jit(jax.vmap(tx.update))
    for step in range(30):
        grads = [gradient(params, step, number) for number, params in enumerate(members)]
        updates, state_of = every(jax.tree.map(lambda *g: jnp.stack(g), *grads), state_of, stacked)
        stacked = optax.apply_updates(stacked, updates)
        for number, params in enumerate(members):
            updates, states[number] = one(grads[number], states[number], params)
            members[number] = optax.apply_updates(params, updates)
            assert_close(jax.tree.map(lambda leaf, n=number: leaf[n], stacked), members[number], 1e-8)
    pairs = [int(state[0].pairs[0]) for state in states]
    assert pairs == state_of[0].pairs[:, 0].tolist()
    assert len(set(pairs)) > 1


def test_a_step_can_be_differentiated_through_a_pack():
    params, batch = make_tree(), CURVATURES

    def after(rate):
        tx = mlbfgs(rate, pack=True, **FAST)
        updates, _ = tx.update(jax.tree.map(jnp.multiply, batch, params), tx.init(params), params)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(optax.apply_updates(params, updates)))

    slope = (after(0.1 + 1e-6) - after(0.1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(after)(0.1), slope, rtol=1e-4)
