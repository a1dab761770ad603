"""The task benchmark: search, runs, resuming and the counts of its report."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.tasks import archive, fields, pool, recipe, report, runs, search, timing
from benchmarks.tasks import data as sets
from benchmarks.tasks.contestants import CONTESTANTS, rate
from benchmarks.tasks.goals import better_adamw, chosen, goals, planned, reach
from benchmarks.tasks.problems import FIXED, GROUPS, TASKS, Problem, Task
from benchmarks.tasks.runs import Key, load
from benchmarks.tasks.search import Plan, Results, interior, next_exponents
from benchmarks.tasks.training import Trainer, state_bytes, train

FIRST = [name for name, task in TASKS.items() if not task.later]


@pytest.fixture(autouse=True)
def nothing_measured_before(monkeypatch, tmp_path):
    """Neither the runs that the repository keeps nor what was found before them."""
    monkeypatch.setattr(search, "_earlier", dict)
    monkeypatch.setattr(archive, "MEASURED", tmp_path / "measured")
    archive.stored.cache_clear()
    yield
    archive.stored.cache_clear()


def searched(loss, centre=0, least=5, most=9):
    losses = {}
    while wanted := next_exponents(centre, losses, least, most):
        assert not losses.keys() & set(wanted)
        losses |= {exponent: loss(exponent) for exponent in wanted}
    return losses


@pytest.mark.parametrize("diverges_above", [1, 2, 10])
@pytest.mark.parametrize("best", range(-5, 6))
def test_search_ends_with_the_best_rate_between_others(best, diverges_above):
    losses = searched(lambda exponent: math.inf if exponent > diverges_above else 1 + abs(exponent - best))
    assert interior(losses)
    assert min(losses, key=losses.get) == min(best, diverges_above)
    assert 5 <= len(losses) <= 9
    assert sorted(losses) == list(range(min(losses), max(losses) + 1))


@pytest.mark.parametrize("slope", [-1, 1])
def test_search_of_a_loss_without_a_minimum_ends_and_says_that_the_best_is_at_an_edge(slope):
    losses = searched(lambda exponent: math.exp(slope * exponent))
    assert len(losses) == 9
    assert not interior(losses)


def test_search_looks_below_where_every_rate_diverges():
    assert searched(lambda _: math.inf) == dict.fromkeys(range(-7, 2), math.inf)


def quadratic(seed):
    """Linear least squares with mini-batches, an exact solution and condition number 10."""
    torch.manual_seed(seed)
    inputs = torch.randn(256, 8) * torch.logspace(0, -0.5, 8)
    targets = inputs @ torch.randn(8, 4)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))

    def loss(step):
        rows = torch.arange(32 * step, 32 * step + 32) % 256
        return (model(inputs[rows]) - targets[rows]).square().mean()

    @torch.no_grad()
    def evaluate():
        value = (model(inputs) - targets).square().mean().item()
        return value, value

    return Problem(model, loss, evaluate)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name, entry in CONTESTANTS.items() if not entry.variant])
def test_every_contestant_lowers_the_loss_at_a_rate_with_which_its_search_begins(name):
    contestant = CONTESTANTS[name]
    rates = map(rate, next_exponents(contestant.centre, {}))
    record = min((train(quadratic(0), contestant, lr, 60) for lr in rates), key=lambda record: record.final)
    assert record.final < 0.95 * record.train[0]
    assert len(record.steps) == len(record.train) == len(record.seconds)


@pytest.fixture(scope="module")
def digits():
    """The final training loss of a contestant on the 8x8 digits, at the best of three rates."""

    def best(name):
        contestant, task = CONTESTANTS[name], TASKS["digits"]
        rates = map(rate, next_exponents(contestant.centre, {}))
        return min(train(task.make(0), contestant, lr, task.steps).final for lr in rates)

    return {name: best(name) for name in ("sgd", "mlbfgs_paper", "mlbfgs_formulas")}


def test_the_published_recipe_trains_a_network_faster_than_sgd(digits):
    assert digits["mlbfgs_paper"] < 0.85 * digits["sgd"]


def test_the_bare_formulas_do_not(digits):
    assert digits["mlbfgs_formulas"] > 1.2 * digits["sgd"]


def test_gradients_of_a_line_search_count():
    record = train(quadratic(0), CONTESTANTS["lbfgs"], 1.0, 60)
    assert record.calls < 30
    assert 60 <= record.steps[-1] <= 60 + 25


def test_a_loss_that_is_not_finite_ends_the_run():
    record = train(quadratic(0), CONTESTANTS["sgd"], 1e6, 60)
    assert record.stopped == "the training loss is not finite"
    assert record.steps[-1] < 60
    assert record.final == math.inf


def test_memory_of_known_optimizers():
    problem = quadratic(0)
    values = sum(p.numel() for p in problem.model.parameters())
    (adamw,) = CONTESTANTS["adamw"].optimizers(problem.model, 0.1)
    assert state_bytes(adamw) == 0
    problem.loss(0).backward()
    adamw.step()
    assert state_bytes(adamw) == 4 * (2 * values + 4)  # two averages; four parameters count their steps
    (sgd,) = CONTESTANTS["sgd"].optimizers(problem.model, 0.1)
    sgd.step()
    assert state_bytes(sgd) == 4 * values


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A plan of one small task, made by threads, and a list of the runs that are made."""
    monkeypatch.setitem(TASKS, "tiny", Task("tiny", "Tiny", 40, quadratic))
    monkeypatch.setattr(pool, "processes", ThreadPoolExecutor)
    made, run = [], runs.run

    def noted(key, folder):
        made.append(key)
        return run(key, folder)

    monkeypatch.setattr(pool, "run", noted)
    return Plan(tasks=("tiny",), contestants=("adamw", "mlbfgs"), seeds=2), tmp_path, made


