"""What an optimizer reports about itself: one schema, and the table, figure and scalars made from it."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from array_api_extra.testing import lazy_xp_function
from hypothesis import given
from matplotlib.collections import LineCollection
from rich.console import Console
from scipy.optimize import minimize, rosen, rosen_der
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import mlbfgs_arrays
import mlbfgs_core as core
import mlbfgs_jax
import mlbfgs_torch
from mlbfgs_core.reference import Reference, bfgs_inverse_hessian
from mlbfgs_diagnostics import Recorder, advice, figure, log_scalars, remarks, table
from mlbfgs_scipy import minimize_mlbfgs
from tests.drivers import ArrayDriver, JaxDriver, TorchDriver
from tests.helpers import PLAIN, curvature_pairs, spd, state_after, to_numpy
from tests.strategies import generators

pytestmark = pytest.mark.backends("numpy", "torch", "jax")

lazy_xp_function(core.curvatures)
lazy_xp_modules = [core]

SHAPES = {"hidden.weight": (4, 3), "hidden.bias": (3,), "out.weight": (3, 2)}
SETTINGS = {"update_every": 8, "history_size": 4}
RATE, STEPS = 0.05, 60
M, DIM = 4, 12
CONFIG = core.Config(history_size=M, **PLAIN)


def problem():
    """Starts, and noisy gradients of a quadratic, the same for every optimizer."""
    rng = np.random.default_rng(3)
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    edges = np.cumsum([0, *(array.size for array in start.values())])
    matrix = spd(rng, edges[-1])
    noise = 0.02 * rng.normal(size=(STEPS, edges[-1]))

    def gradients(step, params):
        flat = matrix @ np.concatenate([param.ravel() for param in params]) + noise[step]
        pieces = np.split(flat, edges[1:-1])
        return [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES.values(), strict=True)]

    return start, gradients


def driven(kind, blocks="layer"):
    """A driver after a run."""
    start, gradients = problem()
    driver = kind(start, lr=RATE, blocks=blocks, **SETTINGS)
    for step in range(STEPS):
        driver.step(gradients(step, driver.values()))
    return driver


def records_of(driver):
    if isinstance(driver, JaxDriver):
        return mlbfgs_jax.diagnostics(driver.state)
    return driver.optimizer.diagnostics()


def referred():
    """The reference after the same run, with its blocks in the order of the layers."""
    start, gradients = problem()
    params, sizes = list(start.values()), (15, 6)
    reference = Reference(core.Config(**SETTINGS), sizes)
    velocity = np.zeros(sum(sizes))
    for step in range(STEPS):
        flat = np.concatenate([param.ravel() for param in params])
        grads = np.concatenate([grad.ravel() for grad in gradients(step, params)])
        direction = np.concatenate(reference.step(np.split(flat, [15]), np.split(grads, [15])))
        velocity = 0.9 * velocity + direction
        flat = flat - RATE * (direction + 0.9 * velocity)
        pieces = np.split(flat, [12, 15])
        params = [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES.values(), strict=True)]
    return reference


@pytest.mark.parametrize("kind", [TorchDriver, ArrayDriver, JaxDriver])
def test_every_adapter_gives_the_figures_of_the_reference(kind):
    (figures,) = records_of(driven(kind))
    reference = referred()
    assert type(figures) is core.Diagnostics
    assert (int(figures.step), int(figures.skipped)) == (STEPS, 0)
    assert (int(figures.window), int(figures.interval)) == (reference.n, reference.n_P)
    assert reference.n_P > 1
    spectra = to_numpy(core.curvatures(figures))
    for number, block in enumerate(reference.blocks):
        assert int(figures.pairs[number]) >= len(block.pairs) == 4
        s, y = block.pairs[-1]
        np.testing.assert_allclose(to_numpy(figures.gamma)[number], s @ y / (y @ y), rtol=1e-8)
        np.testing.assert_allclose(
            to_numpy(figures.mu)[number] + to_numpy(figures.delta)[number], s @ y, rtol=1e-8
        )
        np.testing.assert_allclose(
            to_numpy(figures.gradient_rms)[number], np.sqrt(block.mean_square), rtol=1e-8
        )
        expected = 1 / np.linalg.eigvalsh(on_span(block.pairs, reference.inverse_hessian(block)))[::-1]
        np.testing.assert_allclose(spectra[number, : len(expected)], expected, rtol=1e-7)
        assert np.isnan(spectra[number, len(expected) :]).all()


def test_all_adapters_agree_on_every_figure():
    (expected,), *others = (records_of(driven(kind)) for kind in (ArrayDriver, TorchDriver, JaxDriver))
    for (figures,) in others:
        for name, value in zip(figures._fields, figures, strict=True):
            wanted = np.asarray(getattr(expected, name))
            assert (tuple(value.shape), str(value.dtype).rpartition(".")[2]) == (
                wanted.shape,
                str(wanted.dtype),
            )
            np.testing.assert_allclose(to_numpy(value), wanted, rtol=1e-7, atol=1e-9, err_msg=name)


def test_scipys_result_holds_the_same_figures():
    start, gradients = problem()
    steps = iter(range(STEPS + 1))
    x0 = np.concatenate([array.ravel() for array in start.values()])

    def value_and_gradient(x):
        step = min(next(steps), STEPS - 1)
        parts = [
            piece.reshape(shape) for piece, shape in zip(np.split(x, [12, 15]), SHAPES.values(), strict=True)
        ]
        return 0.0, np.concatenate([grad.ravel() for grad in gradients(step, parts)])

    options = {"learning_rate": RATE, "maxiter": STEPS, "preset": "default", **SETTINGS}
    result = minimize(value_and_gradient, x0, jac=True, method=minimize_mlbfgs, options=options)
    (expected,) = records_of(driven(ArrayDriver, "all"))
    (figures,) = result.diagnostics
    for name, value in zip(figures._fields, figures, strict=True):
        np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-7, atol=1e-9, err_msg=name)


def test_a_printed_result_of_scipy_shows_no_matrix():
    result = minimize(rosen, [-1.2, 1.0], jac=rosen_der, method=minimize_mlbfgs)
    assert "gram=<(1, 20, 20)>, middle_matrix=<(1, 20, 20)>)" in repr(result.diagnostics)
    assert len(str(result).splitlines()) < 60
    assert int(result.diagnostics[0].step) == result.nit + 1


def on_span(pairs, matrix):
    """A dense matrix on the span of pairs."""
    rows = np.concatenate([np.stack(part) for part in zip(*pairs, strict=True)])
    _, values, basis = np.linalg.svd(rows / np.linalg.norm(rows, axis=1)[:, None], full_matrices=False)
    basis = basis[values > 1e-10 * values[0]]
    return basis @ matrix @ basis.T


@pytest.mark.parametrize(
    ("dim", "count"), [(DIM, 1), (DIM, M - 1), (DIM, M), (DIM, 2 * M + 1), (3, M), (1, 1)]
)
@given(rng=generators)
def test_curvatures_are_the_eigenvalues_of_the_dense_hessian_on_the_span(xp, dim, count, rng):
    pairs = curvature_pairs(rng, count, dim)
    found = to_numpy(core.curvatures(state_after(CONFIG, pairs, xp)))[0]
    kept = pairs[-M:]
    s, y = kept[-1]
    dense = bfgs_inverse_hessian(kept, s @ y / (y @ y), dim)
    expected = np.sort(np.linalg.eigvalsh(on_span(kept, np.linalg.inv(dense))))
    assert found.shape == (2 * M,)
    assert len(expected) == min(2 * len(kept), dim)
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=1e-7)
    assert np.isnan(found[len(expected) :]).all()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
@given(rng=generators)
def test_curvatures_of_single_precision_keep_their_digits_at_any_scale(xp, scale, rng):
    pairs = [(s, scale * y) for s, y in curvature_pairs(rng, M, DIM)]
    found = to_numpy(core.curvatures(state_after(CONFIG, pairs, xp, dtype="float32")))[0]
    s, y = pairs[-1]
    dense = bfgs_inverse_hessian(pairs, s @ y / (y @ y), DIM)
    expected = 1 / np.linalg.eigvalsh(on_span(pairs, dense))[::-1]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_curvatures_without_pairs_are_none(xp):
    state = core.Method(CONFIG, ((0,), (1,))).init([xp.zeros(5), xp.zeros(2)], xp=xp)
    assert np.isnan(to_numpy(core.curvatures(state))).tolist() == [[True] * 2 * M] * 2


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [("all", ["all"]), ("layer", ["hidden", "out.weight"]), ("parameter", list(SHAPES))],
)
def test_blocks_have_the_names_of_their_parameters(blocks, expected):
    torch_driver, array_driver = driven(TorchDriver, blocks), driven(ArrayDriver, blocks)
    tree = {"hidden": {"weight": jnp.ones(2), "bias": jnp.ones(2)}, "out": {"weight": jnp.ones(2)}}
    assert [list(names) for names in torch_driver.optimizer.block_names()] == [expected]
    assert [list(names) for names in array_driver.optimizer.block_names()] == [expected]
    assert sorted(mlbfgs_jax.block_names(tree, blocks)) == sorted(expected)


class Waiting(TorchDispatchMode):
    """Refuses operations that make a host wait for a GPU: reading values, copies to the host, and
    factorisations, whose outcome PyTorch checks."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(
            word in name for word in ("_local_scalar_dense", "nonzero", "_to_copy", "linalg", "is_nonzero")
        ):
            msg = f"{name} waits"
            raise RuntimeError(msg)
        return func(*args, **(kwargs or {}))


