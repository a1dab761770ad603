"""`mlbfgs_jax` behaves as an optax transformation should, and does what the core says."""

from __future__ import annotations

import contextlib
import inspect
import operator

import array_api_compat.numpy
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_jax import MLBFGSState, load_state, mlbfgs, save_state, scale_by_mlbfgs

pytestmark = pytest.mark.backends("jax")

FAST = {"check_every": 1, "update_every": 4, "history_size": 3}
STRICT = {"jax_numpy_rank_promotion": "raise", "jax_numpy_dtype_promotion": "strict"}
STRICTEST = {**STRICT, "jax_debug_nans": True, "jax_debug_infs": True, "jax_check_tracer_leaks": True}
"""The settings with which JAX's users look for faults, of their own or of others, at three times the cost."""

IN_SLOW = pytest.param(STRICTEST, id="strictest", marks=pytest.mark.slow)
STRICT_ALONE = pytest.mark.parametrize("_strict", [pytest.param(STRICT, id="strict")], indirect=True)
"""For tests of many cases, of which the strictest settings find nothing that they do not find elsewhere."""
STRICTEST_ALONE = pytest.mark.parametrize("_strict", [IN_SLOW], indirect=True)


@contextlib.contextmanager
def configured(**settings):
    """JAX with other settings for a while."""
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module", params=[pytest.param(STRICT, id="strict"), IN_SLOW])
def _strict(request):
    """All of this file holds with all of them; a test that needs another setting says why."""
    with configured(**request.param):
        yield


def make_params(dtype="float32", seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": {"kernel": jax.random.normal(keys[0], (4, 6), dtype), "bias": jnp.zeros(6, dtype)},
        "last": {"kernel": jax.random.normal(keys[1], (6, 2), dtype)},
    }


def predict(params, x):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None, :])
    return hidden @ params["last"]["kernel"]


def make_batches(steps, dtype="float32"):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(steps, 16, 4))
    return jnp.asarray(x, dtype), jnp.asarray(np.sin(x[..., :2]), dtype)


def loss(params, batch):
    x, y = batch
    return jnp.mean((predict(params, x) - y) ** 2)


def stepper(tx):
    """One step, to be compiled with parameters and state donated."""

    def step(params, state, batch):
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


def falling(steps):
    """A schedule; those of optax promote the dtype of the count."""
    return lambda count: 0.1 * (1 - count.astype("float32") / steps)


def train(tx, params, batches, state=None):
    state = tx.init(params) if state is None else state
    run = jax.jit(stepper(tx))
    for batch in zip(*batches, strict=True):
        params, state = run(params, state, batch)
    return params, state


def types(tree):
    """What a compiled function sees of its arguments: shapes, dtypes, weak types, shardings."""
    return jax.tree.map(jax.typeof, tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def numpy_leaves(tree):
    """Leaves for the core on NumPy."""
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


# What it computes.


@STRICT_ALONE
@pytest.mark.parametrize(("blocks", "pack"), [("all", True), ("layer", True), ("layer", False)])
@pytest.mark.parametrize(
    "settings",
    [
        FAST,
        {"preset": "lbfgs"},
        *({"preset": name, "update_every": 6} for name in ("fit", "paper", "formulas")),
    ],
    ids=str,
)
def test_directions_are_the_cores(settings, blocks, pack):
    params, batches = make_params("float64"), make_batches(20, "float64")
    tx, config = scale_by_mlbfgs(blocks=blocks, pack=pack, **settings), core.Config(**settings)
    update, state = jax.jit(tx.update), tx.init(params)
    partition = core.partition(["first.bias", "first.kernel", "last.kernel"], blocks)
    twin = core.Method(config, partition).init(numpy_leaves(params))
    for batch in zip(*batches, strict=True):
        grads = jax.grad(loss)(params, batch)
        updates, state = update(grads, state, params)
        expected, twin = core.Method(config, blocks=partition).step(
            twin, numpy_leaves(params), numpy_leaves(grads)
        )
        assert_close(jax.tree.leaves(updates), expected, rtol=1e-9, atol=1e-11)
        params = jax.tree.map(lambda p, u: p - 0.05 * u, params, updates)
    assert int(twin.pairs[0]) > 0
    assert_close(state.gram, twin.gram, rtol=1e-8, atol=1e-10)
    assert pack or jax.tree.structure(state.history) == jax.tree.structure(params)


def test_mlbfgs_is_a_chain_of_optaxs_parts():
    schedule = falling(30)
    chain = optax.chain(
        scale_by_mlbfgs(pack=False, **FAST),
        optax.trace(0.8, nesterov=True),
        optax.add_decayed_weights(0.01),
        optax.scale_by_learning_rate(schedule),
    )
    params, batches = make_params("float64"), make_batches(25, "float64")
    ours, state = train(mlbfgs(schedule, 0.8, 0.01, pack=False, **FAST), params, batches)
    theirs, other = train(chain, params, batches)
    assert_close(ours, theirs)
    assert types(state) == types(other)


def test_weight_decay_takes_a_mask_as_adamw_does():
    params, batches = make_params(), make_batches(10)
    mask = jax.tree.map(lambda p: p.ndim > 1, params)
    params["first"]["bias"] = params["first"]["bias"] + 1.0
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = mlbfgs(0.1, weight_decay=0.5, mask=mask, **FAST)
    updates, _ = tx.update(zero, tx.init(params), params)
    np.testing.assert_allclose(updates["first"]["kernel"], -0.05 * params["first"]["kernel"], rtol=1e-6)
    assert not np.any(updates["first"]["bias"])
    train(tx, params, batches)


ENDS = [
    (momentum, nesterov, decay)
    for momentum in (0.0, 0.8)
    for nesterov in (False, True)
    for decay in (0.0, 0.3)
]


@STRICT_ALONE
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("momentum", "nesterov", "decay"), ENDS)
def test_the_end_of_a_step_is_the_cores(momentum, nesterov, decay, dtype):
    """Momentum, weight decay and learning rate, on a skipped step and for parameters that are not finite."""
    with configured(jax_debug_nans=False, jax_debug_infs=False):
        params, spoilt = {"w": jnp.asarray([1.0, -2.0, 3.0, jnp.inf, jnp.nan, -4.0], dtype)}, {4, 7}
        tx = mlbfgs(0.125, momentum, decay, nesterov=nesterov, **FAST)
        directions, kernels = scale_by_mlbfgs(**FAST), core.Kernels(array_api_compat.numpy)
        state, other = tx.init(params), directions.init(params)
        averages = adapter.accumulation_dtype(params["w"])
        own = np.array(params["w"].astype("float64"))
        buffer = np.zeros(6) if momentum else None
        end = adapter.StepEnd(1.0, 0.125, momentum, decay, nesterov)
        rng = np.random.default_rng(0)
        for step in range(10):
            grads = {"w": jnp.asarray(rng.normal(size=6) + (np.nan if step in spoilt else 0.0), averages)}
            update, other = jax.jit(directions.update)(grads, other, params)
            updates, state = jax.jit(tx.update)(grads, state, params)
            keep = np.asarray(step not in spoilt)
            before = own.copy()
            after, buffer = kernels.apply(own, np.array(update["w"], "float64"), buffer, end, keep)
            # The chain tells of a change, which is added to the parameter and rounded with it.
            new = (params["w"].astype(averages) + updates["w"]).astype(dtype)
            bound = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 2**-8}[dtype]
            np.testing.assert_allclose(np.asarray(new, "float64"), after, rtol=bound, atol=bound)
            assert np.any(after[:3] != before[:3]) == keep
            params, own = {"w": new}, np.array(new, "float64")


