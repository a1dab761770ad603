"""In the libraries that train with JAX, `mlbfgs` does what a built-in optimizer of optax does: Flax (Linen
and NNX), Equinox, Orbax, and optax's own wrappers."""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, traverse_util
from flax.training.train_state import TrainState
from orbax.checkpoint.experimental import v1 as ocp1

from mlbfgs_jax import MLBFGSState, mlbfgs

FAST = {"adaptive": False, "update_every": 2, "history_size": 3}
"""A pair every other step, so that short tests run on the quasi-Newton path."""

STEPS = 30
PLAIN = mlbfgs(optax.cosine_decay_schedule(0.007, STEPS), weight_decay=0.01, **FAST)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.1), PLAIN)
DEFAULT = mlbfgs(0.007, check_every=1, update_every=5, history_dtype="bfloat16")
KRONECKER = mlbfgs(0.007, check_every=1, update_every=5, preconditioner="kronecker")


class Linen(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, inputs):
        hidden = nn.Dense(32, param_dtype=self.dtype)(inputs)
        return nn.Dense(2, param_dtype=self.dtype)(nn.tanh(hidden))


LINEN = Linen()


class Nnx(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.hidden, self.out = nnx.Linear(4, 32, rngs=rngs), nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, inputs):
        return self.out(nnx.tanh(self.hidden(inputs)))


def make_equinox(seed=0):
    return eqx.nn.MLP(4, 2, width_size=32, depth=1, activation=jnp.tanh, key=jax.random.key(seed))


def make_data(steps=STEPS, size=32):
    """Batches of inputs and of noiseless targets, which the models can learn, six of them in turn."""
    rng = np.random.default_rng(0)
    mixing = 0.5 * rng.standard_normal((4, 2))
    inputs = rng.standard_normal((6, size, 4))
    epoch = [
        (jnp.asarray(batch, jnp.float32), jnp.asarray(np.sin(batch @ mixing), jnp.float32))
        for batch in inputs
    ]
    return [epoch[step % 6] for step in range(steps)]


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def make_state(tx, seed=0, model=LINEN, params=None):
    """A train state, put on the device and with an array for its counter, as after a step: `jax.jit` tells
    Python's integers, and arrays without a device, from these."""
    if params is None:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 4)))
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx).replace(step=jnp.zeros((), int))
    return jax.device_put(state, jax.devices()[0])


def train_step(state, batch):
    def loss(params):
        return squared_error(state.apply_fn(params, batch[0]), batch[1])

    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


compiled = jax.jit(train_step)


def train(state, data, step=compiled):
    """State and losses after the steps of a plain loop."""
    losses = []
    for batch in data:
        state, loss = step(state, batch)
        losses.append(loss)
    return state, np.asarray(losses)


@functools.cache
def plain_run():
    """The run with which others are compared."""
    return train(make_state(PLAIN), make_data())