def test_recording_in_torch_waits_for_nothing_until_it_is_read():
    driver, recorder = driven(TorchDriver), Recorder(every=1)
    loss = torch.ones((), requires_grad=True) * 3.0
    with Waiting():
        driver.optimizer.diagnostics()
        recorder.record(driver.optimizer, loss)
        with pytest.raises(RuntimeError, match="waits"):
            float(driver.optimizer.diagnostics()[0].gamma[0])
        with pytest.raises(RuntimeError, match="waits"):
            core.curvatures(driver.optimizer.diagnostics()[0])
    (reading,) = recorder.readings()
    assert reading.loss == 3.0
    assert reading.curvatures[0].shape == (2, 8)


def test_in_jax_figures_and_curvatures_can_be_traced():
    driver = driven(JaxDriver)

    @jax.jit
    def traced(state):
        (record,) = mlbfgs_jax.diagnostics(state)
        return record, core.curvatures(record)

    record, spectra = traced(driver.state)
    (expected,) = mlbfgs_jax.diagnostics(driver.state)
    for name, value in zip(record._fields, record, strict=True):
        np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-12, err_msg=name)
    np.testing.assert_allclose(spectra, core.curvatures(expected), rtol=1e-9)


def test_a_record_survives_later_steps_and_the_donation_of_the_state():
    start, gradients = problem()
    tx = mlbfgs_jax.mlbfgs(RATE, **SETTINGS)
    step = jax.jit(lambda grads, state, params: tx.update(grads, state, params)[1], donate_argnums=1)
    params = {name: jnp.asarray(array) for name, array in start.items()}
    grads = dict(zip(params, gradients(0, list(start.values())), strict=True))
    state, recorder = tx.init(params), Recorder(every=1)
    state = step(grads, state, params)
    recorder.record(state, jnp.asarray(2.0))
    (before,) = mlbfgs_jax.diagnostics(state)
    state = step(grads, state, params)
    with pytest.raises(RuntimeError, match="deleted"):
        int(before.step)
    assert int(recorder.readings()[0].figures[0].step) == 1
    assert recorder.readings()[0].loss == 2.0
    for kind in (TorchDriver, ArrayDriver):
        driver, recorder = kind(start, **SETTINGS), Recorder(every=1)
        for number in range(3):
            driver.step(gradients(number, driver.values()))
            recorder.record(driver.optimizer)
        assert recorder.series("step").tolist() == [1, 2, 3]