def test_momentum_is_the_presets():
    params = make_params()
    assert isinstance(mlbfgs(0.1).init(params)[1], optax.TraceState)
    assert isinstance(mlbfgs(0.1, preset="fit").init(params)[1], optax.EmptyState)
    assert isinstance(mlbfgs(0.1, 0.5, preset="fit").init(params)[1], optax.TraceState)


def optaxs_chain(nesterov, **settings):
    """The directions through optax's own momentum."""
    directions = scale_by_mlbfgs(**settings)
    return optax.chain(directions, optax.trace(0.9, nesterov=nesterov), optax.scale_by_learning_rate(0.05))


@pytest.mark.parametrize("nesterov", [True, False])
def test_nesterov_is_that_of_optax(nesterov):
    params, batches = make_params(), make_batches(20)
    ours, _ = train(mlbfgs(0.05, 0.9, nesterov=nesterov, **FAST), params, batches)
    expected, _ = train(optaxs_chain(nesterov, **FAST), params, batches)
    other, _ = train(optaxs_chain(not nesterov, **FAST), params, batches)
    assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # two programs, in float32
    with pytest.raises(AssertionError):
        assert_close(ours, other, rtol=1e-2, atol=1e-3)


@STRICT_ALONE
@pytest.mark.parametrize(
    ("preset", "nesterov"),
    [("default", True), ("paper", False), ("formulas", False), ("lbfgs", False), ("fit", False)],
)
def test_momentum_looks_ahead_as_the_preset_says(preset, nesterov):
    params, batches = make_params("float64"), make_batches(20, "float64")
    ours, _ = train(mlbfgs(0.05, 0.9, preset=preset), params, batches)
    expected, _ = train(optaxs_chain(nesterov, preset=preset), params, batches)
    assert_close(ours, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_non_finite_gradient_costs_its_step_only(bad):
    params, batches = make_params(), make_batches(30)
    tx = mlbfgs(falling(40), 0.9, 0.01, **FAST)
    params, state = train(tx, params, jax.tree.map(lambda x: x[:12], batches))
    grads = jax.grad(loss)(params, (batches[0][12], batches[1][12]))
    spoilt = np.array(grads["first"]["bias"])
    spoilt[2] = bad
    grads["first"]["bias"] = jax.device_put(spoilt)  # JAX would refuse to compute such a one
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    assert int(after[0].skipped) == 1
    assert not after[0].accepted
    left = after[0]._replace(skipped=state[0].skipped, accepted=state[0].accepted)
    assert_same((left, *after[1:]), state)
    rest = jax.tree.map(lambda x: x[12:], batches)
    assert_same(train(tx, params, rest, after)[0], train(tx, params, rest, state)[0])


def test_products_ask_for_full_precision_whatever_the_default_is():
    params, grads = jnp.ones((200, 100)), jnp.ones((200, 100))
    tx = scale_by_mlbfgs(**FAST)
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(tx.update).lower(grads, tx.init(params), params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "func" not in line]
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


@pytest.mark.parametrize(
    "settings", [FAST, {"history_dtype": "bfloat16", **FAST}, {"preset": "lbfgs"}], ids=str
)
def test_complex_parameters_count_as_pairs_of_reals(settings):
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.normal(size=(8, 3)) + 1j * rng.normal(size=(8, 3)), "complex128")
    start = jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3), "complex128")

    def descend(x, f):
        tx = mlbfgs(0.05, 0.5, **settings)

        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jax.tree.map(jnp.conj, jax.grad(f)(x)), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=25)[0]

    def real(pair):
        return jnp.sum(jnp.abs(matrix @ jax.lax.complex(pair[:, 0], pair[:, 1])) ** 2)

    as_complex, state = descend(start, lambda x: jnp.sum(jnp.abs(matrix @ x) ** 2))
    as_real, _ = descend(jnp.stack([start.real, start.imag], axis=-1), real)
    assert as_complex.dtype == "complex128"
    assert_close(as_complex, jax.lax.complex(as_real[:, 0], as_real[:, 1]))
    assert int(state[0].pairs[0]) > 0


