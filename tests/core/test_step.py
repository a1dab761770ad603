"""The whole step: against the readable twin, masked, skipped, cut in leaves, shards and tiles."""

from __future__ import annotations

import threading
import tracemalloc

import array_api_compat.numpy as numpy_namespace
import numpy as np
import pytest
from array_api_compat import is_jax_namespace
from hypothesis import given

import mlbfgs_core as core
from mlbfgs_core.reference import Reference
from tests.helpers import (
    arrays_of,
    foreseen,
    join,
    mapped,
    power_of,
    relative,
    spd,
    split,
    to_numpy,
    trajectory,
)
from tests.strategies import generators, schedules

lazy_xp_modules = [core]

SETTINGS = {
    "default": {"update_every": 10},
    "fixed": {"adaptive": False, "update_every": 4},
    "paper": {"preset": "paper", "update_every": 3},
    "formulas": {"preset": "formulas", "update_every": 3},
    "lbfgs": {"preset": "lbfgs"},
    "fit": {"preset": "fit"},
    "ema, adaptive": {"beta": 0.8, "update_every": 6},
    "adam's diagonal": {"preconditioner_power": 1.0, "step_length": "none", "update_every": 6},
    "length 1": {"step_length": "unit", "update_every": 6},
    "odd power": {"preconditioner_power": 0.3, "step_length": "clip", "update_every": 6},
    "both dampings": {"damping": (0.1, 5.0, 0.9), "update_every": 6},
}
SHAPES, BLOCKS, SIZES = [(3, 2), (), (4,)], ((0, 2), (1,)), (10, 1)
ORDER = np.concatenate([np.arange(6), np.arange(7, 11), [6]])  # from leaves to blocks


def config_of(name, **settings):
    return core.Config(**{"history_size": 4, **SETTINGS[name], **settings})


def noisy_quadratic(rng, dim, steps, sigma=0.05):
    """A start and a gradient ``A x + noise`` of a block-diagonal quadratic."""
    matrix = np.zeros((dim, dim))
    matrix[np.ix_(ORDER[:10], ORDER[:10])] = spd(rng, 10)
    matrix[ORDER[10], ORDER[10]] = 0.5
    noise = sigma * rng.normal(size=(steps, dim))
    return rng.normal(size=dim), lambda t, x: matrix @ x + noise[t]


def assert_states_equal(actual, expected, but=()):
    ours, others = arrays_of(actual), arrays_of(expected)
    assert set(ours) == set(others)
    for name in set(ours) - set(but):
        for x, y in zip(ours[name], others[name], strict=True):
            np.testing.assert_array_equal(to_numpy(x), to_numpy(y), err_msg=name)


def copied(state, xp):
    return mapped(state, lambda array: xp.asarray(array, copy=True))


@pytest.mark.slow_on("array_api_strict")
@pytest.mark.parametrize("name", SETTINGS)
@given(rng=generators)
def test_core_equals_the_reference_step_by_step(xp, name, rng):
    config, steps = config_of(name), 30
    start, gradient = noisy_quadratic(rng, 11, steps)
    reference = Reference(config, SIZES)

    def faulty(t, x):
        g = gradient(t, x)
        g[3] = np.nan if t % 11 == 7 else g[3]
        return g

    for t, (update, x, state) in enumerate(
        trajectory(config, xp, start, faulty, steps, shapes=SHAPES, blocks=BLOCKS)
    ):
        parts = [part[ORDER] for part in (x, faulty(t, x))]
        expected = reference.step(*([part[:10], part[10:]] for part in parts))
        newest = [block.pairs[-1] for block in reference.blocks if block.pairs]
        if any(s @ y < 1e-12 * np.linalg.norm(y) for s, y in newest):
            return  # rounding decides whether a pair without curvature is usable
        # Rounding errors grow from step to step, most of all in a converged quasi-Newton run.
        assert relative(update[ORDER], np.concatenate(expected)) < 1e-6
    assert int(state.skipped) == reference.skipped == 3
    kept = [min(int(pairs), config.history_size) for pairs in to_numpy(state.pairs)]
    assert kept == [len(block.pairs) for block in reference.blocks]
    assert max(kept) > 0


