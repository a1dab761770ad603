"""Two processes that train one sharded model through `jax.distributed` are one run, files included."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import mlbfgs_jax
from mlbfgs_jax import mlbfgs
from tests.distributed.jax_training import RATE, SETTINGS, Run, after, assert_same, assert_skipped, deviation
from tests.distributed.jax_worker import HALF, STEPS

ROOT = Path(__file__).parents[2]
PROCESSES = 2
TIMEOUT = 90
TOLERANCE = 100 * np.finfo("float64").eps
"""Up to 3 eps was measured."""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_processes(folder):
    """Start the processes, wait for all, and give what each has found."""
    flags = "--xla_cpu_multi_thread_eigen=false --xla_backend_optimization_level=0"
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2",
    }
    common = [str(PROCESSES), str(free_port()), str(folder)]
    processes = []
    for number in range(PROCESSES):
        command = [sys.executable, "-m", "tests.distributed.jax_worker", str(number), *common]
        with (folder / f"output{number}").open("wb") as output:
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=output))
    deadline = time.monotonic() + TIMEOUT
    try:
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if codes != [0] * PROCESSES:
        told = [(folder / f"output{number}").read_text()[-3000:] for number in range(PROCESSES)]
        pytest.fail(f"exit codes {codes} (None: still running after {TIMEOUT} s)\n" + "\n".join(told))
    return [np.load(folder / f"result{n}.npy", allow_pickle=True)[0] for n in range(PROCESSES)]


@pytest.fixture(scope="module")
def one_process():
    """The same optimizer on one device of this process."""
    return Run(mlbfgs(RATE, **SETTINGS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_process):
    path = tmp_path_factory.mktemp("processes")
    mlbfgs_jax.save_state(path / "of one process", *after(one_process, HALF))
    return path


@pytest.fixture(scope="module")
def results(folder):
    return run_processes(folder)


@pytest.fixture(scope="module")
def expected(one_process):
    params, state = after(one_process, STEPS)
    assert int(state[0].pairs[0]) >= 3
    return jax.tree.map(np.array, params)


def test_no_process_holds_the_whole_state(results):
    assert not any(any(result["addressable"]) for result in results)


def test_two_processes_train_as_one(results, expected):
    for result in results:
        assert deviation(result["through"][0], expected) < TOLERANCE


def test_both_processes_have_the_same_bits(results):
    first, second = results
    assert_same(first["through"], second["through"])


def test_a_resumed_run_of_two_processes_is_the_same_to_the_last_bit(results):
    for result in results:
        assert_same(result["resumed"], result["through"])


def test_a_file_of_one_process_goes_on_in_two(results, expected):
    for result in results:
        assert deviation(result["from one"][0], expected) < TOLERANCE


def test_a_file_of_two_processes_goes_on_in_one(results, folder, one_process, expected):
    restored = mlbfgs_jax.load_state(folder / "of two processes", *one_process.start())
    *_, (params, _) = one_process.train(*restored, HALF, STEPS)
    assert deviation(params, expected) < TOLERANCE


def test_a_nan_in_one_process_skips_the_step_in_both(results):
    for result in results:
        assert_skipped(result["skipped"], result["before"])


def test_a_file_that_cannot_be_written_is_an_error_in_both(results):
    assert [result["failure"] for result in results] == ["FileNotFoundError", "RuntimeError"]
