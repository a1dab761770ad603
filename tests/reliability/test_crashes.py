"""A process may be killed at any moment: the file is the last one saved, and the run goes on from it."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time

import pytest

import mlbfgs_core as core
from tests.drivers import DRIVERS

from .runs import begin, die_while_saving, done, live, step

KILLS = {"numpy": 50, "torch": 50, "jax": 5}
PRELOADED = ["tests.reliability.runs", "torch._dynamo", "safetensors.numpy"]
STAGES = {
    "before anything is written": ("safetensors.numpy", "save_file"),
    "before the checksum": ("hashlib", "file_digest"),
    "before the file is on the disk": ("os", "fsync"),
    "before the file has its name": ("pathlib", "Path.replace"),
}


@pytest.fixture(scope="module")
def processes():
    """A server whose children start with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def uninterrupted(kind, preconditioner, steps, path):
    driver = begin(kind, preconditioner)
    for count in range(steps):
        step(driver, count)
    driver.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("preconditioner", ["diagonal", "kronecker"])
@pytest.mark.parametrize("kind", DRIVERS)
def test_a_run_killed_again_and_again_is_the_uninterrupted_run_to_the_last_bit(
    kind, preconditioner, processes, tmp_path
):
    path, delays = tmp_path / "run.safetensors", random.Random(0)
    kills = KILLS[kind] if preconditioner == "diagonal" else 5
    for _ in range(kills):
        ours, theirs = processes.Pipe()
        process = processes.Process(target=live, args=(kind, preconditioner, path, theirs))
        process.start()
        theirs.close()  # so that a process that fails by itself ends the wait
        ours.recv()  # it has saved a step
        time.sleep(delays.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (last,) = core.load_state(path)
    steps = int(last.state.step) + int(last.state.skipped)
    if kills >= 50:
        assert len(list(tmp_path.iterdir())) > 1  # some died in the middle of writing
    assert steps >= kills
    if kills >= 50:
        assert int(last.state.skipped) > 0
    assert path.read_bytes() == uninterrupted(kind, preconditioner, steps, tmp_path / "uninterrupted")


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_stage_of_saving_the_old_file_is_whole(stage, processes, tmp_path):
    path = tmp_path / "run.safetensors"
    before = uninterrupted("numpy", "diagonal", 9, path)
    process = processes.Process(target=die_while_saving, args=("numpy", path, STAGES[stage]))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    resumed = begin("numpy")
    resumed.load(path)
    assert done(resumed) == 9