@pytest.mark.slow_on("array_api_strict", "jax")
@pytest.mark.parametrize("name", ["default", "fit", "paper", "formulas"])
@given(rng=generators)
def test_missing_gradients_and_non_finite_parameters_equal_the_reference(xp, name, rng):
    """A leaf without a gradient does not move; a parameter that is not finite does not spoil the others."""
    config, steps = config_of(name, update_every=6), 24
    x, gradient = noisy_quadratic(rng, 11, steps)
    reference = Reference(config, SIZES)
    state = core.Method(config, BLOCKS).init(split(x, SHAPES, xp), xp=xp)
    edges = np.cumsum([0, *(int(np.prod(shape)) for shape in SHAPES)])
    for t in range(steps):
        present, theta = np.ones(11, dtype=bool), x.copy()
        leaf = 2 if t % 4 == 1 or t > 14 else 1 if t % 7 == 3 else None
        if leaf is not None:
            present[edges[leaf] : edges[leaf + 1]] = False
        theta[3] = (np.nan, np.inf, -np.inf, x[3])[min(t // 5, 3)]
        g = gradient(t, x)
        grads = [None if i == leaf else grad for i, grad in enumerate(split(g, SHAPES, xp))]
        update, state = core.Method(config, blocks=BLOCKS).step(state, split(theta, SHAPES, xp), grads)
        parts = [part[ORDER] for part in (theta, g, present)]
        expected = np.concatenate(reference.step(*([part[:10], part[10:]] for part in parts)))[
            np.argsort(ORDER)
        ]
        if leaf is not None:
            assert update[leaf] is None
            update[leaf] = split(np.zeros(11), SHAPES, xp)[leaf]
        assert relative(join(update), expected) < 1e-6
        x = x - 0.1 * expected
    assert int(state.skipped) == 0
    assert max(int(pairs) for pairs in to_numpy(state.pairs)) > 0


@pytest.mark.parametrize("name", ["default", "fixed", "ema, adaptive"])
@given(rng=generators)
def test_masked_refresh_equals_no_refresh(xp, name, rng):
    config = config_of(name)
    start, gradient = noisy_quadratic(rng, 11, 12)
    *_, (_, _, state) = trajectory(config, xp, start, gradient, 12, shapes=SHAPES, blocks=BLOCKS)
    before = copied(state, xp)
    assert_states_equal(core.Method(config, blocks=BLOCKS).refresh(state, xp.zeros_like(state.due)), before)


@pytest.mark.slow_on("array_api_strict", "jax")
@pytest.mark.parametrize("name", ["default", "fixed", "lbfgs", "ema, adaptive"])
@given(rng=generators)
def test_what_the_host_foresees_equals_the_masked_step(xp, name, rng):
    config, steps = config_of(name), 20
    start, gradient = noisy_quadratic(rng, 11, steps)
    masked = trajectory(config, xp, start, gradient, steps)
    bound = 1e-12 if is_jax_namespace(xp) else 0  # XLA compiles two programs, which round differently
    x, state, rows = start.copy(), core.Method(config).init(split(start, [(11,)], xp), xp=xp), []
    for t, (expected, _, _) in enumerate(masked):
        leaves = [split(part, [(11,)], xp) for part in (x, gradient(t, x))]
        asked = foreseen(core.Method(config), state)
        rows.append(asked["when_rows"])
        update, state = core.Method(config).step(state, *leaves, **asked)
        assert relative(join(update), expected) <= bound
        x = x - 0.1 * join(update)
    assert int(state.pairs[0]) > 0
    assert not rows[0]
    assert rows[-1]


@pytest.mark.backends("jax")
@pytest.mark.parametrize("name", ["default", "lbfgs"])
def test_deciding_on_the_device_equals_the_masked_step(name):
    import jax
    import jax.numpy as jnp

    config, steps = config_of(name), 20
    start, gradient = noisy_quadratic(np.random.default_rng(0), 11, steps)

    def decide(predicate, part, operand):
        return jax.lax.cond(predicate, part, lambda operand: operand, operand)

    run = jax.jit(
        lambda state, x, g: core.Method(config).step(state, x, g, when_check=decide, when_due=decide),
        donate_argnums=0,
    )
    x, state = start.copy(), jax.tree.map(jnp.copy, core.Method(config).init([jnp.asarray(start)]))
    for t, (expected, _, _) in enumerate(trajectory(config, numpy_namespace, start, gradient, steps)):
        update, state = run(state, [jnp.asarray(x)], [jnp.asarray(gradient(t, x))])
        assert relative(join(update), expected) < 1e-8
        x = x - 0.1 * join(update)
    assert int(state.pairs[0]) > 0
    assert run._cache_size() == 1


@pytest.mark.parametrize("xp", ["jax"], indirect=True)
def test_the_core_runs_jitted_in_these_tests_under_jax(xp):
    import jax

    traced, x = [], xp.asarray([1.0, 2.0])

    class Kernels(core.Kernels):
        def whiten(self, leaf, grad, *rest):
            traced.append(isinstance(grad, jax.core.Tracer))
            return super().whiten(leaf, grad, *rest)

    method = core.Method(core.Config(), kernels=Kernels(xp))
    state = method.init([x])
    for _ in range(3):
        _, state = method.step(state, [x], [x])
    assert traced == [True]  # once, for all three steps
    method.direction(state, [x])
    method.observe(state, [x], [x])
    assert traced == [True] * 3


@pytest.mark.slow_on("array_api_strict")
@pytest.mark.parametrize("name", ["default", "fit", "paper", "formulas"])
@given(rng=generators, faults=schedules(20))
def test_nan_gradients_equal_skipped_steps(xp, name, rng, faults):
    config = config_of(name)
    start, gradient = noisy_quadratic(rng, 11, len(faults))
    good = [t for t, fault in enumerate(faults) if fault is None]

    def faulty(t, x):
        g = gradient(t, x)
        if faults[t] is not None:
            g[int(t) % 11] = faults[t]
        return g

    final = None
    for t, (update, _, state) in enumerate(
        trajectory(config, xp, start, faulty, len(faults), shapes=SHAPES, blocks=BLOCKS)
    ):
        assert np.all(update == 0) or faults[t] is None
        assert bool(state.accepted) == (faults[t] is None)
        final = state
    assert int(final.skipped) == len(faults) - len(good)
    if not good:
        return
    *_, (_, _, clean) = trajectory(
        config, xp, start, lambda i, x: gradient(good[i], x), len(good), shapes=SHAPES, blocks=BLOCKS
    )
    # `due` is only about the last step.
    assert_states_equal(final, clean, but=("skipped", "accepted", "due"))


def test_gradient_whose_square_overflows_in_units_of_the_first_one_is_skipped(xp):
    config, x = core.Config(), split(np.ones(3), [(3,)], xp, "float32")
    state = core.Method(config).init(x, xp=xp)
    for scale, skipped in ((1.0, 0), (1e18, 0), (1e30, 1), (1.0, 1)):
        update, state = core.Method(config).step(state, x, split(np.full(3, scale), [(3,)], xp, "float32"))
        assert np.all(np.isfinite(join(update)))
        assert int(state.skipped) == skipped


@pytest.mark.slow_on("array_api_strict", "jax")
@pytest.mark.parametrize("name", ["default", "lbfgs", "fit"])
@given(rng=generators)
def test_leaf_that_never_has_a_gradient_is_as_if_it_were_not_there(xp, name, rng):
    config, steps, shapes = config_of(name), 20, [(6,), (5,)]
    start, gradient = noisy_quadratic(rng, 11, steps)
    frozen = rng.normal(size=6)
    without = trajectory(
        config, xp, start[6:], lambda t, x: gradient(t, np.concatenate([frozen, x]))[6:], steps
    )
    if name == "fit":  # its warm-up is relative to the norm of all parameters
        frozen = frozen * 0
        config = config_of(name, step_length="none")
        without = trajectory(
            config, xp, start[6:], lambda t, x: gradient(t, np.concatenate([frozen, x]))[6:], steps
        )
    x = np.concatenate([frozen, start[6:]])
    state = core.Method(config).init(split(x, shapes, xp), xp=xp)
    for t, (expected, _, _) in enumerate(without):
        leaves, grads = (split(part, shapes, xp) for part in (x, gradient(t, x)))
        update, state = core.Method(config).step(state, leaves, [None, grads[1]])
        assert update[0] is None
        assert relative(to_numpy(update[1]), expected) < 1e-6
        x[6:] -= 0.1 * to_numpy(update[1])
    assert np.all(to_numpy(state.history[0]) == 0)


def test_leaf_that_gets_its_gradient_later_joins_the_pairs(xp):
    config, shapes = core.Config(history_size=4, update_every=3, adaptive=False), [(6,), (5,)]
    start, gradient = noisy_quadratic(np.random.default_rng(0), 11, 40)
    x, state = start.copy(), core.Method(config).init(split(start, shapes, xp), xp=xp)
    for t in range(40):
        leaves, grads = (split(part, shapes, xp) for part in (x, gradient(t, x)))
        update, state = core.Method(config).step(state, leaves, grads if t >= 12 else [None, grads[1]])
        if update[0] is not None:
            x = x - 0.1 * join(update)
    assert np.all(np.isfinite(x))
    assert np.all(np.linalg.norm(to_numpy(state.history[0])[0].reshape(4, -1), axis=1) > 0)


@pytest.mark.parametrize(
    ("power", "loss", "unit"),
    # This does not hold for smaller parameters, for whose norm the warm-up assumes a minimum, nor with a
    # preconditioner of another power than 1, which depends on the scale of parameters.
    [(0.0, 1e6, 1.0), (0.0, 1.0, 1e3), (0.0, 1e-4, 1e2), (0.5, 1e6, 1.0)],
)
def test_rescaling_loss_and_parameters_leaves_fit_alone(xp, power, loss, unit):
    config, steps = config_of("fit", **power_of(power)), 30
    start, gradient = noisy_quadratic(np.random.default_rng(0), 11, steps, sigma=0.01)
    plain = [u for u, _, _ in trajectory(config, xp, start, gradient, steps)]
    scaled = trajectory(config, xp, unit * start, lambda t, x: loss / unit * gradient(t, x / unit), steps)
    for expected, (update, _, _) in zip(plain, scaled, strict=True):
        assert relative(update / unit, expected) < 1e-7


def test_rescaling_the_loss_leaves_the_default_alone_in_float32(xp):
    config, steps = config_of("default"), 30
    start, gradient = noisy_quadratic(np.random.default_rng(0), 11, steps, sigma=0.01)
    plain = [x for _, x, _ in trajectory(config, xp, start, gradient, steps, dtype="float32")]
    scaled = trajectory(config, xp, start, lambda t, x: 1e3 * gradient(t, x), steps, dtype="float32")
    for expected, (_, x, _) in zip(plain, scaled, strict=True):
        assert relative(x, expected) < 1e4 * np.finfo(np.float32).eps


@pytest.mark.parametrize("name", ["default", "fit", "paper", "formulas"])
def test_tiles_of_any_size_give_the_same_step(name):
    config, steps = config_of(name), 15
    start, gradient = noisy_quadratic(np.random.default_rng(0), 11, steps)
    runs = [
        [
            u
            for u, _, _ in trajectory(
                config,
                numpy_namespace,
                start,
                gradient,
                steps,
                shapes=SHAPES,
                kernels=core.Kernels(numpy_namespace, tile=tile),
            )
        ]
        for tile in (1, 3, 2**16)
    ]
    for updates in runs[:2]:
        assert relative(np.asarray(updates), np.asarray(runs[2])) < 1e-8


def on_two_shards(function):
    """What a function gives on each of two shards, which sum by its argument."""
    box, barrier, results = {}, threading.Barrier(2), {}

    def worker(rank):
        def reduce(array):
            box[rank] = np.asarray(array)
            barrier.wait()
            total = box[0] + box[1]
            barrier.wait()
            return total

        results[rank] = function(rank, reduce)

    threads = [threading.Thread(target=worker, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results[0], results[1]


@pytest.mark.parametrize("name", ["default", "fit", "paper", "formulas"])
@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.25, 0.75)], ids=["one", "some"])
def test_shards_that_reduce_equal_the_whole(name, shares):
    """Each shard holds a part of the first leaf and a copy of the second."""
    config, steps = config_of(name), 25
    start, gradient = noisy_quadratic(np.random.default_rng(0), 11, steps)
    expected = [u for u, _, _ in trajectory(config, numpy_namespace, start, gradient, steps)]
    parts, copied, barrier = (slice(0, 4), slice(4, 8)), slice(8, 11), threading.Barrier(2)
    taken = {}

    def run(rank, reduce):
        own, x, updates = parts[rank], start.copy(), []
        state = core.Method(config).init([x[own], x[copied]])._replace(size=np.asarray([11.0]))
        for t in range(steps):
            g = gradient(t, x)
            update, state = core.Method(config, reduce=reduce, shares=[1.0, shares[rank]]).step(
                state, [x[own], x[copied]], [g[own], g[copied]]
            )
            taken[rank] = update
            barrier.wait()
            updates.append(np.concatenate([taken[0][0], taken[1][0], update[1]]))
            barrier.wait()
            x = x - 0.1 * updates[-1]
        return updates

    for updates in on_two_shards(run):
        for actual, right in zip(updates, expected, strict=True):
            assert relative(actual, right) < 1e-7


def test_a_copy_that_adds_nothing_still_tells_of_a_nan():
    config, x = core.Config(), np.ones(3)

    def run(rank, reduce):
        grads = [x, x * (np.nan if rank == 1 else 1.0)]
        shares = [1.0, 1.0 - rank]
        _, state = core.Method(config, reduce=reduce, shares=shares).step(
            core.Method(config).init([x, x]), [x, x], grads
        )
        return int(state.skipped)

    assert on_two_shards(run) == (1, 1)


def test_shares_of_another_number_of_leaves_are_refused():
    config, x = core.Config(), np.ones(3)
    with pytest.raises(ValueError, match=r"`shares` must hold a number for each of 1 leaves, got 2"):
        core.Method(config, shares=[1.0, 1.0]).step(core.Method(config).init([x]), [x], [x])


@pytest.mark.parametrize(
    ("settings", "plain", "check", "refresh"),
    [
        ({"preset": "paper"}, 1, 0, 3),
        ({"preset": "formulas"}, 1, 0, 3),
        ({"preset": "fit"}, 1, 2, 3),
        ({}, 2, 2, 3),
    ],
    ids=["paper", "formulas", "fit", "default"],
)
def test_a_step_reduces_once_and_once_more_for_a_length_in_a_metric(settings, plain, check, refresh):
    config, calls = core.Config(**settings), []
    x = np.ones(5)
    state = core.Method(config).init([x])

    def reduce(array):
        calls.append(array.shape)
        return array

    def count(**when):
        nonlocal state
        calls.clear()
        _, state = core.Method(config, reduce=reduce).step(state, [x], [x], **when)
        return len(calls)

    first = count(when_check=False, when_due=False, when_scaled=True)
    assert first == plain + 1  # the first gradient decides on the scale of all
    assert count(when_check=False, when_due=False, when_scaled=False) == plain
    assert count(when_check=True, when_due=False, when_scaled=False) == plain + check
    assert count(when_check=False, when_due=True, when_scaled=False) == plain + refresh
    m = config.history_size
    assert calls[0][0] == 1
    assert 2 * m + 1 <= calls[0][1] <= 2 * m + 5


@pytest.mark.slow_on("jax")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_half_precision_parameters_keep_full_precision_memory(xp, dtype):
    if not hasattr(xp, dtype):
        pytest.skip(f"{xp.__name__} has no {dtype}")
    config, steps = config_of("default"), 25
    start, gradient = noisy_quadratic(np.random.default_rng(0), 11, steps, sigma=0.01)
    eps = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23}[dtype]
    state = core.Method(config).init(split(start, SHAPES, xp, dtype), xp=xp)
    exact = core.Method(config).init(split(start, SHAPES, xp), xp=xp)
    x = start.copy()
    for t in range(steps):
        leaves, grads = (split(part, SHAPES, xp, dtype) for part in (x, gradient(t, x)))
        rounded = [split(join(part), SHAPES, xp) for part in (leaves, grads)]
        update, state = core.Method(config).step(state, leaves, grads)
        expected, exact = core.Method(config).step(exact, *rounded)
        assert all(str(d.dtype).endswith(dtype) for d in update)
        assert relative(join(update), join(expected)) < max(4 * eps, 1e-3)
        x = x - 0.1 * join(expected)
    for name in ("mean_params", "mean_grads", "history", "exp_avg_sq"):
        assert all(str(leaf.dtype).endswith("float32") for leaf in arrays_of(state)[name])
    assert int(state.pairs[0]) > 1


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "paper"},
        {"history_size": 3, "history_dtype": "float16"},
        {"history_size": 0},
        {"history_size": 0, "preconditioner": "none"},
    ],
)
def test_planned_bytes_are_those_that_init_allocates(xp, settings):
    leaves = [
        xp.zeros((3, 5), dtype=xp.float32),
        xp.zeros((), dtype=xp.float64),
        xp.zeros((0, 2), dtype=xp.float32),
    ]
    if not hasattr(xp, settings.get("history_dtype") or "float32"):
        pytest.skip("the standard itself has no float16")
    config, blocks = core.Config(**settings), ((0, 2), (1,))
    plan = core.plan_memory(config, leaves, blocks)
    bytes_of = {
        name: sum(map(_nbytes, arrays))
        for name, arrays in arrays_of(core.Method(config, blocks).init(leaves, xp=xp)).items()
    }
    averages = [f"{a}_{b}" for a in ("mean", "prev") for b in ("params", "grads")]
    assert plan.history == bytes_of.get("history", 0)
    assert plan.preconditioner == bytes_of.get("exp_avg_sq", 0)
    assert plan.averages == sum(bytes_of.get(name, 0) for name in averages)
    assert plan.total == sum(bytes_of.values()) == sum(plan[:-1])