def test_finished_runs_are_not_made_again(tiny):
    plan, folder, made = tiny
    assert pool.make(Results(plan, folder), 1)
    assert len(made) == len(set(made)) > 2 * 6
    steps = {key.percent: json.loads(key.path(folder).read_text())["steps"][-1] for key in made}
    assert steps == {percent: round(0.4 * percent) for percent in (*plan.percents, 100)}
    assert set(made) == {Key(*path_of(path)) for path in folder.rglob("*.json")}
    made.clear()
    assert pool.make(Results(plan, folder), 1)
    assert made == []


def path_of(path):
    content = json.loads(path.read_text())
    return [content[name] for name in Key._fields]


def test_an_interrupted_comparison_goes_on_with_the_runs_that_are_missing(tiny, monkeypatch):
    plan, folder, made = tiny
    wait, calls = pool.wait, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return wait(*args, **kwargs)

    monkeypatch.setattr(pool, "wait", interrupted)
    assert not pool.make(Results(plan, folder), 1)
    before = list(made)
    assert pool.make(Results(plan, folder), 1)
    assert len(made) == len(set(made)) > len(before) > 0


def test_after_a_change_of_the_algorithm_only_our_runs_are_made_again(tiny, monkeypatch):
    plan, folder, made = tiny
    pool.make(Results(plan, folder), 1)
    made.clear()
    monkeypatch.setattr(runs, "_CODE", "changed")
    pool.make(Results(plan, folder), 1)
    assert {key.contestant for key in made} == {"mlbfgs"}


KILLED = """
import json, os, signal
from pathlib import Path
from benchmarks.tasks import runs

def half(content, file, **kwargs):
    file.write('{"train": [1.0')
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

json.dump = half
runs.train = lambda *_: runs.Record()
runs.run(runs.Key("cancer", "sgd", -3, 0), Path("."))
"""


