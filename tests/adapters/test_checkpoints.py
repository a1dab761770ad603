"""One run, several frameworks: started in one, resumed in another, as if it had never moved."""

from __future__ import annotations

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import mlbfgs_core as core
import mlbfgs_jax
import mlbfgs_torch
from tests.adapters.test_same_trajectory import DECAY, MOMENTUM, NAMES, RATE, SETTINGS, gradient, problem
from tests.drivers import DRIVERS
from tests.helpers import to_numpy

pytestmark = pytest.mark.backends("numpy", "torch", "jax")

STEPS = 200
CASES = [
    ("default", "all", "float64", 1e-10),
    ("default", "all", "float32", 1e4 * 2**-23),
    ("default", "layer", "float64", 1e-10),
    ("fit", "all", "float64", 1e-10),
    ("paper", "layer", "float64", 1e-10),
    ("formulas", "layer", "float64", 1e-10),
]


def begin(kind, dtype, settings, blocks):
    named = dict(zip(NAMES, problem(dtype)[0], strict=True))
    return DRIVERS[kind](named, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY, blocks=blocks, **settings)


def train(driver, dtype, first, last):
    _, inputs, targets = problem(dtype)
    for x, target in zip(inputs[first:last], targets[first:last], strict=True):
        driver.step(gradient(driver.values(), x, target, np.tanh))