def _nbytes(array):
    bits = {"bool": 8, "int32": 32, "float16": 16, "float32": 32, "float64": 64}
    return int(np.prod(array.shape)) * bits[str(array.dtype).rpartition(".")[2]] // 8


@pytest.mark.parametrize("name", ["default", "fit", "paper", "formulas"])
@pytest.mark.parametrize("when", ["plain", "check", "refresh"])
def test_a_step_allocates_the_update_and_a_few_tiles(name, when):
    config, n, tile = config_of(name, history_size=10), 1_000_000, 2**12
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=n).astype(np.float32) for _ in range(2))
    kernels = core.Kernels(numpy_namespace, tile=tile)
    state = core.Method(config).init([x])
    state = core.Method(config, kernels=kernels).step(state, [x], [g])[1]
    flags = {"when_check": when == "check", "when_due": when == "refresh", "when_scaled": False}
    tracemalloc.start()
    core.Method(config, kernels=kernels).step(state, [x], [g], **flags)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A refresh holds tiles of all rows; bookkeeping and coefficients take some kilobytes per tile.
    assert peak < x.nbytes + 60 * tile * 4 + 1e6


@pytest.mark.backends("jax")
def test_a_functional_backend_keeps_what_it_was_given():
    import jax
    import jax.numpy as jnp

    config, x = core.Config(), jnp.ones(5)
    state = core.Method(config).init([x])
    before = jax.tree.map(np.asarray, state)
    core.Method(config).step(state, [x], [x])
    assert_states_equal(state, before)