def test_a_run_that_is_killed_while_it_writes_leaves_no_file_of_that_name(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {str(root)!r}){KILLED}"]
    assert subprocess.run(command, cwd=tmp_path, check=False).returncode == -9
    key = Key("cancer", "sgd", -3, 0)
    assert [path.suffix for path in key.path(tmp_path).parent.iterdir()] == [".tmp"]
    assert load(key, tmp_path) is None


def write(folder, task, contestant, finals, curve=(1.0, 1.0)):
    """Runs at three rates with the given last losses; `curve` is a loss and where in the run it is."""
    centre = CONTESTANTS[contestant].centre
    for exponent, final in zip(range(centre - 1, centre + 2), finals, strict=True):
        write_run(folder, Key(task, contestant, exponent, 0), final, curve)


def write_run(folder, key, final, curve=(1.0, 1.0)):
    """One of these runs."""
    (middle, part), steps = curve, TASKS[key.task].steps
    record = {
        "steps": [0, round(part * steps), steps] if part < 1 else [0, steps],
        "train": [100.0, middle, final] if part < 1 else [100.0, final],
        "stopped": None,
    }
    lists = {
        name: [0.0] * len(record["steps"]) for name in ("test", "seconds", "cpu_seconds", "optimizer_seconds")
    }
    content = {**record, **lists, "calls": steps, "parameters": 10, "state_bytes": 80}
    about = {"date": "2026-01-31", "identity": runs.identity(key.task, key.contestant)}
    runs.write_json(key.path(folder), {**key._asdict(), **about, **content})