def around(tx):
    masks = {name: "a" if name.startswith("hidden") else "b" for name in SHAPES}
    return {
        "alone": (mlbfgs_jax.scale_by_mlbfgs(), 1),
        "chain": (optax.chain(optax.clip(1.0), tx), 1),
        "injected": (optax.inject_hyperparams(mlbfgs_jax.mlbfgs, static_args=("history_size",))(0.1), 1),
        "several steps": (optax.MultiSteps(tx, 2), 1),
        "partition": (optax.partition({"a": tx, "b": mlbfgs_jax.mlbfgs(0.1)}, masks), 2),
    }


@pytest.mark.parametrize("name", list(around(mlbfgs_jax.mlbfgs(0.1))))
def test_in_jax_the_state_is_found_wherever_it_is(name):
    tx, count = around(mlbfgs_jax.mlbfgs(0.1))[name]
    params = {name: jnp.asarray(array) for name, array in problem()[0].items()}
    records = mlbfgs_jax.diagnostics(tx.init(params))
    assert [type(record) for record in records] == [core.Diagnostics] * count
    assert [record.gamma.shape for record in records] == [(1,)] * count


def test_in_jax_a_state_of_another_optimizer_is_refused():
    with pytest.raises(ValueError, match="`opt_state` must hold an MLBFGSState, got leaves of the types"):
        mlbfgs_jax.diagnostics(optax.adam(0.1).init({"w": jnp.ones(2)}))