@pytest.mark.slow_on("jax")
def test_an_unscaled_step_is_a_step_up_to_its_factor(xp):
    start, gradient = noisy_quadratic(np.random.default_rng(3), 11, 12)
    for name in ("default", "fit", "paper", "formulas"):
        config, x = config_of(name), start.copy()
        one, other = (core.Method(config).init(split(x, SHAPES, xp), xp=xp) for _ in range(2))
        for t in range(12):
            grads = [split(gradient(t, x), SHAPES, xp) for _ in range(2)]
            update, one = core.Method(config).step(one, split(x, SHAPES, xp), grads[0])
            bare, factor, other = core.Method(config).unscaled_step(other, split(x, SHAPES, xp), grads[1])
            assert relative(join(bare) * float(to_numpy(factor)), join(update)) < 1e-12
            x = x - 0.1 * join(update)
        grads = split(np.full(11, np.nan), SHAPES, xp)
        bare, factor, other = core.Method(config).unscaled_step(other, split(x, SHAPES, xp), grads)
        assert float(to_numpy(factor)) == 0
        assert np.isfinite(join(bare)).all()


def test_gradients_may_have_the_dtype_of_the_averages(xp):
    """As the float32 gradients that are accumulated for bfloat16 parameters."""
    if not hasattr(xp, "float16"):
        pytest.skip(f"{xp.__name__} has no float16")
    config, x = config_of("lbfgs"), np.linspace(1.0, 2.0, 11)
    state = core.Method(config).init(split(x, SHAPES, xp, "float16"), xp=xp)
    leaves, grads = split(x, SHAPES, xp, "float16"), split(x / 30, SHAPES, xp, "float32")
    update, state = core.Method(config).step(state, leaves, grads)
    assert all(str(d.dtype).endswith("float32") for d in update)
    np.testing.assert_allclose(join(update), x / 30, rtol=1e-6)
    with pytest.raises(TypeError, match="must have the parameter's dtype float16 or float32"):
        core.Method(config).step(state, leaves, split(x, SHAPES, xp, "float64"))