def memory(opt_state):
    """The state of `scale_by_mlbfgs` inside another."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, MLBFGSState))
    (found,) = [node for node in nodes if isinstance(node, MLBFGSState)]
    return found


def assert_same(a, b):
    """Equality to the last bit of two trees, of their structures and of their dtypes."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b)), strict=True):
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def assert_close(a, b, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def assert_quasi_newton(opt_state):
    """Pairs have been stored, so the steps were not those of plain momentum."""
    assert np.all(np.asarray(memory(opt_state).pairs) > 0)


def assert_learned(losses, ratio=0.2):
    """The mean loss of the last epoch is far below the first loss."""
    assert np.mean(losses[-6:]) < ratio * losses[0]


# Flax Linen


def test_linen_training_lowers_the_loss():
    state, losses = plain_run()
    assert_learned(losses)
    assert int(state.step) == STEPS
    assert_quasi_newton(state.opt_state)


def test_a_step_that_donates_its_state_compiles_once_and_changes_no_bit():
    step = jax.jit(lambda state, batch: train_step(state, batch), donate_argnums=0)
    state, losses = train(make_state(PLAIN), make_data(), step)
    assert step._cache_size() == 1
    assert_same(state, plain_run()[0])
    assert_same(losses, plain_run()[1])


def test_bfloat16_parameters_learn_with_averages_in_float32():
    tx = mlbfgs(optax.cosine_decay_schedule(0.007, STEPS), pack=False, **FAST)
    state, losses = train(make_state(tx, model=Linen(jnp.bfloat16)), make_data())
    assert_learned(losses)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    found = memory(state.opt_state)
    averages = found.mean_params, found.mean_grads, found.prev_params, found.prev_grads, found.preconditioner
    momentum = optax.tree_utils.tree_get(state.opt_state, "trace")
    assert {leaf.dtype for leaf in jax.tree.leaves((averages, momentum))} == {jnp.dtype(jnp.float32)}
    assert_quasi_newton(state.opt_state)


# Flax NNX


def nnx_step(wrt):
    @nnx.jit
    def step(parts, batch):
        model, optimizer = parts
        value, grads = nnx.value_and_grad(
            lambda model: squared_error(model(batch[0]), batch[1]), argnums=nnx.DiffState(0, wrt)
        )(model)
        optimizer.update(model, grads)
        return value

    return lambda parts, batch: (parts, step(parts, batch))


def test_an_nnx_optimizer_takes_the_steps_of_plain_optax():
    model = Nnx()
    layers = {"Dense_0": model.hidden, "Dense_1": model.out}
    params = {name: {"kernel": layer.kernel[...], "bias": layer.bias[...]} for name, layer in layers.items()}
    expected, expected_losses = train(make_state(PLAIN, params={"params": params}), make_data())
    optimizer = nnx.Optimizer(model, PLAIN, wrt=nnx.Param)
    _, losses = train((model, optimizer), make_data(), nnx_step(nnx.Param))
    assert_close(losses, expected_losses)
    for name, layer in layers.items():
        assert_close(layer.kernel[...], expected.params["params"][name]["kernel"])
    assert_learned(losses)
    assert_quasi_newton(nnx.as_pure(optimizer.opt_state))


def test_nnx_parameters_left_out_by_wrt_stay_as_they_are():
    model, wrt = Nnx(), nnx.All(nnx.Param, nnx.PathContains("out"))
    frozen = nnx.as_pure(nnx.state(model.hidden))
    optimizer = nnx.Optimizer(model, PLAIN, wrt=wrt)
    _, losses = train((model, optimizer), make_data(), nnx_step(wrt))
    assert_same(nnx.as_pure(nnx.state(model.hidden)), frozen)
    assert_learned(losses, 0.5)
    assert_quasi_newton(nnx.as_pure(optimizer.opt_state))


def test_nnx_layers_are_blocks():
    model = Nnx()
    optimizer = nnx.Optimizer(model, mlbfgs(0.007, blocks="layer", **FAST), wrt=nnx.Param)
    train((model, optimizer), make_data(8), nnx_step(nnx.Param))
    assert nnx.as_pure(optimizer.opt_state)[0].pairs.shape == (2,)
    assert_quasi_newton(nnx.as_pure(optimizer.opt_state))


# Equinox


def equinox_step(tx, static=None):
    """A step, and the list that grows when it is compiled; `static` is the part that does not learn."""
    traces = []

    @eqx.filter_jit
    def step(parts, batch):
        traces.append(None)
        model, opt_state = parts

        def loss(model):
            model = model if static is None else eqx.combine(model, static)
            return squared_error(jax.vmap(model)(batch[0]), batch[1])

        value, grads = eqx.filter_value_and_grad(loss)(model)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return (eqx.apply_updates(model, updates), opt_state), value

    return step, traces


def test_an_equinox_model_takes_the_steps_of_plain_optax():
    model = make_equinox()
    params = {
        f"Dense_{index}": {"kernel": layer.weight.T, "bias": layer.bias}
        for index, layer in enumerate(model.layers)
    }
    _, expected = train(make_state(PLAIN, params={"params": params}), make_data())
    step, traces = equinox_step(PLAIN)
    start = model, PLAIN.init(eqx.filter(model, eqx.is_inexact_array))
    (_, opt_state), losses = train(start, make_data(), step)
    assert_close(losses, expected)
    assert_learned(losses)
    assert len(traces) == 1
    assert_quasi_newton(opt_state)


def last_layer(model):
    spec = jax.tree.map(lambda _: False, model)
    return eqx.tree_at(lambda tree: (tree.layers[1].weight, tree.layers[1].bias), spec, (True, True))


def test_the_frozen_part_of_an_equinox_model_stays_as_it_is():
    model = make_equinox()
    learning, static = eqx.partition(model, last_layer(model))
    step, _ = equinox_step(PLAIN, static)
    (learned, opt_state), losses = train((learning, PLAIN.init(learning)), make_data(), step)
    trained = eqx.combine(learned, static)
    assert_same(trained.layers[0], model.layers[0])
    assert_learned(losses, 0.5)
    assert_quasi_newton(opt_state)


def test_an_equinox_leaf_whose_gradient_is_none_stays_as_it_is():
    model, batch = make_equinox(), make_data(1)[0]
    tx = mlbfgs(0.007, weight_decay=0.1, **FAST)

    @eqx.filter_jit
    def step(model, opt_state):
        grads = eqx.filter_grad(lambda model: squared_error(jax.vmap(model)(batch[0]), batch[1]))(model)
        grads = eqx.tree_at(lambda tree: tree.layers[0].weight, grads, None)
        updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), opt_state

    trained, opt_state = model, tx.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(8):
        trained, opt_state = step(trained, opt_state)
    assert_same(trained.layers[0].weight, model.layers[0].weight)
    assert not np.array_equal(trained.layers[1].weight, model.layers[1].weight)
    assert_quasi_newton(opt_state)