# What it takes and gives.


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        *((dtype, {}) for dtype in ("float16", "bfloat16", "float32", "float64", "complex64")),
        ("bfloat16", {"preset": "lbfgs"}),
        ("float32", {"history_dtype": "bfloat16"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("pack", [True, False])
def test_state_keeps_its_types_and_the_update_has_the_gradients(dtype, settings, pack):
    params, grads = make_params(dtype), make_params(dtype, seed=1)
    tx = mlbfgs(0.1, pack=pack, **settings)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(grads, state, params)
    assert types(after) == types(state)
    assert types(updates) == types(grads)
    expected = "float64" if dtype == "float64" else "float32"
    averages = state[0].packed["packed_mean_grads"][0] if pack else state[0].mean_grads["first"]["bias"]
    assert averages.dtype == expected
    assert state[0].gamma.dtype == expected


def test_gradients_of_another_dtype_than_the_parameters():
    params, grads = make_params("float32"), make_params("bfloat16", seed=1)
    tx = mlbfgs(0.1, **FAST)
    updates, state = tx.update(grads, tx.init(params), params)
    assert types(updates) == types(grads)
    assert types(state) == types(tx.init(params))


def test_half_precision_runs_in_float32_and_is_rounded_once():
    params = jax.tree.map(lambda p: p.astype("bfloat16"), make_params())
    grads = jax.tree.map(lambda p: p.astype("bfloat16"), make_params(seed=1))
    tx = mlbfgs(0.1, 0.9, 0.01, pack=False, **FAST)
    wide = jax.tree.map(lambda p: p.astype("float32"), (grads, params))
    state, other = tx.init(params), tx.init(wide[1])
    for _ in range(6):
        updates, state = tx.update(grads, state, params)
        expected, other = tx.update(wide[0], other, wide[1])
        assert_same(updates, jax.tree.map(lambda u: u.astype("bfloat16"), expected))
    assert state[1].trace["first"]["bias"].dtype == "float32"


def test_init_takes_abstract_parameters():
    params = make_params()
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tx = mlbfgs(0.1, **FAST)
    assert types(tx.init(abstract)) == types(tx.init(params)) == types(jax.eval_shape(tx.init, abstract))


@pytest.mark.parametrize("dtype", ["bfloat16", "complex64"])
def test_init_takes_abstract_parameters_of_other_dtypes(dtype):
    params = make_params(dtype)
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    tx = mlbfgs(0.1)
    assert types(tx.init(abstract)) == types(tx.init(params))


def test_map_params_reaches_every_tree_of_the_state():
    params, tx = make_params(), mlbfgs(0.1, pack=False, **FAST)
    state = tx.init(params)
    assert_same(optax.tree.map_params(tx, lambda x: x, state), state)
    specs = optax.tree.map_params(
        tx,
        lambda leaf, spec: PartitionSpec(*(None,) * (leaf.ndim - len(spec)), *spec),
        state,
        jax.tree.map(lambda p: PartitionSpec(*"xyz"[: p.ndim]), params),
        transform_non_params=lambda _: PartitionSpec(),
    )
    assert specs[0].history["first"]["kernel"] == PartitionSpec(None, None, "x", "y")
    assert (
        specs[0].preconditioner["exp_avg_sq"]["first"]["bias"]
        == specs[1].trace["first"]["bias"]
        == PartitionSpec("x")
    )
    assert specs[0].gram == PartitionSpec()


def test_none_leaves_in_parameters_and_gradients():
    params, batches = make_params(), make_batches(12)
    tx = mlbfgs(0.1, **FAST)
    holes = {"model": params, "static": None}
    state, other = tx.init(holes), tx.init(params)
    for batch in zip(*batches, strict=True):
        grads = jax.grad(loss)(params, batch)
        updates, state = tx.update({"model": grads, "static": None}, state, holes)
        expected, other = tx.update(grads, other, params)
        assert_close(updates["model"], expected)
    assert updates["static"] is None


def test_a_parameter_without_gradient_keeps_still():
    params, batches = make_params(), make_batches(12)
    tx = mlbfgs(0.1, weight_decay=0.1, pack=False, **FAST)
    state = before = tx.init(params)
    update = jax.jit(tx.update)
    for batch in zip(*batches, strict=True):
        grads = jax.grad(loss)(params, batch)
        updates, state = update({**grads, "last": {"kernel": None}}, state, params)
        assert updates["last"]["kernel"] is None
        params["first"] = optax.apply_updates(params["first"], updates["first"])
    assert types(state) == types(before)
    assert int(state[0].pairs[0]) > 0
    assert not np.any(state[0].mean_grads["last"]["kernel"])
    assert not np.any(state[1].trace["last"]["kernel"])


@pytest.mark.parametrize("empty", [{}, (), {"a": None}, []], ids=str)
def test_empty_trees(empty):
    tx = mlbfgs(0.1, weight_decay=0.1)
    state = tx.init(empty)
    updates, after = jax.jit(tx.update)(empty, state, empty)
    assert updates == empty
    assert types(after) == types(state)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2)], ids=str)
def test_scalars_and_leaves_without_values(shape):
    params = {"x": jnp.ones(shape), "y": jnp.ones(3)}
    tx = mlbfgs(0.1, **FAST)
    state = tx.init(params)
    for _ in range(8):
        updates, state = tx.update(jax.tree.map(lambda x: 3 * x, params), state, params)
        params = optax.apply_updates(params, updates)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)))
    assert np.all(params["y"] < 1)


def test_extra_arguments_are_ignored():
    params, tx = make_params(), mlbfgs(0.1, **FAST)
    update = jax.jit(tx.update)
    state = tx.init(params)
    assert_same(update(params, state, params), update(params, state, params, value=1.0, other=jnp.ones(3)))


# How it composes.


@pytest.fixture
def _donating():
    """When JAX checks for non-finite values it keeps the arguments, so that it can repeat the computation."""
    with configured(jax_debug_nans=False, jax_debug_infs=False):
        yield


@pytest.mark.usefixtures("_donating")
def test_one_compilation_and_donation_from_the_first_call():
    params, batches = make_params(), make_batches(12)
    tx = mlbfgs(0.1, **FAST)
    state = tx.init(params)
    run = jax.jit(stepper(tx), donate_argnums=(0, 1))
    for count, batch in enumerate(zip(*batches, strict=True)):
        before = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.ndim > 1]
        params, state = run(params, state, batch)
        assert all(leaf.is_deleted() for leaf in before), count
    assert run._cache_size() == 1