def test_a_coordinate_that_never_had_a_gradient_harms_no_block_of_mixed_dtypes(xp):
    config = core.Config()
    leaves = [xp.asarray([2.0, 0.0], dtype=dtype) for dtype in (xp.float32, xp.float64)]
    state = core.Method(config).init(leaves, xp=xp)
    for _ in range(3):
        update, state = core.Method(config).step(state, leaves, [leaf * 0.5 for leaf in leaves])
        assert np.isfinite(join(update)).all()
    assert (int(state.step), int(state.skipped)) == (3, 0)


@pytest.mark.slow_on("array_api_strict", "jax")
def test_curvatures_at_the_end_of_the_range_give_finite_steps(xp):
    """Of 1e37 in float32: the inverse Hessian has entries that a direction in units of gamma cannot have."""
    rate, rng = np.float32(1e-37), np.random.default_rng(0)
    method, x = core.Method(core.Config()), np.zeros(12, np.float32)
    state = method.init(split(x, [(4, 3)], xp, "float32"))
    for _ in range(260):
        g = (x / rate + 0.1 * rng.normal(size=12)).astype(np.float32)
        leaves = [split(part, [(4, 3)], xp, "float32") for part in (x, g)]
        update, state = method.step(state, *leaves)
        assert np.all(np.isfinite(join(update)))
        x = (x - rate * join(update)).astype(np.float32)