# Checkpoints


def standard_checkpointer(state, target, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.eval_shape(lambda: target))


def orbax_v1(state, target, path):
    ocp1.save(path, state)
    return ocp1.load(path, jax.tree.map(ocp.utils.to_shape_dtype_struct, target))


def flax_bytes(state, target, path):
    path.write_bytes(flax.serialization.to_bytes(state))
    restored = flax.serialization.from_bytes(target, path.read_bytes())  # NumPy's arrays
    return jax.device_put(restored, jax.devices()[0])


each_checkpoint = pytest.mark.parametrize("checkpoint", [standard_checkpointer, orbax_v1, flax_bytes])


@each_checkpoint
@pytest.mark.parametrize(
    "tx", [PLAIN, DEFAULT, KRONECKER], ids=["fixed interval", "adaptive, bfloat16 history", "kronecker"]
)
def test_a_restored_run_goes_on_bit_for_bit(tmp_path, tx, checkpoint):
    data = make_data()
    half, _ = train(make_state(tx), data[:15])
    restored = checkpoint(half, make_state(tx, seed=1), tmp_path / "checkpoint")
    state, _ = train(restored, data[15:])
    assert_same(state, train(make_state(tx), data)[0])
    assert_quasi_newton(state.opt_state)


@each_checkpoint
@pytest.mark.parametrize("preset", ["default", "fit", "lbfgs", "paper", "formulas"])
def test_every_array_of_every_preset_comes_back(tmp_path, preset, checkpoint):
    target = make_state(mlbfgs(0.007, preset=preset, history_size=3))
    leaves, treedef = jax.tree.flatten(target)
    state = treedef.unflatten([(leaf + number).astype(leaf.dtype) for number, leaf in enumerate(leaves)])
    assert_same(checkpoint(state, target, tmp_path / "checkpoint"), state)


# Optax's wrappers


def test_clipping_in_front_is_clipping_by_hand():
    def by_hand(state, batch):
        def loss(params):
            return squared_error(state.apply_fn(params, batch[0]), batch[1])

        value, grads = jax.value_and_grad(loss)(state.params)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
        scale = jnp.minimum(1.0, 0.1 / norm)
        grads = jax.tree.map(lambda leaf: scale * leaf, grads)
        return state.apply_gradients(grads=grads), value

    expected, _ = train(make_state(PLAIN), make_data(), jax.jit(by_hand))
    state, losses = train(make_state(CLIPPED), make_data())
    assert_close(state.params, expected.params)
    assert_learned(losses)
    assert_quasi_newton(state.opt_state)


def test_parameters_stand_still_after_the_end_of_a_schedule():
    state, _ = plain_run()
    later, _ = train(state, make_data(3))
    assert_same(later.params, state.params)
    assert int(memory(later.opt_state).step) == STEPS + 3


def test_accumulated_gradients_are_those_of_the_big_batch():
    small = [
        (inputs[i : i + 8], targets[i : i + 8]) for inputs, targets in make_data() for i in range(0, 32, 8)
    ]
    state, _ = train(make_state(optax.MultiSteps(PLAIN, every_k_schedule=4)), small)
    expected, losses = plain_run()
    assert_close(state.params, expected.params)
    assert_learned(losses)
    assert int(memory(state.opt_state).step) == STEPS
    assert_quasi_newton(state.opt_state)


ADAMW = optax.adamw(0.01, weight_decay=0.0)


def is_matrix(params):
    return jax.tree.map(lambda leaf: leaf.ndim == 2, params)


def is_other(params):
    return jax.tree.map(lambda leaf: leaf.ndim != 2, params)