def test_initial_state_can_be_donated_when_init_is_compiled():
    params, tx = make_params(), mlbfgs(0.1, **FAST)
    state = jax.jit(tx.init)(params)
    assert types(state) == types(tx.init(params))
    jax.jit(tx.update, donate_argnums=1)(make_params(seed=1), state, params)


@pytest.mark.usefixtures("_donating")
@pytest.mark.parametrize("preset", [None, "paper", "formulas", "lbfgs"])
def test_a_compiled_step_holds_no_second_copy_of_the_history(preset):
    n, tx = 100_000, mlbfgs(0.1, preset=preset, history_size=10)  # larger than what else a step holds
    params = jnp.ones(n)
    state = tx.init(params)

    def step(params, state):
        updates, state = tx.update(jax.grad(lambda p: jnp.sum(p**4))(params), state, params)
        return optax.apply_updates(params, updates), state

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(params, state).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= 0.99 * memory.argument_size_in_bytes
    assert memory.temp_size_in_bytes < 0.8 * state[0].history.nbytes


def test_scan_gives_what_single_steps_give():
    params, batches = make_params("float64"), make_batches(20, "float64")
    tx = mlbfgs(0.1, **FAST)
    step = stepper(tx)
    scanned, _ = jax.lax.scan(
        lambda carry, batch: (step(*carry, batch), None), (params, tx.init(params)), batches
    )
    assert_close((scanned), train(tx, params, batches))


def test_steps_outside_jit_give_what_compiled_steps_give():
    params, batches = make_params(), make_batches(8)
    tx = mlbfgs(0.1, **FAST)
    expected, _ = train(tx, params, batches)
    state = tx.init(params)
    for batch in zip(*batches, strict=True):
        params, state = stepper(tx)(params, state, batch)
    assert_close(params, expected)


def test_an_ensemble_of_64_models_trains_at_once():
    tx, batches = mlbfgs(0.1, **FAST), make_batches(25)
    step = stepper(tx)

    def one(seed, batches):
        params = make_params(seed=seed)
        carry = (params, tx.init(params))
        return jax.lax.scan(lambda carry, batch: (step(*carry, batch), loss(carry[0], batch)), carry, batches)

    (models, states), losses = jax.jit(jax.vmap(one, in_axes=(0, None)))(jnp.arange(64), batches)
    assert losses.shape == (64, 25)
    assert np.all(np.asarray(losses[:, -1]) < 0.5 * np.asarray(losses[:, 0]))
    assert np.all(np.asarray(states[0].pairs) > 0)
    for seed in (0, 17, 63):
        (alone, _), _ = jax.jit(one)(seed, batches)
        assert_close(jax.tree.map(operator.itemgetter(seed), models), alone, rtol=1e-3, atol=1e-4)


def test_layers_are_blocks_whatever_their_leaves_are_called():
    params = {"attention": {"query": jnp.ones(2), "value": jnp.ones(2)}, "out": {"value": jnp.ones(2)}}
    assert scale_by_mlbfgs(blocks="layer").init(params).pairs.shape == (2,)


def test_masked_and_partition_see_their_leaves_only():
    params, batches = make_params(), make_batches(12)
    labels = jax.tree.map(lambda p: "curved" if p.ndim > 1 else "plain", params)
    tx = optax.partition({"curved": mlbfgs(0.1, **FAST), "plain": optax.sgd(0.1)}, labels)
    trained, state = train(tx, params, batches)
    assert loss(trained, (batches[0][0], batches[1][0])) < loss(params, (batches[0][0], batches[1][0]))
    inner = optax.tree.get(state, "leaf_steps")
    assert inner.shape == (2,)
    masked = optax.masked(mlbfgs(0.1, **FAST), jax.tree.map(lambda p: p.ndim > 1, params))
    updates, _ = masked.update(params, masked.init(params), params)
    assert_same(updates["first"]["bias"], params["first"]["bias"])


@pytest.fixture
def _promoting():
    """For parts of optax that promote dtypes: its schedules, and `MultiSteps`."""
    with configured(jax_numpy_dtype_promotion="standard"):
        yield


