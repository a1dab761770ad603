"""What mlbfgs costs in JAX next to optax's optimizers: compilation, memory, steps, first updates, ensembles.

Each figure comes from a process of its own. All contestants take turns, round by round, and the least CPU
time of all rounds counts for compilation, the median for steps. ``--against DIR`` adds this library as
another checkout has it. "optax.lbfgs" is as optax gives it, with its line search; "no search" is its
direction alone, with as many pairs as mlbfgs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
HISTORY = 5
OURS = "mlbfgs"
OTHER = "mlbfgs of DIR"
SEARCH = "optax.lbfgs"
DIRECTION = "optax.lbfgs, no search"
PEERS = ("optax.adamw", "optax.contrib.muon", SEARCH, DIRECTION)
MODELS = ("MLP", "ResNet-18", "ResNet-50", "GPT-2", "GPT-2, scanned layers")
STEPS = {"20 leaves of 1,000": (20, 1_000), "1 leaf of 1e6": (1, 1_000_000), "1 leaf of 1e7": (1, 10_000_000)}
STEPS |= {"6 leaves of 1e6 / 6": (6, 1_000_000 // 6), "6 leaves of 1e7 / 6": (6, 10_000_000 // 6)}
MEMBERS = 64
Shape = tuple[int, ...]


def shapes_of(model: str) -> list[Shape]:
    """Shapes of a model's parameters."""
    if model == "MLP":
        return [(784, 512), (512,), (512, 512), (512,), (512, 10), (10,)]
    if model.startswith("ResNet"):
        return _resnet(*{"ResNet-18": ((2, 2, 2, 2), 2, 1), "ResNet-50": ((3, 4, 6, 3), 3, 4)}[model])
    width = 768
    layer = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    layers = 12 * layer if model == "GPT-2" else [(12, *shape) for shape in layer]
    return [(50257, width), (1024, width), *layers, (width,), (width,)]


def _resnet(depths: tuple[int, ...], kernels: int, growth: int) -> list[Shape]:
    """Convolutions without biases, each followed by two vectors of batch normalization (He et al. 2016)."""
    shapes: list[Shape] = [(7, 7, 3, 64), (64,), (64,)]
    before = 64
    for depth, width in zip(depths, (64, 128, 256, 512), strict=True):
        after = width * growth
        for _ in range(depth):
            if kernels == 2:
                sizes = [(3, 3, before, width), (3, 3, width, width)]
            else:
                sizes = [(1, 1, before, width), (3, 3, width, width), (1, 1, width, after)]
            sizes += [(1, 1, before, after)] if before != after else []
            shapes += [part for size in sizes for part in (size, size[-1:], size[-1:])]
            before = after
    return [*shapes, (before, 1000), (1000,)]


def optimizer(name: str) -> Any:
    """A contestant."""
    import optax

    from mlbfgs_jax import mlbfgs

    return {
        "optax.adamw": lambda: optax.adamw(1e-3),
        "optax.contrib.muon": lambda: optax.contrib.muon(1e-3),
        SEARCH: optax.lbfgs,
        DIRECTION: lambda: optax.lbfgs(1e-3, memory_size=HISTORY, linesearch=None),
    }.get(name, lambda: mlbfgs(1e-3, history_size=HISTORY))()


def training_step(tx: Any, *, searches: bool = False) -> Callable[[Any, Any, Any], Any]:
    """An update and its application; a line search is given the sum of squares to descend on."""
    import jax
    import jax.numpy as jnp
    import optax

    def value(params: Any) -> Any:
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    def step(params: Any, state: Any, grads: Any) -> Any:
        more = {"value": value(params), "grad": grads, "value_fn": value} if searches else {}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state

    return step


def compilation(name: str, model: str) -> dict[str, float]:
    """CPU seconds to trace, lower and compile a step, the process's peak memory in MB, and kernels."""
    import jax

    tx = optimizer(name)
    params = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes_of(model)]
    state = jax.eval_shape(tx.init, params)
    start = time.process_time()
    step = training_step(tx, searches=name == SEARCH)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "MB": peak, "fusions": compiled.as_text().count(" fusion(")}