@pytest.mark.parametrize(("name", "blocks", "dtype", "tolerance"), CASES)
def test_half_a_run_in_one_framework_and_half_in_another_is_the_whole_run(
    name, blocks, dtype, tolerance, tmp_path
):
    run = (dtype, SETTINGS[name], blocks)
    whole = begin("numpy", *run)
    train(whole, dtype, 0, STEPS)
    for first in DRIVERS:
        driver = begin(first, *run)
        train(driver, dtype, 0, STEPS // 2)
        driver.save(tmp_path / first)
    for first, second in itertools.product(DRIVERS, DRIVERS):
        driver = begin(second, *run)
        driver.load(tmp_path / first)
        train(driver, dtype, STEPS // 2, STEPS)
        pairs = zip(driver.values(), whole.values(), strict=True)
        assert max(np.max(np.abs(a - b)) for a, b in pairs) < tolerance, (first, second)


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_run_resumed_in_its_own_framework_is_the_same_to_the_last_bit(kind, tmp_path):
    run, resumed = (begin(kind, "float32", {}, "all") for _ in range(2))
    train(run, "float32", 0, STEPS // 2)
    run.save(tmp_path / "run")
    resumed.load(tmp_path / "run")
    for one in (run, resumed):
        train(one, "float32", STEPS // 2, STEPS)
    for a, b in zip(run.values(), resumed.values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_one_framework_reads_it_writes_again_bit_for_bit(tmp_path):
    for first in DRIVERS:
        driver = begin(first, "float32", {}, "all")
        train(driver, "float32", 0, 30)
        driver.save(tmp_path / "first")
        (expected,) = core.load_state(tmp_path / "first")
        for second in DRIVERS:
            again = begin(second, "float32", {}, "all")
            again.load(tmp_path / "first")
            again.save(tmp_path / "second")
            (actual,) = core.load_state(tmp_path / "second", [expected])
            for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("kind", DRIVERS)
def test_a_refused_file_changes_nothing(kind, tmp_path):
    run = begin(kind, "float32", {}, "all")
    train(run, "float32", 0, 30)
    run.save(tmp_path / "before")
    path = tmp_path / "other"
    others = [
        ("float32", {"history_size": 3}, "all"),
        ("float32", {}, "layer"),
        ("float64", {}, "all"),
        ("float32", {"preconditioner": "none"}, "all"),
    ]
    for other in others:
        begin(kind, *other).save(path)
        with pytest.raises(ValueError, match="`path`"):
            run.load(path)
    path.write_bytes((tmp_path / "before").read_bytes()[:-1])
    with pytest.raises(ValueError, match="whole safetensors file"):
        run.load(path)
    run.save(tmp_path / "after")
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_a_linear_layer_of_pytorch_goes_on_as_a_dense_layer_in_jax(tmp_path):
    """Other names, transposed weights."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).double()
    optimizer = mlbfgs_torch.MLBFGS(model.named_parameters(), RATE, check_every=1)

    _, inputs, targets = problem("float64")
    batches = list(zip(inputs[:100], targets[:100], strict=True))

    def train(own):
        for x, target in own:
            optimizer.zero_grad()
            loss = (model(torch.asarray(x)) - torch.asarray(target)).square().sum() / 2 / len(x)
            loss.backward()
            optimizer.step()

    train(batches[:50])
    optimizer.save_state(tmp_path / "run")
    train(batches[50:])

    (snapshot,) = core.load_state(tmp_path / "run")
    rename = {"0.weight": "in.kernel", "0.bias": "in.bias", "2.weight": "out.kernel", "2.bias": "out.bias"}
    dense = snapshot.mapped(
        rename.__getitem__, lambda name, a: np.swapaxes(a, -1, -2) if name.endswith("kernel") else a
    )
    core.save_state(tmp_path / "dense", [dense])
    like = jnp.zeros
    params = {
        "in": {"kernel": like((8, 16)), "bias": like(16)},
        "out": {"kernel": like((16, 3)), "bias": like(3)},
    }
    tx = mlbfgs_jax.mlbfgs(RATE, check_every=1)
    params, state = mlbfgs_jax.load_state(tmp_path / "dense", params, jax.eval_shape(tx.init, params))

    @jax.jit
    def step(params, state, x, target):
        leaves = [
            params["in"]["kernel"],
            params["in"]["bias"],
            params["out"]["kernel"],
            params["out"]["bias"],
        ]
        g = gradient(leaves, x, target, jnp.tanh)
        grads = {"in": {"kernel": g[0], "bias": g[1]}, "out": {"kernel": g[2], "bias": g[3]}}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for x, target in batches[50:]:
        params, state = step(params, state, x, target)
    assert int(state[0].pairs[0]) >= 3
    expected = dict(model.named_parameters())
    for torch_name, path in rename.items():
        layer, leaf = path.split(".")
        values = params[layer][leaf]
        np.testing.assert_allclose(values.T, to_numpy(expected[torch_name]), atol=1e-10)


def test_complex_parameters_and_missing_gradients_travel(tmp_path):
    start = np.asarray([1 + 2j, -1j, 0.5], dtype=np.complex64)
    names = ("z", "frozen")

    def torch_run():
        z = torch.nn.Parameter(torch.asarray(start.copy()))
        frozen = torch.nn.Parameter(torch.ones(2))
        return z, mlbfgs_torch.MLBFGS(zip(names, (z, frozen), strict=True), check_every=1)

    z, optimizer = torch_run()
    for step in range(20):
        z.grad = z.detach() * (3 + step % 3)
        optimizer.step()
    optimizer.save_state(tmp_path / "run")
    tx = mlbfgs_jax.mlbfgs(0.1, check_every=1)
    params = {"z": jnp.zeros(3, jnp.complex64), "frozen": jnp.zeros(2, jnp.float32)}
    params, state = mlbfgs_jax.load_state(tmp_path / "run", params, tx.init(params))
    np.testing.assert_array_equal(params["z"], z.detach().numpy())
    np.testing.assert_array_equal(params["frozen"], np.ones(2))
    mlbfgs_jax.save_state(tmp_path / "again", params, state)
    other, resumed = torch_run()
    resumed.load_state(tmp_path / "again")
    assert "history" not in resumed.state[resumed.param_groups[0]["params"][1]]
    grad = z.detach() * 2
    for param, one in ((z, optimizer), (other, resumed)):
        param.grad = grad
        one.step()
    torch.testing.assert_close(other, z, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_parameters_travel_between_torch_and_jax(dtype, tmp_path):
    values = np.linspace(-1, 1, 12, dtype=np.float32)
    param = torch.nn.Parameter(torch.asarray(values).to(getattr(torch, dtype)))
    optimizer = mlbfgs_torch.MLBFGS([("x", param)], RATE, check_every=1, history_dtype=dtype)
    for step in range(12):
        param.grad = param.detach() * (2 + step % 2)
        optimizer.step()
    optimizer.save_state(tmp_path / "run")
    params = {"x": jnp.zeros(12, dtype)}
    tx = mlbfgs_jax.mlbfgs(RATE, check_every=1, history_dtype=dtype)
    params, state = mlbfgs_jax.load_state(tmp_path / "run", params, tx.init(params))
    np.testing.assert_array_equal(to_numpy(params["x"]), to_numpy(param))
    assert str(state[0].history["x"].dtype) == dtype
    assert str(state[0].mean_params["x"].dtype) == "float32"
    param.grad = param.detach() * 3
    updates, _ = tx.update({"x": params["x"] * 3}, state, params)
    optimizer.step()
    expected = to_numpy(param) - to_numpy(params["x"])
    np.testing.assert_allclose(to_numpy(updates["x"]), expected, atol=2e-3)


def test_a_schedule_goes_on_where_the_file_stands(tmp_path):
    schedule = optax.linear_schedule(0.1, 0.0, 20)
    tx = mlbfgs_jax.mlbfgs(schedule, weight_decay=schedule)
    params = {"x": jnp.ones(4)}
    state = tx.init(params)
    step = jax.jit(lambda params, state: tx.update(params, state, params))
    for _ in range(7):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    mlbfgs_jax.save_state(tmp_path / "run", params, state)
    restored, fresh = mlbfgs_jax.load_state(tmp_path / "run", params, tx.init(params))
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves((restored, fresh)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jax.tree.structure(fresh) == jax.tree.structure(state)


def test_masked_parameters_and_hand_made_chains_are_known_by_their_names(tmp_path):
    params = {"a": jnp.ones(3), "steps": jnp.asarray(3)}
    tx = optax.masked(
        optax.chain(mlbfgs_jax.scale_by_mlbfgs(), optax.trace(0.9), optax.scale(-0.1)),
        {"a": True, "steps": False},
    )
    state = tx.init(params)
    grads = {"a": jnp.arange(3.0), "steps": jnp.asarray(0)}
    _, state = tx.update(grads, state, params)
    mlbfgs_jax.save_state(tmp_path / "run", params, state)
    assert core.load_state(tmp_path / "run")[0].names == ("a",)
    restored, again = mlbfgs_jax.load_state(tmp_path / "run", params, tx.init(params))
    for a, b in zip(jax.tree.leaves((params, state)), jax.tree.leaves((restored, again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, s: (p, optax.sgd(0.1).init(p)), "must hold one MLBFGSState .* got 0 and 0"),
        (lambda p, s: (p, (s, s)), "got 2 and 2"),
        (lambda p, s: ({"y": p["x"]}, s), "got none of the name 'x'"),
    ],
)
def test_errors_of_the_jax_checkpoint_name_what_is_wrong(make, message, tmp_path):
    params = {"x": jnp.ones(2)}
    params, state = make(params, mlbfgs_jax.mlbfgs(0.1).init(params))
    with pytest.raises(ValueError, match=message):
        mlbfgs_jax.save_state(tmp_path / "run", params, state)
    with pytest.raises(ValueError, match="`blocks` must give the state's 1 blocks, got 2"):
        mlbfgs_jax.save_state(
            Path(tmp_path), {"a": jnp.ones(1), "b": jnp.ones(1)},
            mlbfgs_jax.mlbfgs(0.1).init({"a": jnp.ones(1), "b": jnp.ones(1)}), blocks="parameter",
        )  # fmt: skip


def test_groups_with_other_settings_are_sets_of_their_own(tmp_path):
    def run():
        params = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
        groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1])], "history_size": 3}]
        return params, mlbfgs_torch.MLBFGS(groups, check_every=1)

    params, optimizer = run()
    for step in range(9):
        for param in params:
            param.grad = param.detach() * (2 + step % 3)
        optimizer.step()
    optimizer.save_state(tmp_path / "run")
    first, second = core.load_state(tmp_path / "run")
    assert (first.names, second.names) == (("a",), ("b",))
    others, resumed = run()
    resumed.load_state(tmp_path / "run")
    for own, one in ((params, optimizer), (others, resumed)):
        for param in own:
            param.grad = param.detach() * 2
        one.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