@pytest.mark.usefixtures("_promoting")
def test_multi_steps_accumulates_and_then_steps_once():
    params, batches = make_params(), make_batches(8)
    every_two = optax.MultiSteps(mlbfgs(0.1, **FAST), 2)
    state = every_two.init(params)
    for batch in zip(*batches, strict=True):
        updates, state = jax.jit(every_two.update)(jax.grad(loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.inner_opt_state[0].step) == 4


def test_every_number_can_be_injected_and_traced():
    numbers = {
        "learning_rate": 0.1, "momentum": 0.8, "weight_decay": 0.01, "beta": 0.7, "min_cosine": 0.3,
        "signal_to_noise": 3.0, "noise_floor": 3.0, "clip_factor": 2.5, "preconditioner_beta": 0.9,
        "preconditioner_power": 0.5, "update_every": 4, "check_every": 2, "shrinkage": 0.5,
    }  # fmt: skip
    fixed = {"step_length": "clip", "history_size": 3}
    injected = optax.inject_hyperparams(mlbfgs, static_args=("history_size",))(**numbers, **fixed)
    params, batches = make_params(), make_batches(20)
    ours, state = train(injected, params, batches)
    expected, _ = train(mlbfgs(**numbers, **fixed), params, batches)
    assert set(state.hyperparams) == set(numbers)
    assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    after, _ = train(injected, ours, batches, state)
    assert_same(after, ours)


def test_injecting_the_history_size_says_that_it_is_static():
    params = make_params()
    tx = optax.inject_hyperparams(mlbfgs)(learning_rate=0.1, history_size=3)
    with pytest.raises(TypeError, match="`history_size` must be an int"):
        jax.jit(tx.init)(params)


def test_a_schedule_counts_accepted_steps():
    params, tx = make_params(), mlbfgs(lambda count: 0.1 / (1 + count.astype("float32")), momentum=0.0)
    grads, state = make_params(seed=1), tx.init(params)
    norms, size = [], optax.tree.size(params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        norms.append(float(optax.tree.norm(updates)))
    assert norms[0] == pytest.approx(0.1 * size**0.5, rel=1e-5)
    assert int(state[-1].count) == 3


@pytest.mark.parametrize("static", [(), ("learning_rate",)])
def test_an_injected_schedule_counts_every_update_and_a_static_one_accepted_steps(static):
    """`optax.inject_hyperparams` calls the schedule itself, and does not know about skipped steps."""
    inject = optax.inject_hyperparams(mlbfgs, static_args=("history_size", *static))
    tx = inject(lambda count: 0.125 / (1 + count.astype("float32")), 0.0)
    plain = mlbfgs(lambda count: 0.125 / (1 + count.astype("float32")), 0.0)
    params, spoilt = {"w": np.ones(4, "float32")}, {"w": np.asarray([1, 1, np.nan, 1], "float32")}
    state, other, sizes = tx.init(params), plain.init(params), []
    for grads in (params, spoilt, spoilt, params):
        updates, state = tx.update(jax.device_put(grads), state, params)
        expected, other = plain.update(jax.device_put(grads), other, params)
        sizes.append((-float(updates["w"][0]), -float(expected["w"][0])))
    np.testing.assert_allclose([plain for _, plain in sizes], [0.125, 0, 0, 0.0625], rtol=1e-6)
    ours = [0.125, 0, 0, 0.0625 if static else 0.03125]  # the first or the third of the schedule
    np.testing.assert_allclose([injected for injected, _ in sizes], ours, rtol=1e-6)


def test_a_whole_step_can_be_differentiated():
    params, batch = make_params("float64"), jax.tree.map(lambda x: x[0], make_batches(1, "float64"))

    def after(rate):
        tx = mlbfgs(rate, **FAST)
        new, _ = stepper(tx)(params, tx.init(params), batch)
        return loss(new, batch)

    slope = (after(0.1 + 1e-6) - after(0.1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(after)(0.1), slope, rtol=1e-5)


# How strict JAX may be.

PRESETS = [{}, FAST, {"preset": "paper", "update_every": 4}, {"preset": "lbfgs"}, {"preset": "fit"}]
VARIANTS = [
    *({"step_length": length, **FAST} for length in ("rms", "unit", "clip", "none")),
    {"preconditioner_power": 0.3, "beta": 0.9, "damping": (0.01, 10.0, 0.9), **FAST},
    {"history_dtype": "bfloat16", "blocks": "parameter", **FAST},
]


def settle(tx, dtype, steps=9, without=None):
    """Parameters and state after steps on a quadratic, with a gradient of zero at first."""
    rng = np.random.default_rng(0)

    def leaf(*shape):
        values = rng.normal(size=shape)
        return jnp.asarray(values + 1j * rng.normal(size=shape) if "complex" in dtype else values, dtype)

    params = {"w": leaf(4, 3), "scalar": leaf(), "large": leaf(150, 120)}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(steps):
        slope = min(step, 1) / 2
        grads = jax.tree.map(lambda x, slope=slope: x * jnp.asarray(slope, x.dtype), params)
        if without:
            grads[without] = None
        updates, state = update(grads, state, params)
        params = {name: p if updates[name] is None else p + updates[name] for name, p in params.items()}
    for part in jax.tree.leaves((params, state)):
        assert np.all(np.isfinite(np.asarray(part).astype(complex)))
    return params, state


@STRICTEST_ALONE
@pytest.mark.parametrize("settings", [*PRESETS, *VARIANTS], ids=str)
def test_the_strictest_jax_takes_every_setting_as_well_without_x64(settings):
    with configured(jax_enable_x64=False):
        settle(mlbfgs(0.01, 0.5, 0.1, **settings), "float32")


@STRICTEST_ALONE
@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "complex64"])
@pytest.mark.parametrize("settings", [{}, FAST, {"step_length": "clip", **FAST}], ids=str)
def test_the_strictest_jax_takes_every_dtype(settings, dtype):
    settle(mlbfgs(0.01, 0.5, 0.1, **settings), dtype)


@STRICTEST_ALONE
def test_the_strictest_jax_takes_masks_and_chains_and_missing_gradients():
    def matrices(params):
        return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)

    settle(optax.masked(mlbfgs(0.01, **FAST), matrices), "float32")
    settle(optax.chain(optax.clip_by_global_norm(1.0), mlbfgs(0.01, **FAST)), "float32")
    settle(mlbfgs(falling(30), **FAST), "float32")
    settle(mlbfgs(0.01, 0.5, 0.1, **FAST), "float32", without="scalar")


@STRICT_ALONE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64"])
def test_injected_numbers_do_what_plain_ones_do_in_every_dtype_of_the_parameters(dtype):
    """`optax.inject_hyperparams` gives them the dtype of the parameters, a complex one if need be."""
    numbers = {"momentum": 0.5, "weight_decay": 0.125, "beta": 0.75, "min_cosine": 0.25, "update_every": 4}
    numbers |= {"preconditioner_power": 0.5, "shrinkage": 0.5, "check_every": 2}  # exact in bfloat16
    fixed = {"step_length": "clip", "history_size": 3}
    injected = optax.inject_hyperparams(mlbfgs, static_args=("history_size",))
    params, state = settle(injected(0.0625, **numbers, **fixed), dtype)
    expected, _ = settle(mlbfgs(0.0625, **numbers, **fixed), dtype)
    bound = 1e-2 if dtype == "bfloat16" else 1e-4
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        difference = np.asarray(one).astype(complex) - np.asarray(other).astype(complex)
        assert np.all(np.abs(difference) <= bound)
    assert types(state) == types(injected(0.0625, **numbers, **fixed).init(params))


