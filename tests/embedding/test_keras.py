"""The Keras optimizer takes the steps of the dense twin in `fit`; a saved model goes on as if never stopped.

`KERAS_BACKEND` says on which backend.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras_optimizer import MLBFGS

from tests.embedding.helpers import ADAPTIVE, FAST, Descent

RNG = np.random.default_rng(0)
INPUTS = RNG.standard_normal((48, 3))
TARGETS = np.sin(INPUTS @ RNG.standard_normal((3, 2)))
BATCH = 8
# On PyTorch Keras multiplies float64 arrays in float32 (`keras.src.backend.result_type`); a few dozen # steps
# then amplify a rounding error up to 1000 times.
TOLERANCE = 1e-9 if keras.backend.backend() == "jax" else 1000 * np.finfo(np.float32).eps
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(autouse=True)
def _float64():
    keras.config.set_floatx("float64")
    yield
    keras.config.set_floatx("float32")


def make_model(*hidden, **options):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.layers.Input((3,)), *hidden, keras.layers.Dense(2)])
    model.compile(MLBFGS(**options), loss="mse")
    return model


def fit(model, epochs, inputs=INPUTS, targets=TARGETS, batch=BATCH, **options):
    return model.fit(
        inputs, targets, batch_size=batch, epochs=epochs, shuffle=False, verbose=0, **options
    ).history["loss"]


def flat(model):
    return np.concatenate([weight.reshape(-1) for weight in model.get_weights()])


def state(model):
    return keras.tree.map_structure(lambda variable: variable.numpy(), model.optimizer._state)


def gradient(x, inputs, targets):
    """Of the mean squared error of a linear layer's kernel and bias."""
    error = 2.0 * (inputs @ x[:6].reshape(3, 2) + x[6:] - targets) / targets.size
    return np.concatenate([(inputs.T @ error).reshape(-1), error.sum(axis=0)])


@pytest.mark.parametrize(
    "settings", [FAST, ADAPTIVE, {"history_size": 0}], ids=["fixed interval", "adaptive", "no pairs"]
)
@pytest.mark.parametrize(
    "options",
    [{"momentum": 0.0}, {"weight_decay": 0.01}, {"nesterov": False}],
    ids=["bare", "momentum and decay", "heavy ball"],
)
def test_fit_takes_the_steps_of_the_dense_twin(settings, options):
    model = make_model(learning_rate=0.05, settings=settings, **options)
    twin = Descent(settings, flat(model), 0.05, **{"momentum": 0.9, **options})
    for _ in range(4):
        fit(model, 1)
        for start in range(0, len(INPUTS), BATCH):
            part = slice(start, start + BATCH)
            twin.step(gradient(twin.x, INPUTS[part], TARGETS[part]))
        np.testing.assert_allclose(flat(model), twin.x, rtol=TOLERANCE, atol=TOLERANCE)
    assert state(model).step == 24
    assert (state(model).pairs[0] > 0) == (settings.get("history_size") != 0)


def test_training_a_network_lowers_the_loss():
    keras.config.set_floatx("float32")
    model = make_model(keras.layers.Dense(16, activation="tanh"), learning_rate=0.005)
    losses = fit(model, 25, batch=16)
    assert losses[-1] < 0.1 * losses[0]
    assert state(model).pairs[0] > 0


def test_a_saved_model_goes_on_to_the_bit(tmp_path):
    model = make_model(keras.layers.Dense(4, activation="tanh"), weight_decay=0.01, settings=ADAPTIVE)
    fit(model, 2)
    model.save(tmp_path / "model.keras")
    resumed = keras.saving.load_model(tmp_path / "model.keras")
    assert resumed.optimizer.config == model.optimizer.config
    for now, then in zip(resumed.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(now.numpy(), then.numpy())
    assert fit(resumed, 2) == fit(model, 2)
    np.testing.assert_array_equal(flat(resumed), flat(model))
    assert state(resumed).step == 24
    assert state(resumed).pairs[0] > 0


def test_a_nan_gradient_is_a_skipped_step():
    model, twin = make_model(weight_decay=0.01, settings=FAST), make_model(weight_decay=0.01, settings=FAST)
    fit(model, 1)
    weights, before = flat(model), state(model)
    velocity = [array.numpy() for array in model.optimizer._velocities]
    fit(model, 1, INPUTS[:BATCH] * np.nan, TARGETS[:BATCH])
    np.testing.assert_array_equal(flat(model), weights)
    for now, then in zip(model.optimizer._velocities, velocity, strict=True):
        np.testing.assert_array_equal(now.numpy(), then)
    after = state(model)
    assert (int(after.skipped), bool(after.accepted)) == (1, False)
    expected = before._replace(skipped=after.skipped, accepted=after.accepted, due=after.due)
    keras.tree.map_structure(np.testing.assert_array_equal, after, expected)

    fit(model, 2)
    fit(twin, 3)
    np.testing.assert_array_equal(flat(model), flat(twin))


@pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="JAX's gradients are zero where PyTorch's are None"
)
@pytest.mark.filterwarnings("ignore:Gradients do not exist:UserWarning")
def test_a_variable_without_a_gradient_keeps_still():
    optimizer = MLBFGS(0.1, weight_decay=0.01, settings=FAST)
    used, unused = keras.Variable(np.ones(3)), keras.Variable(np.ones(2))
    for _ in range(5):
        optimizer.apply([keras.ops.convert_to_tensor([1.0, 2.0, 3.0]) * used.value, None], [used, unused])
    np.testing.assert_array_equal(unused.numpy(), 1.0)
    assert np.all(used.numpy() < 1.0)
    assert optimizer._state.leaf_steps.numpy().tolist() == [5, 0]


def test_accumulated_gradients_make_the_steps_of_larger_batches():
    twice = make_model(settings=FAST, gradient_accumulation_steps=2)
    once = make_model(settings=FAST)
    fit(twice, 4)
    fit(once, 4, batch=2 * BATCH)
    np.testing.assert_allclose(flat(twice), flat(once), rtol=TOLERANCE, atol=TOLERANCE)
    assert state(twice).step == state(once).step == 12


def test_a_schedule_sets_the_size_of_a_step():
    schedule = keras.optimizers.schedules.ExponentialDecay(0.4, decay_steps=1, decay_rate=0.5)
    model = make_model(learning_rate=schedule, momentum=0.0, settings=FAST)
    for step in range(5):
        before = flat(model)
        fit(model, 1, INPUTS[:BATCH], TARGETS[:BATCH])
        size = np.sqrt(np.mean((flat(model) - before) ** 2))
        assert size == pytest.approx(0.4 * 0.5**step, rel=1e-6)