@functools.cache
def separate_run():
    """Parameters after a run in which each part has its optimizer and knows nothing of the other."""

    @jax.jit
    def step(parts, batch):
        def loss(params):
            return squared_error(LINEN.apply(traverse_util.unflatten_dict(params), batch[0]), batch[1])

        params, (matrix_state, other_state) = parts
        value, grads = jax.value_and_grad(loss)(params)
        updates, matrix_state = PLAIN.update(only(grads, 2), matrix_state, only(params, 2))
        others, other_state = ADAMW.update(only(grads, 1), other_state, only(params, 1))
        return (optax.apply_updates(params, {**updates, **others}), (matrix_state, other_state)), value

    def only(tree, ndim):
        return {path: leaf for path, leaf in tree.items() if leaf.ndim == ndim}

    params = traverse_util.flatten_dict(make_state(PLAIN).params)
    states = PLAIN.init(only(params, 2)), ADAMW.init(only(params, 1))
    (params, _), _ = train((params, states), make_data(), step)
    return traverse_util.unflatten_dict(params)


@pytest.mark.parametrize(
    "tx",
    [
        optax.partition({True: PLAIN, False: ADAMW}, is_matrix),
        optax.chain(optax.masked(PLAIN, is_matrix), optax.masked(ADAMW, is_other)),
    ],
    ids=["partition", "masked"],
)
def test_matrices_and_the_rest_have_an_optimizer_each(tx):
    state, losses = train(make_state(tx), make_data())
    assert_close(state.params, separate_run())
    assert_learned(losses)
    assert_quasi_newton(state.opt_state)


# Gradients that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("tx", [PLAIN, CLIPPED], ids=["plain", "clipped"])
def test_a_batch_without_a_finite_gradient_changes_nothing(tx, value):
    data = make_data()
    before, _ = train(make_state(tx), data[:11])
    inputs, targets = data[11]
    after, loss = compiled(before, (inputs, targets.at[3, 1].set(value)))
    assert not np.isfinite(loss)
    assert_same(after.params, before.params)
    momentum = functools.partial(optax.tree_utils.tree_get, key="trace")
    assert_same(momentum(after.opt_state), momentum(before.opt_state))
    found = memory(after.opt_state)
    assert_same(found._replace(skipped=found.skipped - 1, accepted=~found.accepted), memory(before.opt_state))
    # Training goes on as if the batch had not been.
    resumed, _ = train(after, data[11:20])
    assert_same(resumed.params, train(before, data[11:20])[0].params)
    assert_quasi_newton(resumed.opt_state)


# Ensembles


ENSEMBLE = 8
vectorized = jax.jit(jax.vmap(train_step))


def make_ensemble():
    keys = jax.random.split(jax.random.key(0), ENSEMBLE)

    def create(key):
        params = LINEN.init(key, jnp.zeros((1, 4)))
        state = TrainState.create(apply_fn=LINEN.apply, params=params, tx=PLAIN)
        return state.replace(step=jnp.zeros((), int))

    return jax.device_put(jax.vmap(create)(keys), jax.devices()[0])


def member(tree, number):
    return jax.tree.map(lambda leaf: leaf[number], tree)


def make_ensemble_data(steps):
    """Each member sees the batches in an order of its own."""
    data = make_data(6)
    return [
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *[data[(step + n) % 6] for n in range(ENSEMBLE)])
        for step in range(steps)
    ]


def test_an_ensemble_learns_as_its_members_alone():
    data = make_ensemble_data(STEPS)
    start = make_ensemble()
    state, losses = train(start, data, vectorized)
    for number in range(ENSEMBLE):
        alone, _ = train(member(start, number), [member(batch, number) for batch in data])
        assert_close(member(state.params, number), alone.params)
        assert_learned(losses[:, number])
    assert_quasi_newton(state.opt_state)


def test_a_member_that_skips_a_step_leaves_the_others_alone():
    data = make_ensemble_data(12)
    before, _ = train(make_ensemble(), data[:9], vectorized)
    inputs, targets = data[9]
    after, _ = vectorized(before, (inputs, targets.at[3].set(jnp.nan)))
    healthy, _ = vectorized(before, (inputs, targets))
    for number in range(ENSEMBLE):
        expected = before if number == 3 else healthy
        assert_same(member(after.params, number), member(expected.params, number))
    assert memory(after.opt_state).skipped.tolist() == [int(number == 3) for number in range(ENSEMBLE)]