@pytest.mark.usefixtures("_promoting")
def test_injected_numbers_do_not_widen_the_state_where_dtypes_are_mixed():
    params = {
        "narrow": jnp.ones(3, "float32"),
        "wide": jnp.ones(3, "float64"),
        "half": jnp.ones(2, "bfloat16"),
    }
    tx = optax.inject_hyperparams(mlbfgs, static_args=("history_size",))(0.1, 0.5, 0.1, history_size=3)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(params, state, params)
    assert types(after) == types(state)
    assert types(updates) == types(params)


def test_gradients_wider_than_their_parameters_do_not_widen_the_state():
    params, tx = make_params("float32"), mlbfgs(0.1, 0.9, 0.1, **FAST)
    narrow = wide = tx.init(params)
    for seed in range(6):
        grads = make_params("float32", seed)
        expected, narrow = tx.update(grads, narrow, params)
        updates, wide = tx.update(jax.tree.map(lambda g: g.astype("float64"), grads), wide, params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(updates)} == {"float64"}
        assert_same(jax.tree.map(lambda u: u.astype("float32"), updates), expected)
    assert types(wide) == types(narrow) == types(tx.init(params))
    assert_same(wide, narrow)


@pytest.mark.skipif(
    not jax.tree.leaves(optax.add_decayed_weights(lambda count: 0.1).init({})),
    reason="this version of optax takes no schedule of weight decay",
)
@pytest.mark.parametrize("mask", [None, True, {"w": True}, lambda params: {"w": True}])
def test_a_schedule_of_weight_decay_counts_accepted_steps(mask):
    tx = mlbfgs(1.0, 0.0, lambda count: 0.5 / (1 + count.astype("float32")), mask=mask)
    params = {"w": np.ones(4, "float32")}
    zero, spoilt = {"w": np.zeros(4, "float32")}, {"w": np.asarray([0, np.inf, 0, 0], "float32")}
    state, sizes = tx.init(params), []
    for grads in (zero, spoilt, zero):
        updates, state = tx.update(jax.device_put(grads), state, params)
        sizes.append(-float(updates["w"][0]))
    np.testing.assert_allclose(sizes, [0.5, 0, 0.25], rtol=1e-6)
    assert types(state) == types(tx.init(params))


def test_a_mask_of_decay_takes_gradients_of_none():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    tx = mlbfgs(0.1, 0.0, 0.5, mask={"w": True, "b": False})
    updates, state = tx.update({"w": jnp.zeros((2, 2)), "b": None}, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.05, rtol=1e-6)
    assert updates["b"] is None
    assert types(state) == types(tx.init(params))
    updates, _ = tx.update({"w": None, "b": jnp.zeros(2)}, state, params)
    assert updates["w"] is None
    assert not np.any(updates["b"])


# Without pairs.

NO_PAIRS = [{"history_size": 0}, {"history_size": 0, "preconditioner": "none"}]


def base_optimizer(preconditioner):
    """What is left, of parts of optax: a direction of root mean square 1, momentum, decay and rate."""

    def normalized(updates, state, params=None):
        del params
        factor = jnp.sqrt(jnp.asarray(optax.tree.size(updates), "float64")) / optax.tree.norm(updates)
        return jax.tree.map(lambda u: u * factor, updates), state

    adam = optax.scale_by_adam(b1=0.0, b2=0.99, eps=0.0) if preconditioner == "diagonal" else optax.identity()
    return optax.chain(
        adam,
        optax.GradientTransformation(lambda params: optax.EmptyState(), normalized),
        optax.trace(0.9, nesterov=True),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )


@pytest.mark.usefixtures("_promoting")
@pytest.mark.parametrize("settings", NO_PAIRS, ids=str)
def test_without_pairs_the_base_optimizer_is_left(settings):
    params, batches = make_params("float64"), make_batches(30, "float64")
    ours, state = train(mlbfgs(0.01, weight_decay=0.1, **settings), params, batches)
    theirs, _ = train(base_optimizer(settings.get("preconditioner", "diagonal")), params, batches)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    assert int(state[0].step) == 30
    assert not np.any(state[0].pairs)


