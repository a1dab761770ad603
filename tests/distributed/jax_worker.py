"""One of several processes that train together; started by `test_jax_processes`."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mlbfgs_jax
from mlbfgs_jax import mlbfgs
from tests.distributed.jax_training import LAYOUTS, RATE, SETTINGS, MeshRun, after, make_batch, need_devices

STEPS, HALF = 30, 15
LAYOUT = LAYOUTS["fully sharded"]._replace(axes={"data": 4})


def whole(run: MeshRun, tree: object) -> object:
    """Copies of all of the arrays, in this process."""
    copy = jax.jit(lambda tree: tree, out_shardings=NamedSharding(run.mesh, P()))
    return jax.tree.map(np.asarray, copy(tree))


def end(run: MeshRun, params: object, state: object, first: int) -> object:
    """Parameters and state after the last step."""
    *_, last = run.train(params, state, first, STEPS)
    return whole(run, last)


def failure(folder: Path, run: MeshRun) -> str:
    """What a file that cannot be written raises."""
    try:
        mlbfgs_jax.save_state(folder / "missing" / "run", *run.start())
    except (OSError, RuntimeError) as error:
        return type(error).__name__
    return "nothing"


def main(process: int, count: int, port: int, folder: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_x64", True)
    jax.distributed.initialize(f"127.0.0.1:{port}", count, process, initialization_timeout=60)
    need_devices(4)
    run = MeshRun(mlbfgs(RATE, **SETTINGS), LAYOUT)
    results = {}

    params, state = after(run, HALF)
    mlbfgs_jax.save_state(folder / "of two processes", params, state)
    assert (folder / "of two processes").exists()  # on all, as soon as they go on
    results["through"] = end(run, params, state, HALF)
    results["resumed"] = end(run, *mlbfgs_jax.load_state(folder / "of two processes", *run.start()), HALF)
    results["from one"] = end(run, *mlbfgs_jax.load_state(folder / "of one process", *run.start()), HALF)

    params, state = after(run, HALF)
    results["before"] = whole(run, (params, state))
    inputs, targets = make_batch(HALF)
    inputs = inputs.copy()
    inputs[-1, 0] = np.nan  # in the last device's rows, of the last process
    results["skipped"] = whole(run, run.take(params, state, (inputs, targets)))
    results["failure"] = failure(folder, run)
    local = jax.tree.leaves(run.start())
    results["addressable"] = [leaf.is_fully_addressable for leaf in local]
    np.save(folder / f"result{process}.npy", np.array([results], dtype=object), allow_pickle=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