def test_members_of_an_ensemble_have_the_records_that_each_has_alone():
    tx, steps = mlbfgs_jax.mlbfgs(0.05, update_every=3), 12
    starts = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    scales = jnp.asarray([1.0, 10.0, 100.0, 3.0])

    @jax.jit
    def train(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(scales * x, state, x)
            return (x + updates, state), None

        return jax.lax.scan(step, (x, tx.init(x)), None, length=steps)[0][1]

    records = mlbfgs_jax.diagnostics(jax.vmap(train)(starts))
    assert len(records) == 3
    for record, start in zip(records, starts, strict=True):
        (alone,) = mlbfgs_jax.diagnostics(train(start))
        assert int(alone.pairs[0]) > 1
        for name, value in zip(record._fields, record, strict=True):
            np.testing.assert_allclose(value, getattr(alone, name), rtol=1e-6, atol=1e-9, err_msg=name)


def block(**fields):
    """Diagnostics of one block without any problem, except for the fields given."""
    usual = {
        "step": 100,
        "skipped": 0,
        "window": 3,
        "interval": 7,
        "signal_to_noise": 9.0,
        "pairs": 5,
        "rejected": 0,
        "mu": 2.0,
        "tau": 1.0,
        "delta": 0.1,
        "cosine": 0.8,
    }
    values = {
        name: np.asarray(value) if name in OF_UNIT else np.asarray([value])
        for name, value in (usual | fields).items()
    }
    state = state_after(CONFIG, curvature_pairs(np.random.default_rng(0), M, DIM), np)
    return core.diagnostics(state)._replace(**values)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "nothing to do"),
        ({"step": 0, "pairs": 0}, "no step yet"),
        ({"pairs": 0}, "no pair yet"),
        ({"rejected": 6}, "6 pairs without curvature"),
        ({"delta": 2.1, "signal_to_noise": 1.5}, "pairs are mostly noise: raise the batch size"),
        ({"delta": 1.9, "signal_to_noise": 1.5}, "nothing to do"),
        ({"delta": 2.1}, "the gradient turns more than it grows"),
        ({"mu": -1.0, "delta": 2.1}, "negative curvature along the last pair"),
        ({"mu": -1.0, "delta": 2.1, "signal_to_noise": 1.5}, "pairs are mostly noise"),
        ({"mu": 0.5, "tau": 0.5, "delta": 0.7}, "nothing to do"),  # 0.75 before the floors
        ({"cosine": 0.05}, "direction almost at right angles"),
    ],
)
def test_advice_follows_from_the_numbers(fields, sentence):
    (said,) = advice(block(**fields))
    assert said.startswith(sentence)


@pytest.mark.parametrize(("mu", "sentence"), [(1.0, "the last pair is noise"), (-1.0, "negative curvature")])
def test_advice_on_a_pair_that_says_nothing_says_why(mu, sentence):
    figures = block(mu=mu, delta=5.0, pairs=M + 2)
    figures.gram[0, 1, :] = figures.gram[0, :, 1] = 0.0  # the slot of the newest
    (said,) = advice(figures)
    assert said.startswith(sentence)
    assert "says nothing" in said


def test_advice_on_shrunk_pairs_does_not_depend_on_the_scale_of_the_loss():
    config = core.Config(update_every=8, history_size=M, shrinkage=0.25, preconditioner="none")
    noise = np.random.default_rng(0).normal(size=(STEPS, DIM))

    def said(scale):
        params, state, sentences = [np.ones(DIM)], None, []
        for step in range(STEPS):
            state = core.Method(config).init(params) if state is None else state
            update, state = core.Method(config).step(state, params, [scale * (params[0] + noise[step])])
            params = [params[0] - RATE * update[0]]
            sentences += advice(core.diagnostics(state))
        return sentences

    usual = said(1.0)
    assert "the last pair is noise and says nothing: raise the batch size or `update_every`" in usual
    assert said(2.0**-20) == usual == said(2.0**20)