@pytest.mark.parametrize("settings", [*NO_PAIRS, {}, {"preconditioner": "none"}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_state_has_the_planned_bytes(settings, dtype):
    params = make_params(dtype)
    plan = core.plan_memory(core.Config(**settings), jax.tree.leaves(params))
    state = jax.jit(scale_by_mlbfgs(pack=False, **settings).init)(params)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == plan.total
    state = jax.jit(scale_by_mlbfgs(pack=True, **settings).init)(params)
    assert plan.total <= sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= plan.total * (1 + 1 / 64)


@pytest.mark.usefixtures("_promoting")
@pytest.mark.parametrize("settings", NO_PAIRS, ids=str)
def test_without_pairs_it_is_an_optax_transformation_like_any_other(settings):
    params, batches = make_params(), make_batches(4)
    injected = optax.inject_hyperparams(mlbfgs, static_args=("history_size",))
    for tx in (
        mlbfgs(falling(20), 0.9, 0.1, **settings),
        injected(0.1, momentum=0.5, **settings),
        optax.MultiSteps(mlbfgs(0.1, **settings), 2),
        optax.masked(mlbfgs(0.1, **settings), jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.partition({"a": mlbfgs(0.1, **settings), "b": optax.sgd(0.1)}, {"first": "a", "last": "b"}),
    ):
        state = tx.init(params)
        step = jax.jit(stepper(tx), donate_argnums=(0, 1))
        now = jax.tree.map(jnp.copy, params)
        for batch in zip(*batches, strict=True):
            now, state = step(now, state, batch)
        assert step._cache_size() == 1
        assert types(state) == types(tx.init(params)) == types(jax.jit(tx.init)(params))
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((now, state)))
        marked = optax.tree.map_params(tx, lambda p: p, state, transform_non_params=lambda _: None)
        assert len(jax.tree.leaves(marked)) < len(jax.tree.leaves(state))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("settings", NO_PAIRS, ids=str)
def test_without_pairs_a_run_goes_on_from_a_file(settings, momentum, tmp_path):
    params, batches = make_params("float64"), make_batches(12, "float64")
    tx = mlbfgs(0.01, momentum, **settings)
    half, rest = (jax.tree.map(lambda x, part=part: x[part], batches) for part in (slice(6), slice(6, 12)))
    middle, state = train(tx, params, half)
    save_state(tmp_path / "run.safetensors", middle, state)
    restored, resumed = load_state(tmp_path / "run.safetensors", params, jax.eval_shape(tx.init, params))
    assert_same((restored, resumed), (middle, state))
    assert_same(train(tx, restored, rest, resumed), train(tx, params, batches))


def test_a_state_of_other_settings_is_refused():
    params = make_params()
    state = scale_by_mlbfgs(preconditioner="none").init(params)
    with pytest.raises(ValueError, match="`state` must be of these settings, got one without 'exp_avg_sq'"):
        scale_by_mlbfgs().update(params, state, params)


# What it refuses.


def cast(dtype):
    return lambda params: jax.tree.map(lambda p: p.astype(dtype), params)


CHANGED = {
    "wider": (cast("float64"), r"averages in float32 of shape \(6,\) at 'first.bias', got float64 of shape"),
    "complex": (cast("complex64"), r"averages in float32 of shape \(6,\) at 'first.bias', got complex64"),
    "of another shape": (
        lambda p: {**p, "last": {"kernel": jnp.ones((6, 5), "float32")}},
        r"averages in float32 of shape \(6, 2\) at 'last.kernel', got float32 of shape \(6, 5\)",
    ),
    "more": (
        lambda p: {**p, "new": jnp.ones(2, "float32")},
        r"the tree that `init` has seen, got one without \[\] and with \['new'\] in addition",
    ),
    "fewer": (
        lambda p: {"first": p["first"]},
        r"the tree that `init` has seen, got one without \['last.kernel'\] and with \[\] in addition",
    ),
    "of other names": (
        lambda p: {"first": p["first"], "end": p["last"]},
        r"got one without \['last.kernel'\] and with \['end.kernel'\] in addition",
    ),
}


@STRICT_ALONE
@pytest.mark.parametrize("name", CHANGED)
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda: mlbfgs(0.1, 0.9, 0.1),
        scale_by_mlbfgs,
        lambda: optax.inject_hyperparams(mlbfgs, static_args=("history_size",))(0.1),
    ],
    ids=["mlbfgs", "scale_by_mlbfgs", "injected"],
)
def test_parameters_that_are_no_longer_as_init_has_seen_them_are_refused_by_name(name, compiled, wrap):
    change, told = CHANGED[name]
    params, tx = make_params(), wrap()
    state = tx.init(params)
    changed = change(params)
    with pytest.raises(ValueError, match="`params` must be .*" + told):
        (jax.jit(tx.update) if compiled else tx.update)(changed, state, changed)


def test_parameters_in_float32_are_refused_where_init_has_seen_float64():
    tx = mlbfgs(0.1)
    state = tx.init(make_params("float64"))
    with pytest.raises(ValueError, match=r"averages in float64 .* at 'first.bias', got float32 of shape"):
        tx.update(make_params(), state, make_params())


@pytest.mark.parametrize("wrong", ["params", "file"])
def test_a_checkpoint_of_parameters_of_another_dtype_is_refused_by_name(wrong, tmp_path):
    params, tx = make_params(), mlbfgs(0.1)
    state, wide = tx.init(params), make_params("float64")
    save_state(tmp_path / "run.safetensors", params, state)
    if wrong == "file":
        with pytest.raises(ValueError, match=r"'params/first.bias' float64 of shape \(6,\), got float32"):
            load_state(tmp_path / "run.safetensors", wide, tx.init(wide))
        return
    told = r"`params` must be .* float32 of shape \(6,\) at 'first.bias', got float64"
    with pytest.raises(ValueError, match=told):
        load_state(tmp_path / "run.safetensors", wide, state)
    with pytest.raises(ValueError, match=told):
        save_state(tmp_path / "other.safetensors", wide, state)


def test_a_run_goes_on_in_float64_from_a_state_that_was_widened():
    """As the page shows: what was learned in float32 remains useful, to the precision of float64."""
    curvature = jnp.asarray(np.geomspace(0.05, 1, 20))
    params, tx = {"x": jnp.ones(20, "float32")}, mlbfgs(0.5, preset="lbfgs")
    state, update = tx.init(params), jax.jit(tx.update)

    def descend(params, state, steps):
        for _ in range(steps):
            dtype = params["x"].dtype
            grads = {"x": curvature.astype(dtype) * (params["x"] - jnp.asarray(1 / 3, dtype))}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = descend(params, state, 40)
    wide, wide_state = jax.tree.map(
        lambda x: x.astype("float64") if x.dtype == "float32" else x, (params, state)
    )
    assert types(wide_state) == types(tx.init(wide))
    assert np.abs(wide["x"] - 1 / 3).max() > 1e-9
    wide, _ = descend(wide, wide_state, 100)
    assert np.abs(wide["x"] - 1 / 3).max() < 1e-12


def test_parameters_of_another_dtype_with_the_same_averages_go_on():
    """A state of bfloat16 parameters is also a state of float32 parameters."""
    tx = mlbfgs(0.1, **FAST)
    half, state = make_params("bfloat16"), tx.init(make_params("bfloat16"))
    _, state = tx.update(half, state, half)
    _, after = tx.update(make_params(), state, make_params())
    assert types(after) == types(state)


