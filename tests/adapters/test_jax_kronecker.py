"""With Kronecker factors a run in JAX is the core's run on NumPy, whatever is packed, traced or batched."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_jax import load_state, mlbfgs, save_state, scale_by_mlbfgs

pytestmark = pytest.mark.backends("jax")

STRICT = {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"}
FAST = {"preconditioner": "kronecker", "history_size": 3, "update_every": 6, "precondition_frequency": 3}
AXES = {"stack": (1, 1)}
SHAPES = {
    "layer": {"bias": (4,), "kernel": (5, 4)},
    "scale": (),
    "stack": (2, 3, 4),
    "row": (1, 7),
    "vector": (3,),
}
NAMES = ["layer.bias", "layer.kernel", "row", "scale", "stack", "vector"]
"""As in the flattened tree."""
WITH_MATRIX = ["layer.kernel", "row", "stack"]


@pytest.fixture(autouse=True, scope="module")
def _strict():
    before = {name: getattr(jax.config, name) for name in STRICT}
    for name, value in STRICT.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def make_tree(seed=0, dtype="float64", shapes=None):
    rng = np.random.default_rng(seed)
    shapes = SHAPES if shapes is None else shapes
    is_shape = functools.partial(lambda kind, node: isinstance(node, kind), tuple)
    return jax.tree.map(lambda shape: jnp.asarray(rng.normal(size=shape), dtype), shapes, is_leaf=is_shape)


def gradient(params, step, *, noise=0.3):
    """Of a badly scaled quadratic, with noise."""
    curvature = make_tree(9, shapes=jax.tree.map(jnp.shape, params))
    around = make_tree(100 + step, shapes=jax.tree.map(jnp.shape, params))
    return jax.tree.map(
        lambda c, p, e: ((0.3 + c * c) * p.astype("float64") + noise * e).astype(p.dtype),
        curvature, params, around,
    )  # fmt: skip


def numpy_leaves(tree):
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None)
    return [None if leaf is None else np.array(leaf) for leaf in leaves]


def assert_close(a, b, tolerance=1e-9):
    a, b = (jax.tree.leaves(tree, is_leaf=lambda leaf: leaf is None) for tree in (a, b))
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


def types(tree):
    return jax.tree.map(jax.typeof, tree)


def moved(params, updates):
    return jax.tree.map(
        lambda u, p: p if u is None else p - 0.05 * u, updates, params, is_leaf=lambda leaf: leaf is None
    )


def method_of(settings, axes=AXES, names=NAMES, params=None, blocks="all"):
    config = core.Config(**settings)
    shapes = [leaf.shape for leaf in jax.tree.leaves(make_tree() if params is None else params)]
    matrices = adapter.matrices_in(config, names, shapes, axes)
    return core.Method(config, core.partition(names, blocks), matrices=matrices)


@functools.cache
def compiled(**settings):
    tx = scale_by_mlbfgs(matrix_axes=AXES, **settings)
    return tx, jax.jit(tx.update)


# The same run as the core's.


@pytest.mark.parametrize(
    ("settings", "blocks", "pack"),
    [
        ({}, "all", "auto"),
        ({"adaptive": False, "beta": 0.9, "preconditioner_power": 0.7}, "layer", True),
        ({"history_size": 0, "step_length": "unit"}, "all", "auto"),
        ({"max_preconditioner_dim": 4, "step_length": "clip"}, "parameter", False),
    ],
    ids=str,
)
def test_a_run_is_the_cores_on_numpy_though_vectors_are_packed(settings, blocks, pack):
    """With parameters that have no gradient for a while, and with gradients that are not finite."""
    settings = {**FAST, **settings}
    tx = scale_by_mlbfgs(matrix_axes=AXES, blocks=blocks, pack=pack, **settings)
    method, params = method_of(settings, blocks=blocks), make_tree()
    twin, state, update = method.init(numpy_leaves(params)), tx.init(params), jax.jit(tx.update)
    for step in range(36):
        grads = gradient(params, step)
        if step in range(9, 14):
            grads["layer"]["bias"] = grads["stack"] = None
        if step in (4, 17):
            grads["layer"]["kernel"] = grads["layer"]["kernel"].at[1, 2].set(np.nan)
        updates, state = update(grads, state, params)
        expected, twin = method.step(twin, numpy_leaves(params), numpy_leaves(grads))
        assert_close(updates, expected)
        params = moved(params, updates)
    assert int(state.skipped) == 2
    assert settings.get("history_size") == 0 or int(jnp.sum(state.pairs)) > 2
    for name in adapter.OF_MATRICES:
        own = jax.tree.leaves(state.preconditioner[name], is_leaf=lambda leaf: leaf is None)
        assert_close(own, twin.preconditioner[name], 1e-7)
    for name in ("pairs", "rejected", "step", "leaf_steps", "leaf_window", "leaf_prev_window"):
        np.testing.assert_array_equal(getattr(state, name), getattr(twin, name), err_msg=name)


def test_the_first_layer_learns_as_if_alone_and_so_does_every_other():
    """Each has a block of its own, and no length that all share."""
    settings = {**FAST, "step_length": "none", "adaptive": False}
    together = scale_by_mlbfgs(
        matrix_axes={"w": (1, 1)}, blocks="parameter", **{**settings, "history_size": 0}
    )
    apart = scale_by_mlbfgs(blocks="parameter", **{**settings, "history_size": 0})
    params = {"w": make_tree(shapes={"w": (3, 4, 5)})["w"]}
    layers = {str(i): params["w"][i] for i in range(3)}
    state, states = together.init(params), apart.init(layers)
    one, many = jax.jit(together.update), jax.jit(apart.update)
    for step in range(12):
        grads = gradient(params, step)
        updates, state = one(grads, state, params)
        each, states = many({str(i): grads["w"][i] for i in range(3)}, states, layers)
        assert_close(updates["w"], jnp.stack([each[str(i)] for i in range(3)]))
        params, layers = moved(params, updates), moved(layers, each)
    for name in adapter.OF_MATRICES:
        apart_ones = jnp.concatenate([states.preconditioner[name][str(i)] for i in range(3)])
        assert_close(state.preconditioner[name]["w"], apart_ones)


def test_stacked_layers_learn_as_separate_matrices_of_one_block():
    """With pairs and a common length, too."""
    together, apart = scale_by_mlbfgs(matrix_axes={"w": (1, 1)}, **FAST), scale_by_mlbfgs(**FAST)
    params = make_tree(shapes={"w": (3, 4, 5)})
    layers = {str(i): params["w"][i] for i in range(3)}
    state, states = together.init(params), apart.init(layers)
    one, many = jax.jit(together.update), jax.jit(apart.update)
    for step in range(30):
        grads = gradient(params, step)
        updates, state = one(grads, state, params)
        each, states = many({str(i): grads["w"][i] for i in range(3)}, states, layers)
        assert_close(updates["w"], jnp.stack([each[str(i)] for i in range(3)]))
        params, layers = moved(params, updates), moved(layers, each)
    assert int(state.pairs[0]) == int(states.pairs[0]) > 2


def test_flaxs_convolution_learns_as_the_matrix_of_its_rows():
    conv = scale_by_mlbfgs(matrix_axes=lambda name, shape: (0, len(shape) - 1), **FAST)
    params, plain = make_tree(shapes={"k": (3, 3, 2, 4)}), scale_by_mlbfgs(**FAST)
    flat = {"k": params["k"].reshape(18, 4)}
    state, other = conv.init(params), plain.init(flat)
    assert state.preconditioner["left_basis"]["k"].shape == (1, 18, 18)
    one, two = jax.jit(conv.update), jax.jit(plain.update)
    for step in range(14):
        grads = gradient(params, step)
        updates, state = one(grads, state, params)
        expected, other = two({"k": grads["k"].reshape(18, 4)}, other, flat)
        assert_close(updates["k"].reshape(18, 4), expected["k"])
        params, flat = moved(params, updates), moved(flat, expected)


def test_a_complex_matrix_learns_as_its_pairs_of_reals():
    pairs = make_tree(shapes={"z": (3, 2, 2)})
    params = {"z": jax.lax.complex(pairs["z"][..., 0], pairs["z"][..., 1])}
    tx = scale_by_mlbfgs(**FAST)
    update, state, other = jax.jit(tx.update), tx.init(params), tx.init(pairs)
    for _ in range(3):
        updates, state = update(params, state, params)
        expected, other = update(pairs, other, pairs)
        own = jnp.stack([updates["z"].real, updates["z"].imag], axis=-1)
        assert_close(
            own, expected["z"], 1e-6
        )  # the first step has the sign of values down to 1e-8 of the largest


def test_a_complex_vector_has_the_diagonal():
    state = scale_by_mlbfgs(**FAST).init({"z": jnp.ones(5, jnp.complex64), "w": jnp.ones((5, 3))})
    assert state.preconditioner["left_factor"]["z"] is None
    assert state.preconditioner["left_factor"]["w"].shape == (1, 5, 5)


def test_blocks_that_alternate_keep_their_parameters_counts():
    """With a parameter that has no gradient for a while; leaves of the core lie in the order of blocks."""
    settings = {"history_size": 3, "update_every": 6, "step_length": "none", "adaptive": False}
    names, params = ["a", "b", "c", "d"], make_tree(shapes=dict.fromkeys("abcd", (3,)))

    def block(name):
        return "odd" if name in "ac" else "even"

    tx = scale_by_mlbfgs(blocks=block, pack=False, **settings)
    method = core.Method(core.Config(**settings), core.partition(names, block))
    twin, state, update = method.init(numpy_leaves(params)), tx.init(params), jax.jit(tx.update)
    for step in range(16):
        grads = gradient(params, step)
        if step in range(3, 10):
            grads["b"] = None
        updates, state = update(grads, state, params)
        expected, twin = method.step(twin, numpy_leaves(params), numpy_leaves(grads))
        assert_close(updates, expected)
        params = moved(params, updates)


# The state.


def test_parameters_with_a_matrix_lie_alone_and_all_others_in_a_pack():
    tx, _ = compiled(**FAST)
    state = tx.init(make_tree())
    (history,) = state.packed["packed_history"]
    assert history.shape[:2] == (2, 3)
    held = jax.tree_util.tree_leaves_with_path(state.history)
    assert [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in held] == WITH_MATRIX
    shapes = {name: jax.tree.map(jnp.shape, state.preconditioner[name]) for name in adapter.OF_MATRICES}
    assert shapes["left_factor"]["layer"] == {"bias": None, "kernel": (1, 5, 5)}
    assert shapes["right_basis"]["stack"] == (2, 4, 4)
    assert shapes["left_factor"]["row"] is None
    assert not any(name.endswith(("factor", "basis")) for name in state.packed)
    bases = jax.tree.leaves((state.preconditioner["left_basis"], state.preconditioner["right_basis"]))
    for basis in bases:
        np.testing.assert_array_equal(basis, np.broadcast_to(np.eye(basis.shape[-1]), basis.shape))


@pytest.mark.parametrize(("pack", "history_size"), [("auto", 3), (False, 0)])
def test_init_compiled_and_abstract_has_the_structure_of_every_later_state(pack, history_size):
    settings = {**FAST, "history_size": history_size}
    tx, params = mlbfgs(0.1, pack=pack, matrix_axes=AXES, **settings), make_tree()
    state = tx.init(params)
    _, after = jax.jit(tx.update)(params, state, params)
    without = {**params, "stack": None, "layer": {"bias": None, "kernel": params["layer"]["kernel"]}}
    _, later = jax.jit(tx.update)(without, after, params)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    for other in (jax.jit(tx.init)(params), jax.eval_shape(tx.init, params), tx.init(abstract), after, later):
        assert types(other) == types(state)


def test_the_second_call_does_not_compile_and_donated_states_are_used_up():
    params, count = make_tree(), []
    tx = mlbfgs(0.01, matrix_axes=AXES, **FAST)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        count.append(1)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for number in range(5):
        grads, before = gradient(params, number), state
        params, state = step(params, state, grads)
        assert before[0].history["stack"].is_deleted()
    assert len(count) == 1


def test_a_gradient_with_a_nan_changes_nothing_not_even_factors():
    tx, update = compiled(**FAST)
    params, state = make_tree(), tx.init(make_tree())
    for step in range(7):
        if step == 2:  # bases are formed in the first step, and turned after the second
            spoilt = gradient(params, step)
            spoilt["stack"] = spoilt["stack"].at[0, 0, 0].set(jnp.inf)
            updates, after = update(spoilt, state, params)
            assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(updates))
            assert int(after.skipped) == int(state.skipped) + 1
            assert not after.accepted
            rest = {"skipped": state.skipped, "accepted": state.accepted, "due": state.due}
            jax.tree.map(np.testing.assert_array_equal, after._replace(**rest), state)
        updates, state = update(gradient(params, step), state, params)
        params = moved(params, updates)
    basis = state.preconditioner["left_basis"]["layer"]["kernel"][0]
    assert float(jnp.max(jnp.abs(basis - jnp.eye(5)))) > 0.1
    assert_close(basis.T @ basis, jnp.eye(5))


def test_half_precision_has_factors_in_float32():
    params, settings = make_tree(dtype="bfloat16"), {**FAST, "precondition_frequency": 2}
    tx, update = compiled(**settings)
    state = tx.init(params)
    for step in range(8):
        updates, state = update(gradient(params, step), state, params)
        params = jax.tree.map(lambda p, u: p - jnp.asarray(0.05, p.dtype) * u, params, updates)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"bfloat16"}
    factors = [state.preconditioner[name] for name in adapter.OF_MATRICES]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(factors)} == {"float32"}
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves((factors, params)))


@pytest.mark.filterwarnings("error")
def test_float32_without_x64_has_no_warning():
    with jax.enable_x64(False):
        tx, params = scale_by_mlbfgs(**FAST), {"w": jnp.ones((3, 4)), "b": jnp.ones(3)}
        state = tx.init(params)
        for _ in range(2):
            _, state = tx.update(params, state, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32", "bool"}


# Transformations of JAX and optax.


def test_scanned_steps_are_the_same_steps():
    tx, update = compiled(**FAST)
    params, grads = make_tree(), [gradient(make_tree(), step) for step in range(14)]
    state = tx.init(params)

    def body(carry, grad):
        updates, state = tx.update(grad, carry[1], carry[0])
        return (moved(carry[0], updates), state), None

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *grads)
    scanned, _ = jax.jit(functools.partial(jax.lax.scan, body))((params, state), stacked)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = moved(params, updates)
    assert_close(scanned, (params, state))


def test_members_of_an_ensemble_learn_as_if_each_were_alone():
    """Though one skips steps, so that bases are turned at different times."""
    tx, update = compiled(**FAST)
    members = [make_tree(member) for member in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    states, state_of = [tx.init(params) for params in members], jax.jit(jax.vmap(tx.init))(stacked)
    every = jax.jit(jax.vmap(tx.update))
    for step in range(16):
        grads = [gradient(params, 7 * step + i, noise=0.2 * i) for i, params in enumerate(members)]
        if step in (0, 5):
            grads[1]["layer"]["kernel"] = grads[1]["layer"]["kernel"].at[0, 0].set(jnp.nan)
        updates, state_of = every(jax.tree.map(lambda *g: jnp.stack(g), *grads), state_of, stacked)
        stacked = moved(stacked, updates)
        for i, params in enumerate(members):
            updates, states[i] = update(grads[i], states[i], params)
            members[i] = moved(params, updates)
            assert_close(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), members[i], 1e-8)
    assert [int(state.skipped) for state in states] == [0, 2, 0]
    assert [int(state.pairs[0]) for state in states] == state_of.pairs[:, 0].tolist()


def test_map_params_takes_factors_for_no_parameters():
    tx, params = mlbfgs(0.1, pack=False, matrix_axes=AXES, **FAST), make_tree()
    state = tx.init(params)
    names = jax.tree.map(lambda _: "with its parameter", params)
    marked = optax.tree.map_params(
        tx, lambda leaf, name: name, state, names, transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marked[0].history)) == {"with its parameter"}
    assert set(jax.tree.leaves(marked[0].preconditioner["exp_avg_sq"])) == {"with its parameter"}
    assert {marked[0].preconditioner[name] for name in adapter.OF_MATRICES} == {"other"}
    same = optax.tree.map_params(mlbfgs(0.1, **FAST), lambda leaf: leaf, mlbfgs(0.1, **FAST).init(params))
    assert types(same) == types(mlbfgs(0.1, **FAST).init(params))


def test_a_mask_leaves_out_matrices():
    params = make_tree()
    chosen = jax.tree.map(lambda leaf: leaf.ndim != 2, params)
    tx = optax.masked(scale_by_mlbfgs(**FAST), chosen)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(3):
        grads = gradient(params, step)
        updates, state = update(grads, state, params)
        assert_close(updates["row"], grads["row"])
    held = state.inner_state.preconditioner["left_factor"]
    assert [leaf.shape for leaf in jax.tree.leaves(held)] == [(1, 2, 2)]


def test_numbers_may_change_during_a_run():
    factory = optax.inject_hyperparams(mlbfgs, static_args=("history_size", "max_preconditioner_dim"))
    settings = {**FAST, "factor_beta": 0.9, "max_preconditioner_dim": 64}
    tx, plain, params = factory(0.01, **settings), mlbfgs(0.01, **settings), make_tree()
    state, other = tx.init(params), plain.init(params)
    update, expected = jax.jit(tx.update), jax.jit(plain.update)
    for step in range(8):
        grads = gradient(params, step)
        updates, state = update(grads, state, params)
        same, other = expected(grads, other, params)
        assert_close(updates, same)
        params = optax.apply_updates(params, updates)
    assert {"factor_beta", "precondition_frequency"} <= set(state.hyperparams)
    rare = {**state.hyperparams, "precondition_frequency": jnp.asarray(1000, jnp.int32)}
    _, after = update(gradient(params, 9), state._replace(hyperparams=rare), params)
    name = "left_basis"
    jax.tree.map(
        np.testing.assert_array_equal,
        after.inner_state[0].preconditioner[name],
        state.inner_state[0].preconditioner[name],
    )


# Checkpoints.


def test_a_run_goes_on_from_a_neutral_checkpoint_bit_for_bit(tmp_path):
    tx = mlbfgs(0.01, matrix_axes=AXES, **FAST)
    params, state, update = make_tree(), None, jax.jit(tx.update)

    def train(params, state, first, last):
        for step in range(first, last):
            grads = gradient(params, step)
            grads["vector"] = grads["stack"] = None
            updates, state = update(grads, state, params)
            params = moved(params, jax.tree.map(lambda u: -u, updates))
        return params, state

    params, state = train(params, tx.init(params), 0, 16)
    save_state(tmp_path / "run", params, state)
    (found,) = core.load_state(tmp_path / "run")
    assert list(found.names) == NAMES
    for name in adapter.OF_MATRICES:
        held = jax.tree.leaves(state[0].preconditioner[name], is_leaf=lambda leaf: leaf is None)
        for own, array, leaf in zip(held, found.state.preconditioner[name], NAMES, strict=True):
            assert (own is None) == (array is None), (name, leaf)
            if own is not None:
                np.testing.assert_array_equal(own, array)
    unused = found.state.preconditioner["left_basis"][NAMES.index("stack")]
    np.testing.assert_array_equal(unused, np.broadcast_to(np.eye(3), (2, 3, 3)))
    other, place = make_tree(5), jax.eval_shape(tx.init, params)
    loaded = load_state(tmp_path / "run", other, place)
    assert types(loaded) == types((params, state))
    jax.tree.map(np.testing.assert_array_equal, loaded, (params, state))
    for resumed, whole in zip(train(*loaded, 16, 24), train(params, state, 16, 24), strict=True):
        jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_a_checkpoint_of_the_core_on_numpy_goes_on_in_jax(tmp_path):
    tx, update = compiled(**FAST)
    method, params = method_of(FAST), make_tree()
    leaves = numpy_leaves(params)
    twin, shape = method.init(leaves), jax.tree.structure(params)
    for step in range(10):
        updates, twin = method.step(twin, leaves, numpy_leaves(gradient(shape.unflatten(leaves), step)))
        leaves = [leaf - 0.05 * update for leaf, update in zip(leaves, updates, strict=True)]
    run = core.Snapshot(tuple(NAMES), ((*range(6),),), twin, tuple(leaves), (None,) * 6)
    core.save_state(tmp_path / "run", [run])
    params, state = load_state(tmp_path / "run", params, tx.init(params))
    for step in range(10, 20):
        grads = gradient(params, step)
        expected, twin = method.step(twin, numpy_leaves(params), numpy_leaves(grads))
        updates, state = update(grads, state, params)
        assert_close(updates, expected)
        params = moved(params, updates)


def test_a_checkpoint_of_other_matrices_is_refused(tmp_path):
    params = {"w": jnp.ones((2, 3, 4))}
    tx, other = scale_by_mlbfgs(matrix_axes={"w": (1, 1)}, **FAST), scale_by_mlbfgs(**FAST)
    _, state = tx.update(params, tx.init(params), params)
    save_state(tmp_path / "run", params, state)
    with pytest.raises(ValueError, match="must hold for 'left_factor/w' float64 of shape"):
        load_state(tmp_path / "run", params, other.init(params))


# Errors.


@pytest.mark.parametrize(
    "make", [scale_by_mlbfgs, functools.partial(mlbfgs, 0.1)], ids=["scale_by", "mlbfgs"]
)
def test_sharded_axes_are_refused(make):
    match = "`axis_name` must be None with preconditioner='kronecker', got 'x'"
    with pytest.raises(ValueError, match=match):
        make(preconditioner="kronecker", axis_name="x")


@pytest.mark.parametrize(
    ("axes", "error", "match"),
    [
        ({"wrong": (1, 1)}, ValueError, "`matrix_axes` must hold names of parameters"),
        ({"vector": (1, 1)}, ValueError, "`matrix_axes` must leave axes for the columns"),
        ([(0, 1)], TypeError, "`matrix_axes` must be None, a mapping of names or a function"),
        ({"stack": 2}, ValueError, "`matrix_axes` must give None or two ints"),
    ],
)
def test_what_matrix_axes_may_be(axes, error, match):
    with pytest.raises(error, match=match):
        scale_by_mlbfgs(preconditioner="kronecker", matrix_axes=axes).init(make_tree())


def test_a_traced_largest_side_is_refused():
    tx = optax.inject_hyperparams(mlbfgs)(0.1, preconditioner="kronecker", max_preconditioner_dim=8)
    with pytest.raises(TypeError, match="`max_preconditioner_dim` must be an int, since it decides"):
        tx.init(make_tree())


def test_a_matrix_sharded_over_explicit_axes_is_refused():
    mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Explicit,))
    shard = jax.ShapeDtypeStruct((8, 4), "float32", sharding=NamedSharding(mesh, PartitionSpec("x")))
    match = "`preconditioner` must not be 'kronecker' where a matrix is sharded over explicit axes"
    with pytest.raises(ValueError, match=match):
        scale_by_mlbfgs(**FAST).init({"w": shard})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"matrix_axes": {"w": (1, 1)}}, "float64 of shape (2, 3, 3) for 'left_factor' of 'w'"),
        ({"max_preconditioner_dim": 2}, "nothing for 'right_factor' of 'w'"),
        ({"preconditioner": "diagonal", "pack": False}, "nothing for 'left_factor' of 'w'"),
    ],
    ids=str,
)
def test_a_state_of_other_matrices_is_refused(settings, told):
    params = {"w": jnp.ones((2, 3, 4))}
    state = scale_by_mlbfgs(**FAST).init(params)
    match = re.escape(f"`state` must be of these settings and `matrix_axes`, which give {told}, got one with")
    with pytest.raises(ValueError, match=match):
        scale_by_mlbfgs(**{**FAST, **settings}).update(params, state, params)


def test_a_diagonal_state_is_refused():
    params = {"w": jnp.ones((3, 4))}
    state = scale_by_mlbfgs(pack=False, history_size=3).init(params)
    with pytest.raises(ValueError, match=r"`state` must be of these.*'left_factor' of 'w'.*nothing"):
        scale_by_mlbfgs(pack=False, **FAST).update(params, state, params)


# What XLA is given.


def test_a_step_that_turns_no_basis_copies_no_history():
    tx = mlbfgs(1e-3, preconditioner="kronecker")
    params = [jax.ShapeDtypeStruct(shape, "float32") for shape in ((24, 16), (16,), (16, 12), (10,))]

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    text = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile().as_text()
    copies = {
        part.split(" ", 1)[0]
        for part in text.split("\n\n")
        for line in part.splitlines()
        if re.search(r" = f32\[2,5,(24,16|16,12)\]\S* copy\(", line)
    }
    assert "f32[2,5,24,16]" in text
    # In the branch alone that turns the rows.
    assert len(copies) <= 1
    assert "ENTRY" not in copies


def test_products_have_full_precision_on_every_device():
    tx, params = scale_by_mlbfgs(**FAST), {"w": jnp.ones((3, 4), "float32")}
    program = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    products = program.split("dot_general[")[1:]
    assert len(products) > 20
    assert all("Precision.HIGHEST" in product[:400] for product in products)