def test_remarks_count_skipped_steps_and_judge_the_last_check():
    assert remarks(block(skipped=12))[:2] == ["100 steps taken", "12 steps skipped: non-finite gradients"]
    assert not [said for said in remarks(block()) if "skipped" in said]
    assert "3 steps since the last refresh, which was 7 after the one before" in remarks(block())
    assert remarks(block(signal_to_noise=1.5))[-1].endswith("of 1.5: mostly noise")
    assert remarks(block(signal_to_noise=5.0))[-1].endswith("of 5: mostly signal")


def plain(shown, width=110):
    console = Console(file=io.StringIO(), width=width)
    console.print(shown)
    return console.file.getvalue()


@pytest.mark.parametrize("kind", [TorchDriver, ArrayDriver, JaxDriver])
def test_the_table_has_a_row_a_block_that_reads_as_plain_text(kind):
    driver = driven(kind)
    source = driver.state if kind is JaxDriver else driver.optimizer
    names = ["hidden", "out.weight"]
    text = plain(table(source, names=names) if kind is JaxDriver else table(source))
    (figures,) = records_of(driver)
    assert "\x1b" not in text
    assert f"{STEPS} steps taken" in text
    for number, name in enumerate(names):
        (line,) = (line.split() for line in text.splitlines() if line.split()[:1] == [name])
        stored, rejected = int(figures.pairs[number]), int(figures.rejected[number])
        assert line[1:4] == [str(stored), "of", str(stored + rejected)]
        assert line[4] == f"{float(figures.mu[number]):.2g}"
        assert advice(figures)[number].split()[0] in line


def test_the_table_can_be_read_in_a_terminal_of_80_columns():
    record = block(rejected=2, delta=2.1, signal_to_noise=1.5)
    text = plain(table(record, names=["hidden.weight"]), width=80)
    lines = text.splitlines()
    (start,) = (line.index("what to") for line in lines if "what to" in line)
    (row,) = (number for number, line in enumerate(lines) if "5 of 7" in line)
    cells = [line[start:].strip() for line in lines[row:]]
    assert "".join(cells[: cells.index("")]).replace(" ", "") == advice(record)[0].replace(" ", "")


def test_the_table_counts_skipped_steps():
    start, gradients = problem()
    driver = TorchDriver(start)
    grads = gradients(0, list(start.values()))
    driver.step(grads)
    driver.step([np.full_like(grad, np.nan) for grad in grads])
    text = plain(table(driver.optimizer))
    assert "no pair yet" in text
    assert "1 step taken; 1 step skipped: non-finite gradients" in text


def test_before_the_first_step_there_is_a_table_too():
    assert "no step yet" in plain(table(mlbfgs_torch.MLBFGS([torch.nn.Parameter(torch.ones(2))])))
    assert "no step yet" in plain(table(mlbfgs_arrays.MLBFGS(np.ones(2))))


def test_several_units_have_names_of_their_own():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))]
    groups = [{"params": params[:1]}, {"params": params[1:], "history_size": 3}]
    optimizer = mlbfgs_torch.MLBFGS(groups)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    shown = table(optimizer)
    assert list(shown.columns[0].cells) == ["unit0/all", "unit1/all"]
    assert shown.caption == "unit0: 1 step taken\nunit1: 1 step taken"


@pytest.mark.parametrize("source", [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), 3, None])
def test_what_has_no_diagnostics_is_refused(source):
    with pytest.raises(TypeError, match=r"`source` must be an MLBFGS.*, got "):
        table(source)


def test_names_must_fit_the_blocks():
    with pytest.raises(ValueError, match="`names` must be one for each of 1 blocks"):
        table(block(), names=["a", "b"])