@pytest.mark.parametrize(
    ("finals", "expected"),
    [
        ({40: 4.0, 70: 1.0, 100: 0.5}, 0.55),  # 2 lies half way from 4 to 1 on the scale of logarithms
        ({40: 1.0, 70: 4.0, 100: 1.0}, 0.85),  # a shorter run that was luckier does not count
        ({40: 2.0, 70: 1.0, 100: 1.0}, 0.4),
        ({40: 1.0, 70: math.inf, 100: 1.0}, 1.0),
        ({40: 1.0, 70: 1.0, 100: 3.0}, math.inf),
        ({40: 1.0, 100: 1.0}, math.nan),
    ],
)
def test_planned_steps_are_those_from_which_on_every_run_ends_as_low(finals, expected, tmp_path):
    plan = Plan(("digits",), ("mlbfgs",), seeds=1, least=3, most=3, one_setting=False, percents=(40, 70))
    centre = CONTESTANTS["mlbfgs"].centre
    for percent, final in finals.items():
        write_run(tmp_path, Key("digits", "mlbfgs", centre, 0, percent), final)
    found = planned(Results(plan, tmp_path), "digits", "mlbfgs", 2.0)
    assert found == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_the_page_is_written_from_the_files(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    plan = Plan(("digits",), ("mlbfgs", "adamw"), seeds=1, least=3, most=3, one_setting=False, percents=(70,))
    for name, final in (("mlbfgs", 1.0), ("adamw", 2.0)):
        write(tmp_path, "digits", name, [9.0, final, 9.0])
    # The shorter run of AdamW is missing.
    write_run(tmp_path, Key("digits", "mlbfgs", CONTESTANTS["mlbfgs"].centre, 0, 70), 2.0)
    report.write(Results(plan, tmp_path))
    tables = {path.stem: path.read_text() for path in (tmp_path / "docs" / "_generated").iterdir()}
    assert set(tables) == {
        f"tasks_{name}" for name in ("ratio", "test", "goals", "reach", "rates", "cost", "one", "contestants")
    }
    assert "| mL-BFGS, tuned | **0.5** | **0.5** |\n| AdamW | 1 | 1 |" in tables["tasks_ratio"]
    assert "| mL-BFGS, 0.001 | 0.5 | 0.5 |\n| AdamW's loss | 2 |  |" in tables["tasks_ratio"]
    pictures = {path.name for path in (tmp_path / "docs" / "_static").iterdir()}
    assert pictures == {f"tasks_{name}.png" for name in ("overview", "steps", "seconds", "ratio")}


def test_the_recipe_is_held_against_sgd_and_adamw_on_tasks_that_have_all_their_runs(tmp_path):
    plan = Plan(("digits", "classifier"), (), seeds=1, least=3, most=3)
    finals = {"adamw": 2.0, "adamw_99": 4.0, "sgd": 3.0, "mlbfgs_paper": 1.0, "mlbfgs_formulas": math.inf}
    for name, final in finals.items():
        write(tmp_path, "digits", name, [9.0 + final, final, 9.0 + final], (3.0, 0.4))
    part = recipe.part(Results(plan, tmp_path))
    assert part.plan.contestants == tuple(finals)
    *_, row, _, words = recipe.text(part).splitlines()
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    rates = ", ".join(f"{rate(CONTESTANTS[name].centre):.2g}" for name in ("sgd", "mlbfgs_paper"))
    bounds = "0.333\N{EN DASH}0.333"
    assert cells == ["1.5", "0.5", "\N{EN DASH}", "0.333", bounds, "1 of 1", "40%", rates]
    assert "below SGD on 1 of 1 tasks" in words


def test_variants_change_something_and_are_held_against_the_default(tmp_path):
    changed = [entry.settings for entry in CONTESTANTS.values() if entry.variant]
    assert len({repr(settings) for settings in [{}, *changed]}) == len(changed) + 1
    results = Results(Plan(seeds=1, least=3, most=3), tmp_path)
    assert not any(CONTESTANTS[name].variant for name in results.plan.contestants)
    tasks, large = (part.plan.tasks for part in report.variants(results))
    assert not any(TASKS[task].held_out for task in tasks)
    assert all(TASKS[task].held_out for task in large)
    for task, final in zip(tasks, [3.0] + [1.0] * (len(tasks) - 1), strict=True):
        write(tmp_path, task, "mlbfgs", [4.0, 1.0, 2.0])
        write(tmp_path, task, "mlbfgs_no_pairs", [final, 5.0, 6.0])
    row = "| no pairs at all | 3 |" + " 1 |" * (len(tasks) - 1) + f" {3 ** (1 / len(tasks)):.3g} |"
    assert row in report.variants_text(results)


def write_times(folder, task, seconds):
    """Seconds of a step of each contestant."""
    times = {name: {"seconds": value, "optimizer": 0.5} for name, value in seconds.items()}
    identity = {name: runs.identity(task, name) for name in seconds}
    runs.write_json(folder / task / "timing.json", {"identity": identity, "times": times})


def test_goals_are_counted_from_the_files(tmp_path):
    names = ("mlbfgs", "mlbfgs_kronecker", "adamw", "adamw_99", "soap")
    plan = Plan(tuple(TASKS), names, seeds=1, least=3, most=3, one_setting=False, percents=())
    # The better AdamW ends at 1, SOAP at 0.8. The diagonal is at 0.9 after half of the steps on twelve tasks,
    # and ends at 1.02 on four. Kronecker ends at 0.5 on all, and is there after seven tenths.
    for place, task in enumerate(FIRST):
        write(tmp_path, task, "adamw", [3.0, 2.0, math.inf])
        write(tmp_path, task, "adamw_99", [3.0, 1.0, 4.0])
        write(tmp_path, task, "soap", [3.0, 0.8, 4.0])
        write(
            tmp_path,
            task,
            "mlbfgs",
            [70.0, 0.9 if place < 12 else 1.02, 80.0],
            (1.0, 0.5 if place < 12 else 1.0),
        )
        write(tmp_path, task, "mlbfgs_kronecker", [70.0, 0.5, 80.0], (0.5, 0.7))
        # Kronecker's steps take 1.2 times as long as AdamW's on ten tasks, three times on six.
        slow = place >= 10
        seconds = (1.1, 3.0 if slow else 1.2, 1.0, 1.0, 1.5)
        write_times(tmp_path, task, dict(zip(names, seconds, strict=True)))
    results = Results(plan, tmp_path)
    diagonal, kronecker = (reach(results, FIRST[0], name, "adamw_99") for name in names[:2])
    assert diagonal == pytest.approx((0.9, 0.5, 1.1))
    assert diagonal.time == pytest.approx(0.55)
    # From 100 to 0.5 in a straight line of logarithms.
    assert kronecker == pytest.approx((0.5, 0.7 * math.log(100) / math.log(200), 1.2))
    assert reach(results, FIRST[-1], "mlbfgs", "adamw_99").steps == math.inf
    # A run that dips below and ends above is never there.
    write(tmp_path, "vit", "adamw", [3.0, 2.0, math.inf])
    write(tmp_path, "vit", "mlbfgs", [70.0, 2.5, 80.0], (1.0, 0.5))
    assert reach(results, "vit", "mlbfgs", "adamw").steps == math.inf
    assert better_adamw(results, FIRST[0]) == "adamw_99"
    assert [chosen(results, FIRST[place]) for place in (9, 10)] == ["mlbfgs_kronecker", "mlbfgs"]
    verdicts = [(goal.counts, goal.met) for goal in goals(results, FIRST)]
    assert verdicts == [
        (("0 of 16", "16 of 16", ""), True),
        (("at most 1.02", "at most 0.5", ""), True),
        (("12 of 16", "0 of 16", ""), True),
        (("0 of 16", "16 of 16", ""), True),
        # Ten by Kronecker, and the two first of the six others by the diagonal.
        (("12 of 16", "10 of 16", "12 of 16"), True),
        # The diagonal is never at SOAP's loss.
        (("0 of 16", "10 of 16", "10 of 16"), False),
        (("0.9", "0.5", ""), True),
        (("0.951", "0.5", ""), True),
    ]
    row = "| SOAP's final loss in less time on at least 13: **not met** | 0 of 16 | 10 of 16 | 10 of 16 |"
    assert row in report.goals_text(results)
    # A task without a run of ours is missing from the counts, and no goal on all tasks is met without it.
    plan = Plan((*FIRST, "gru"), names, seeds=1, least=3, most=3, one_setting=False, percents=())
    write(tmp_path, "gru", "adamw", [3.0, 2.0, math.inf])
    more = [(goal.counts[1], goal.met) for goal in goals(Results(plan, tmp_path), plan.tasks)]
    assert more[1] == ("at most 0.5", False)
    centre = CONTESTANTS["mlbfgs"].centre
    assert f"{rate(centre):.2g} (3, {rate(centre + 1):.2g})" in report.rates_text(results)


def test_runs_that_are_kept_count_until_they_are_made_again(tmp_path, monkeypatch):
    plan = Plan(("digits",), ("mlbfgs", "adamw"), seeds=1, least=3, most=3, one_setting=False, percents=())
    for name in plan.contestants:
        write(tmp_path / "runs", "digits", name, [9.12345, 1.23456, math.inf], (2.0, 0.5))
    before = {key: load(key, tmp_path / "runs") for key in keys("digits", plan.contestants)}
    write_times(tmp_path / "runs", "digits", {"mlbfgs": 2.0, "adamw": 1.0})
    report.keep(Results(plan, tmp_path / "runs"))
    times = timing.load(tmp_path / "none", "digits")
    assert {name: entry["seconds"] for name, entry in times.items()} == {"mlbfgs": 2.0, "adamw": 1.0}
    (path,) = archive.MEASURED.iterdir()
    assert path.name == "digits.json"
    kept = {key: load(key, tmp_path / "none") for key in before}
    assert all(load(key, tmp_path / "none", again=True) is not None for key in before)
    for key, record in before.items():
        assert kept[key].final == pytest.approx(record.final, rel=1e-3)
        used = key.exponent in (CONTESTANTS[key.contestant].centre, -6)
        assert len(kept[key].train) == (3 if used else 2)
    # Another version of the code: the kept runs count for a report, and new ones take their place.
    monkeypatch.setattr(runs, "_CODE", "changed")
    ours = [key for key in before if key.contestant == "mlbfgs"]
    assert all(load(key, tmp_path / "none") is not None for key in ours)
    assert all(load(key, tmp_path / "none", again=True) is None for key in ours)
    write_run(tmp_path / "newer", ours[1], 0.5)
    report.keep(Results(plan, tmp_path / "newer"))
    assert [load(key, tmp_path / "none").final for key in ours] == [9.123, 0.5, math.inf]
    # Runs of an older version that are still in a folder take no one's place.
    report.keep(Results(plan, tmp_path / "runs"))
    assert load(ours[1], tmp_path / "none").final == 0.5
    monkeypatch.setattr(runs, "_CODE", "changed again")
    write_run(tmp_path / "again", ours[2], 0.25)
    report.keep(Results(plan, tmp_path / "again", again=True))
    finals = [record and record.final for record in (load(key, tmp_path / "none") for key in ours)]
    assert finals == [None, None, 0.25]
    # A report on one contestant leaves the curves of the others as they are.
    report.keep(Results(replace(plan, contestants=("mlbfgs",)), tmp_path / "runs"))
    best = Key("digits", "adamw", CONTESTANTS["adamw"].centre, 0)
    assert len(load(best, tmp_path / "none").train) == 3
    monkeypatch.setitem(CONTESTANTS["adamw"].settings, "betas", (0.5, 0.5))
    assert load(Key("digits", "adamw", CONTESTANTS["adamw"].centre, 0), tmp_path / "none") is None


def keys(task, names):
    """The three runs of each contestant that `write` makes."""
    return [Key(task, name, CONTESTANTS[name].centre + shift, 0) for name in names for shift in (-1, 0, 1)]


def test_what_was_found_earlier_is_not_searched_again(tmp_path, monkeypatch):
    found = {"adamw": {"rates": {"digits": -3}, "finals": {"digits": 0.25}}}
    monkeypatch.setattr(search, "_earlier", lambda: found)
    plan = Plan(("digits", "classifier"), ("adamw",), seeds=2, one_setting=False, percents=())
    results = Results(plan, tmp_path)
    assert results.tuning("digits", "adamw") == [Key("digits", "adamw", -3, seed) for seed in (0, 1)]
    assert len(results.tuning("classifier", "adamw")) == 3
    assert report.final(results, "digits", "adamw") == 0.25
    write_run(tmp_path, Key("digits", "adamw", -3, 0), 0.5)
    assert report.final(Results(plan, tmp_path), "digits", "adamw") == 0.5


def test_contestants_run_on_the_tasks_that_they_are_made_for(tmp_path):
    results = Results(Plan(("poisson", "poisson_fixed"), ("ssbroyden",)), tmp_path)
    assert results.tuning("poisson", "ssbroyden") == []
    assert len(results.tuning("poisson_fixed", "ssbroyden")) == 3
    assert {key.task for key in results.one_setting("ssbroyden")} == {"poisson_fixed"}
    assert {task.group for task in TASKS.values()} == set(GROUPS)


def test_points_that_stay_give_the_same_loss_at_every_step_in_double_precision():
    fixed, drawn = TASKS["burgers_fixed"].make(0), TASKS["burgers"].make(0)
    assert fixed.loss(0).dtype == torch.float64
    assert fixed.loss(0).item() == fixed.loss(7).item() == fixed.evaluate()[0]
    assert drawn.loss(0).item() != drawn.loss(7).item()
    assert {task.name for task in TASKS.values() if task.group == FIXED} == {"poisson_fixed", "burgers_fixed"}


@pytest.mark.parametrize("name", ["POISSON", "BURGERS", "ALLEN_CAHN"])
def test_the_table_of_an_equation_solves_it(name):
    """Up to the error of finite differences on its grid."""
    equation = getattr(fields, name)
    points, exact = (values.double() for values in equation.table())
    assert torch.isfinite(exact).all()
    x, t = (torch.unique(column) for column in points.unbind(1))
    u = exact.reshape(len(x), len(t))
    dx, dt = (x[1] - x[0]).item(), (t[1] - t[0]).item()
    inner = slice(1, -1)
    u_t = (u[inner, 2:] - u[inner, :-2]) / (2 * dt)
    u_x = (u[2:, inner] - u[:-2, inner]) / (2 * dx)
    u_xx = (u[2:, inner] - 2 * u[inner, inner] + u[:-2, inner]) / dx**2
    u_tt = (u[inner, 2:] - 2 * u[inner, inner] + u[inner, :-2]) / dt**2
    at = u[inner, inner]
    where_x, where_t = torch.meshgrid(x[inner], t[inner], indexing="ij")
    source = 2 * math.pi**2 * torch.sin(math.pi * where_x) * torch.sin(math.pi * where_t)
    missed, size = {
        "POISSON": (u_xx + u_tt + source, source),
        "BURGERS": (u_t + at * u_x - 0.05 * u_xx, u_t),
        "ALLEN_CAHN": (u_t - 1e-4 * u_xx - 5 * (at - at**3), u_t),
    }[name]
    assert missed.square().mean() < 0.1**2 * size.square().mean()


def test_an_exact_solution_has_no_residual_and_no_error():
    class Wave(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.speed = torch.nn.Parameter(torch.tensor(30.0))

        def forward(self, points):
            return torch.sin(points[:, :1] - self.speed * points[:, 1:])

    equation = fields.CONVECTION
    points = equation.points(torch.Generator().manual_seed(0), 1)
    assert equation.residual(Wave(), points) < 1e-8
    assert equation.error(Wave()) < 1e-5


def test_averaged_parameters_are_those_that_count_and_a_constant_rate_stays():
    contestant = CONTESTANTS["schedule_free"]
    problem = quadratic(0)
    trainer = Trainer(problem, contestant, 0.05, 40)
    for _ in range(40):
        trainer.step()
    assert {group["lr"] for group in trainer.optimizers[0].param_groups} == {0.05}
    here = [param.detach().clone() for param in problem.model.parameters()]
    averaged, last = trainer.evaluate()[0], problem.evaluate()[0]
    assert averaged != last
    assert all(map(torch.allclose, here, problem.model.parameters()))


def test_fine_tuning_moves_only_what_is_not_frozen():
    for name, share in (("frozen", 4_810), ("low_rank", 4_200)):
        problem = TASKS[name].make(0)
        moved = [param for param in problem.model.parameters() if param.requires_grad]
        assert sum(map(torch.numel, moved)) == share
        (adamw,) = CONTESTANTS["adamw"].optimizers(problem.model, 0.1)
        assert [p for group in adamw.param_groups for p in group["params"]] == moved
    for later, classes in ((False, [0, 1, 2, 3, 4]), (True, [5, 6, 7, 8, 9])):
        assert sets.half_of_the_classes(later=later)[0].targets.unique().tolist() == classes


def test_fashion_mnist_is_read_from_the_file_that_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv(sets.FASHION_MNIST, raising=False)
    sets.fashion.cache_clear()
    with pytest.raises(FileNotFoundError, match=r"`FASHION_MNIST` must name a NumPy file .* got None"):
        sets.fashion()
    results = Results(Plan(("fashion", "digits"), ("adamw",)), tmp_path)
    assert results.tuning("fashion", "adamw") == []
    assert len(results.tuning("digits", "adamw")) == 3


def test_the_tables_are_those_of_the_runs_that_are_kept(tmp_path, monkeypatch):
    monkeypatch.undo()
    archive.stored.cache_clear()
    pages = Path(__file__).parents[2] / "docs" / "_generated"
    for name, text in report.texts(Results(Plan(), tmp_path)).items():
        assert text + "\n" == (pages / f"tasks_{name}.md").read_text(), name