@pytest.mark.parametrize(
    ("grads", "told"),
    [
        (
            {"w": jnp.ones(2), "z": jnp.ones(2, complex)},
            r"float\d+ of shape \(3,\), at 'w', got float\d+ .*\(2,\)",
        ),
        ({"w": jnp.ones(3, complex), "z": jnp.ones(2, complex)}, "at 'w', got complex"),
        ({"w": jnp.ones(3), "z": jnp.ones(2)}, "complex.* at 'z', got float"),
        ({"w": jnp.ones(3, int), "z": None}, "at 'w', got int"),
        ({"w": jnp.ones(3)}, "a tree like that of `params`, with None for a parameter without a gradient"),
        ([jnp.ones(3), jnp.ones(2)], "a tree like that of `params`"),
    ],
)
def test_gradients_that_do_not_fit_are_refused_by_the_name_of_their_parameter(grads, told):
    params, tx = {"w": jnp.ones(3), "z": jnp.ones(2, complex)}, mlbfgs(0.1, 0.9, 0.1)
    with pytest.raises(ValueError, match="`grads` must be .*" + told):
        tx.update(grads, tx.init(params), params)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, np.asarray], ids=repr)
def test_numbers_of_numpy_are_numbers(kind):
    params, results = make_params(), []
    for made in (float, kind):
        tx = mlbfgs(
            made(0.125), made(0.5), made(0.25), min_cosine=made(0.25), history_size=np.int32(3), pack=False
        )
        updates, state = tx.update(params, tx.init(params), params)
        assert state[0].history["first"]["bias"].shape == (2, 3, 6)
        results.append(updates)
    assert_same(*results)
    assert isinstance(mlbfgs(0.1, kind(0)).init(params)[1], optax.EmptyState)


def test_the_signature_names_every_setting_and_the_schedule():
    signature = inspect.signature(mlbfgs)
    assert signature.parameters["learning_rate"].annotation == optax.ScalarOrSchedule
    expected = inspect.signature(core.Config).parameters
    for factory in (mlbfgs, scale_by_mlbfgs):
        own = inspect.signature(factory).parameters
        assert {*adapter.SETTINGS, "preset"} <= set(own)
        assert {name: own[name].default for name in expected} == {
            name: parameter.default for name, parameter in expected.items()
        }


@STRICT_ALONE
@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: mlbfgs(-0.1), ValueError, r"`learning_rate` must be finite and >= 0, got -0.1"),
        (lambda: mlbfgs("0.1"), TypeError, r"`learning_rate` must be finite and >= 0, got '0.1'"),
        (lambda: mlbfgs(np.float32(-1)), ValueError, r"`learning_rate` must be finite and >= 0, got -1.0"),
        (lambda: mlbfgs(np.ones(1)), TypeError, r"`learning_rate` must be finite .*, got array\(\[1.\]\)"),
        (lambda: mlbfgs(0.1, np.asarray(1)), ValueError, r"`momentum` must be in \[0, 1\), got 1"),
        (lambda: mlbfgs(0.1, 1.0), ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
        (lambda: mlbfgs(0.1, nesterov=1), TypeError, r"`nesterov` must be a bool, got 1"),
        (lambda: mlbfgs(0.1, weight_decay=-1), ValueError, r"`weight_decay` must be finite and >= 0, got -1"),
        (lambda: mlbfgs(0.1, memory=3), TypeError, r"unknown setting `memory`; the settings are learning"),
        (lambda: mlbfgs(lr=0.1), TypeError, r"unknown setting `lr`; `learning_rate` is its name here"),
        (lambda: mlbfgs(0.1, memory_size=3), TypeError, r"`memory_size`; `history_size` is its name here"),
        (lambda: scale_by_mlbfgs(history_size=-1), ValueError, r"`history_size` must be >= 0, got -1"),
        (lambda: mlbfgs(0.1, metric_power=0.5), TypeError, r"`metric_power`; it is now `precond"),
        (lambda: mlbfgs(0.1, preconditioner="full"), ValueError, r"`preconditioner` must be one of .*'full'"),
        (lambda: scale_by_mlbfgs().init({"n": jnp.arange(3)}), TypeError,
         r"`params` must be floating-point or complex arrays .* got int.* at 'n'"),
        (lambda: mlbfgs(0.1).init({"a": {"b": 1.0}}), TypeError, r"`params` must be .* got float at 'a.b'"),
        (lambda: scale_by_mlbfgs(blocks="layer").init(jnp.ones(3)), ValueError, "`blocks`='layer' needs"),
        (lambda: mlbfgs(0.1).update(jnp.ones(3), mlbfgs(0.1).init(jnp.ones(3))), ValueError,
         r"`params` must be given to `update`, got None"),
        (lambda: mlbfgs(0.1).update(jnp.ones(2), mlbfgs(0.1).init(jnp.ones(3)), jnp.ones(3)), ValueError,
         r"`grads` must be like the parameter, .* of shape \(3,\), at '', got .* of shape \(2,\)"),
    ],
)  # fmt: skip
def test_bad_arguments_name_the_argument_the_rule_and_the_value(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_state_is_the_cores():
    state = scale_by_mlbfgs().init(jnp.ones(3))
    assert isinstance(state, MLBFGSState)
    assert isinstance(state, core.State)
    assert int(core.diagnostics(state).step) == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda g: list(g.values()), r"got a list, PyTreeDef\(\[\*, \*\]\), for PyTreeDef"),
        (lambda g: {"w": g["w"]}, "got none for 'b'"),
        (lambda g: g | {"c": g["b"]}, "got one for 'c'"),
        (lambda g: (jnp.ones(()), g), "got a pair whose second part is one"),
        (lambda g: None, "got a NoneType"),
        (lambda g: g | {"b": (jnp.ones(()), g["b"])}, "got one for 'b.0'"),
    ],
)
def test_a_tree_of_gradients_of_another_form_is_refused_with_what_is_wrong(wrong, words):
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    tx = mlbfgs(1e-3)
    with pytest.raises(ValueError, match=f"`grads` must be a tree like that of `params`, .*{words}"):
        tx.update(wrong(params), tx.init(params), params)


@pytest.mark.parametrize(
    "wrong", [lambda g: (jnp.ones(()), g), lambda g: [g], lambda g: {"w": g}], ids=range(3)
)
def test_a_gradient_of_another_form_for_a_single_array_is_refused(wrong):
    params = jnp.ones(3)
    tx = mlbfgs(1e-3)
    with pytest.raises(ValueError, match="`grads` must be a tree like that of `params`"):
        tx.update(wrong(params), tx.init(params), params)