def test_a_full_recorder_keeps_the_whole_run_at_half_the_resolution():
    recorder = Recorder(every=2, capacity=4)
    for number in range(40):
        recorder.record(block(step=number), loss=float(number))
        assert len(recorder.calls()) <= 4
    assert recorder.every == 16
    assert recorder.calls().tolist() == [0, 16, 32]
    assert recorder.series("step").tolist() == recorder.series("loss").tolist() == [0, 16, 32]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "`every` must be >= 1, got 0"),
        ({"capacity": 1}, ValueError, "`capacity` must be >= 2, got 1"),
        ({"every": 1.5}, TypeError, "`every` must be an int, got 1.5"),
    ],
)
def test_a_recorder_refuses_sizes_out_of_range(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        Recorder(**arguments)


def recorded(kind=TorchDriver, blocks="layer", loss=True):
    start, gradients = problem()
    driver, recorder = kind(start, lr=RATE, blocks=blocks, **SETTINGS), Recorder(every=3)
    for step in range(STEPS):
        driver.step(gradients(step, driver.values()))
        recorder.record(driver.optimizer, 1.0 / (1 + step) if loss else None)
    return recorder


def test_the_figure_shows_what_was_recorded():
    recorder = recorded()
    drawn = figure(recorder, block=1)
    top, *panels = drawn.axes
    shown = {axes.get_title(loc="left"): axes for axes in panels}
    fields = {
        "loss": "loss",
        "cosine of direction and gradient": "cosine",
        "signal to noise of the last check": "signal_to_noise",
        "steps from pair to pair": "interval",
        "scale gamma of the inverse Hessian": "gamma",
        "gradient RMS": "gradient_rms",
    }
    assert list(shown) == list(fields)
    for title, field in fields.items():
        values = recorder.series(field).reshape(len(recorder.calls()), -1)
        for line, column in zip(shown[title].get_lines(), values.T, strict=False):
            np.testing.assert_array_equal(line.get_xdata(), recorder.calls())
            drawn_there = np.isfinite(line.get_ydata())
            np.testing.assert_array_equal(line.get_ydata()[drawn_there], column[drawn_there])
            logarithmic = shown[title].get_yscale() == "log"
            assert drawn_there.tolist() == (column > 0).tolist() or (not logarithmic and drawn_there.all())
    spectra = recorder.spectra(1)
    (lines,) = (part for part in top.collections if isinstance(part, LineCollection))
    heights = np.asarray([segment[:, 1] for segment in lines.get_segments()])
    np.testing.assert_array_equal(heights, np.repeat(spectra[np.isfinite(spectra)][:, None], 2, axis=1))
    assert top.get_yscale() == "log"
    assert "out.weight" in top.get_title(loc="left")
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["hidden", "out.weight"]


def test_the_figure_needs_no_display(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    path = tmp_path / "run.png"
    figure(recorded(blocks="all", loss=False)).savefig(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_figure_of_a_run_without_pairs_can_be_drawn(tmp_path):
    recorder = Recorder(every=1)
    recorder.record(core.Method(core.Config()).init([np.zeros(3)]))
    figure(recorder).savefig(tmp_path / "run.png")


def test_many_blocks_are_drawn_as_their_median_and_range(tmp_path):
    recorder = Recorder(every=1)
    for step in range(3):
        state = core.Method(CONFIG, tuple((i,) for i in range(9))).init([np.zeros(2)] * 9)
        record = core.diagnostics(state)._replace(cosine=np.arange(9.0) / 10 + step / 100)
        recorder.record(record)
    drawn = figure(recorder)
    (axes,) = (part for part in drawn.axes if part.get_title(loc="left").startswith("cosine"))
    np.testing.assert_allclose(axes.get_lines()[0].get_ydata(), [0.4, 0.41, 0.42])
    np.testing.assert_allclose(axes.collections[0].get_datalim(axes.transData).intervaly, [0.0, 0.82])
    drawn.savefig(tmp_path / "run.png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: figure(Recorder()), "`recorder` must hold a record of a step, got none"),
        (lambda: figure(recorded(), block=2), "`block` must be in [0, 2), got 2"),
    ],
)
def test_a_figure_of_nothing_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, tag, value, step):
        self.scalars[tag] = (value, step)


OF_UNIT = ("step", "skipped", "window", "interval", "signal_to_noise")
OF_BLOCK = ("pairs", "rejected", "mu", "tau", "delta", "gamma", "cosine", "gradient_rms")


def test_scalars_have_the_tags_that_are_documented():
    driver, writer = driven(TorchDriver), Writer()
    log_scalars(writer, driver.optimizer, 17)
    (figures,) = driver.optimizer.diagnostics()
    names = ("hidden", "out.weight")
    expected = {f"mlbfgs/{name}": float(getattr(figures, name)) for name in OF_UNIT}
    for number, block_name in enumerate(names):
        expected |= {
            f"mlbfgs/{name}/{block_name}": float(getattr(figures, name)[number]) for name in OF_BLOCK
        }
        spectrum = core.curvatures(figures)[number]
        spectrum = spectrum[torch.isfinite(spectrum)]
        ends = {"smallest": spectrum.min(), "median": spectrum.median(), "largest": spectrum.max()}
        expected |= {f"mlbfgs/curvature_{end}/{block_name}": float(value) for end, value in ends.items()}
    assert writer.scalars.keys() == expected.keys()
    assert {step for _, step in writer.scalars.values()} == {17}
    for tag, value in expected.items():
        assert writer.scalars[tag][0] == pytest.approx(value, rel=1e-6), tag


def test_a_block_without_pairs_has_no_scalars_of_curvature():
    writer = Writer()
    log_scalars(writer, core.Method(core.Config()).init([np.zeros(3)]), 0, prefix="opt")
    assert not [tag for tag in writer.scalars if "curvature" in tag]
    assert writer.scalars["opt/gamma/all"] == (1.0, 0)


@pytest.mark.parametrize("preconditioner", ["none", "diagonal"])
@pytest.mark.parametrize("kind", [TorchDriver, ArrayDriver, JaxDriver])
def test_a_run_without_pairs_can_be_read_by_every_tool(kind, preconditioner):
    start, gradients = problem()
    driver = kind(start, lr=RATE, blocks="layer", history_size=0, preconditioner=preconditioner)
    recorder, writer, names = Recorder(every=1), Writer(), ["hidden", "out.weight"]
    for step in range(3):
        driver.step(gradients(step, driver.values()))
        recorder.record(driver.state if kind is JaxDriver else driver.optimizer)
    (figures,) = records_of(driver)
    assert core.curvatures(figures).shape == (2, 0)
    log_scalars(writer, figures, 0, names=names)
    assert set(writer.scalars) == {
        *(f"mlbfgs/{name}" for name in OF_UNIT),
        *(f"mlbfgs/{name}/{block}" for name in OF_BLOCK for block in names),
    }
    assert advice(figures) == ["nothing to do"] * 2  # no pair is to come
    assert "3 steps taken" in plain(table(figures, names=names))
    assert recorder.spectra().shape == (3, 0)
    assert figure(recorder).axes


def test_a_state_without_pairs_has_no_curvatures(xp):
    state = core.Method(core.Config(history_size=0), ((0,), (1,))).init([xp.ones(3), xp.ones(2)], xp=xp)
    assert core.curvatures(state).shape == (2, 0)


def test_tensorboard_reads_back_what_was_written(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    driver = driven(TorchDriver)
    with SummaryWriter(tmp_path) as writer:
        log_scalars(writer, driver.optimizer, 5)
    events = EventAccumulator(str(tmp_path)).Reload()
    (event,) = events.Scalars("mlbfgs/gamma/out.weight")
    assert event.step == 5
    assert event.value == pytest.approx(float(driver.optimizer.diagnostics()[0].gamma[1]))
    assert len(events.Tags()["scalars"]) == len(OF_UNIT) + 2 * (len(OF_BLOCK) + 3)


@pytest.mark.parametrize(("call", "package"), [("table", "rich"), ("figure", "matplotlib")])
def test_what_needs_a_package_says_so_and_the_rest_works_without(call, package):
    code = (
        "import sys, numpy, mlbfgs_core as core\n"
        f"sys.modules[{package!r}] = None\n"
        "from mlbfgs.diagnostics import *\n"
        "recorder = Recorder()\n"
        "state = core.Method(core.Config()).init([numpy.ones(3)])\n"
        "print(advice(core.diagnostics(state)))\n"
        f"{call}(state if {call!r} == 'table' else recorder)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.stdout == "['no step yet']\n"
    words = f"`mlbfgs_diagnostics.{call}` needs {package}: pip install 'mlbfgs[diagnostics]'"
    assert ran.stderr.endswith(f"ModuleNotFoundError: {words}\n")