def steps(name: str, size: str) -> dict[str, float]:
    """Milliseconds and page faults of a compiled step, and scratch memory in bytes per value."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    count, n = STEPS[size]
    rng = np.random.default_rng(0)

    def leaves(scale: float) -> list[Any]:
        return [jnp.asarray(scale * rng.standard_normal(n, dtype="float32")) for _ in range(count)]

    tx, params = optimizer(name), leaves(0.1)
    state = jax.tree.map(
        jnp.copy, tx.init(params)
    )  # optax.lbfgs holds a buffer twice, which hinders donation
    grads = [leaves(1.0) for _ in range(3)]
    step = jax.jit(training_step(tx), donate_argnums=(0, 1)).lower(params, state, grads[0]).compile()
    number = max(20, min(2_000, 200_000_000 // (count * n)))
    for i in range(-10, number):
        if i == 0:
            jax.block_until_ready(params)
            faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        params, state = step(params, state, grads[i % 3])
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    scratch = step.memory_analysis().temp_size_in_bytes / (count * n)
    return {"ms": 1e3 * seconds / number, "faults": faults / number, "B/value": scratch}


def first_update(name: str, _: str) -> dict[str, float]:
    """CPU seconds of the first update outside `jit`, for the MLP."""
    import jax
    import jax.numpy as jnp

    tx, params = optimizer(name), [jnp.ones(shape) for shape in shapes_of("MLP")]
    state = tx.init(params)
    start = time.process_time()
    jax.block_until_ready(tx.update(params, state, params)[0])
    return {"seconds": time.process_time() - start}


def ensemble(name: str, kind: str) -> dict[str, float]:
    """Milliseconds of 100 steps of 64 small networks under `vmap`, and one after another."""
    import jax
    import jax.numpy as jnp
    import optax

    from mlbfgs_jax import mlbfgs

    tx = optax.adamw(0.03) if name == "optax.adamw" else mlbfgs(0.03, adaptive=kind == "adaptive")
    x = jnp.linspace(-2, 2, 80)[:, None]

    def loss(params: Any) -> Any:
        fit = jnp.tanh(x @ params["hidden"] + params["bias"]) @ params["out"]
        return jnp.mean((fit - jnp.sin(3 * x)) ** 2)

    def train(key: Any) -> Any:
        draw = jax.random.normal(key, (3, 32))
        params = {"hidden": 3 * draw[:1], "bias": 2 * draw[1], "out": draw[2][:, None] / 6}
        step = training_step(tx)

        def body(carry: Any, _: Any) -> Any:
            return step(*carry, jax.grad(loss)(carry[0])), None

        return jax.lax.scan(body, (params, tx.init(params)), length=100)[0][0]

    keys = jax.random.split(jax.random.key(0), MEMBERS)
    together = jax.jit(jax.vmap(train)).lower(keys).compile()
    alone = jax.jit(lambda keys: jax.lax.map(train, keys)).lower(keys).compile()

    def milliseconds(run: Any) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            jax.block_until_ready(run(keys))
            times.append(1e3 * (time.perf_counter() - start))
        return min(times)

    vmap, scan = milliseconds(together), milliseconds(alone)
    return {"vmap ms": vmap, "scan ms": scan, "vmap / scan": vmap / scan}


CASES: dict[str, Callable[[str, str], dict[str, float]]] = {
    "compilation": compilation,
    "steps": steps,
    "first": first_update,
    "ensemble": ensemble,
}


def measured(case: str, name: str, what: str, against: Path | None) -> dict[str, float]:
    """One figure of one contestant, from a process of its own."""
    root = against if name == OTHER and against else HERE
    paths = os.pathsep.join([str(root), str(root / "adapters")])
    env = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--case", case, name, what]
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(
    case: str, whats: tuple[str, ...], names: tuple[str, ...], rounds: int, against: Path | None
) -> Iterator[str]:
    """A table with a row per contestant and, in order, its ratios to the peers."""
    choose = min if case in ("compilation", "first") else statistics.median
    for what in whats:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                found[name].append(measured(case, name, what, against))
        rows = {
            name: {key: choose(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
        }
        keys = list(next(iter(rows.values())))
        bases = [name for name in (*PEERS, OTHER) if name in rows]
        head = "".join(f"{'x ' + name.removeprefix('optax.'):>20}" for name in bases)
        yield f"{what:26}" + "".join(f"{key:>12}" for key in keys) + head
        for name, row in rows.items():
            ratios = [row[keys[0]] / rows[base][keys[0]] for base in bases]
            figures = "".join(f"{row[key]:12.{2 if row[key] < 100 else 0}f}" for key in keys)
            yield f"  {name:24}" + figures + "".join(f"{ratio:20.2f}" for ratio in ratios)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    parser.add_argument("--tables", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of this library")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        case, name, what = options.case
        print(json.dumps(CASES[case](name, what)))
        return
    import jax
    import optax

    ours = (OURS, OTHER) if options.against else (OURS,)
    print(f"JAX {jax.__version__}, optax {optax.__version__}, {os.cpu_count()} cores, float32, m = {HISTORY}")
    for case, whats, names in (
        ("compilation", tuple(options.models), (*PEERS, *ours)),
        ("steps", tuple(STEPS), ("optax.adamw", DIRECTION, *ours)),
        ("first", ("MLP, outside jit",), ("optax.adamw", DIRECTION, *ours)),
        ("ensemble", ("adaptive", "fixed schedule"), ("optax.adamw", *ours)),
    ):
        if case in options.tables:
            print(f"\n{(CASES[case].__doc__ or '').strip()}")
            for line in table(case, whats, names, options.rounds, options.against):
                print(line, flush=True)


if __name__ == "__main__":
    main()
