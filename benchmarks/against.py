"""CPU time of a step with default settings, in this tree against another checkout of the library.

``python benchmarks/step_cost.py --against DIR`` runs it. Both trees take turns, each time in a process of its
own on one thread, so that the ratios are reliable on a noisy machine; only what users call is called, which
older versions have too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CASES", "compare"]

HERE = Path(__file__).resolve().parents[1]
LARGE, SMALL = [(10_000_000,)], [(256,)] * 60
CASES: dict[str, tuple[str, list[tuple[int, ...]], int]] = {
    "NumPy, n = 1e7": ("numpy", LARGE, 10),
    "torch, n = 1e7": ("torch", LARGE, 10),
    "JAX, n = 1e7": ("jax", LARGE, 10),
    "NumPy, 60 arrays of 256": ("numpy", SMALL, 50),
    "torch, 60 arrays of 256": ("torch", SMALL, 50),
}
"""Backend, shapes, and steps of a window."""
WINDOWS = 6


def compare(other: Path, rounds: int) -> Iterator[str]:
    """The table: the lower quartile, over all windows, of milliseconds of CPU time in a step."""
    trees = [HERE, other.resolve()]
    yield f"{'':26}{'this tree':>10}{'the other':>11}{'ratio':>8}"
    for case in CASES:
        times: list[list[float]] = [[], []]
        for number in range(rounds):
            for tree in (0, 1) if number % 2 == 0 else (1, 0):
                times[tree] += _run(trees[tree], case)
        ours, theirs = (float(np.quantile(each, 0.25)) for each in times)
        yield f"{case:26}{ours:10.3f}{theirs:11.3f}{ours / theirs:8.3f}"


def _run(tree: Path, case: str) -> list[float]:
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    env = {
        **os.environ,
        **one_thread,
        "PYTHONPATH": os.pathsep.join([str(tree), str(tree / "adapters")]),
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
    }
    command = [sys.executable, __file__, str(tree), "--case", case]
    done = subprocess.run(command, env=env, cwd=tree, check=True, capture_output=True, text=True)
    return [float(x) for x in json.loads(done.stdout.splitlines()[-1])]


def windows(tree: Path, case: str) -> list[float]:
    """Mean milliseconds of CPU time of a step in each window, with the library of a tree."""
    import mlbfgs_core

    if not Path(mlbfgs_core.__file__).is_relative_to(tree):
        msg = f"`tree` must hold the library that is imported, got {tree}, not {mlbfgs_core.__file__}"
        raise ValueError(msg)
    backend, shapes, steps = CASES[case]
    rng = np.random.default_rng(0)
    params = [0.01 * rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    grads = [
        [sign * 1e-4 * rng.standard_normal(p.shape, dtype=np.float32) + p for p in params] for sign in (1, -1)
    ]
    step = {"numpy": _numpy, "torch": _torch, "jax": _jax}[backend](tree, params, grads)
    for number in range(12):
        step(number % 2)
    result = []
    for _ in range(WINDOWS):
        start = time.process_time()
        for number in range(steps):
            step(number % 2)
        result.append(1e3 * (time.process_time() - start) / steps)
    return result


def _numpy(tree: Path, params: Any, grads: Any) -> Callable[[int], Any]:
    if (tree / "adapters" / "mlbfgs_arrays").is_dir():
        from mlbfgs_arrays import MLBFGS
    else:  # its name before
        from mlbfgs_cupy import MLBFGS
    named = [dict(zip(map(str, range(len(each))), each, strict=True)) for each in (params, *grads)]
    optimizer = MLBFGS(named[0], lr=1e-6)
    return lambda which: optimizer.step(named[1 + which])


def _torch(tree: Path, params: Any, grads: Any) -> Callable[[int], Any]:
    import torch

    from mlbfgs_torch import MLBFGS

    own = [torch.nn.Parameter(torch.from_numpy(param)) for param in params]
    given = [[torch.from_numpy(grad) for grad in each] for each in grads]
    optimizer = MLBFGS(own, lr=1e-6)

    def step(which: int) -> None:
        for param, grad in zip(own, given[which], strict=True):
            param.grad = grad
        optimizer.step()

    return step


def _jax(tree: Path, params: Any, grads: Any) -> Callable[[int], Any]:
    import jax
    import jax.numpy as jnp
    import optax

    from mlbfgs_jax import mlbfgs

    tx = mlbfgs(1e-6)
    own, given = (jax.tree.map(jnp.asarray, each) for each in (params, grads))

    def advance(grad: Any, state: Any, params: Any) -> Any:
        update, state = tx.update(grad, state, params)
        return optax.apply_updates(params, update), state

    compiled = jax.jit(advance, donate_argnums=(1, 2))
    carry = own, tx.init(own)

    def step(which: int) -> None:
        nonlocal carry
        carry = jax.block_until_ready(compiled(given[which], carry[1], carry[0]))

    return step


def main() -> None:
    """Print the table, or the times of one case in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tree", type=Path, help="another checkout")
    parser.add_argument("--rounds", type=int, default=5, help="processes of each tree")
    parser.add_argument("--case", help="time the library of `tree` alone")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(windows(options.tree, options.case)))
        return
    for line in compare(options.tree, options.rounds):
        print(line, flush=True)


if __name__ == "__main__":
    main()
