"""Time whole optimizer steps against the bytes that they must move and against PyTorch's optimizers.

The parameters are those of ResNet-18 (11.7 million values in 62 tensors). A step of mL-BFGS must read its
history twice and move some 15 further values per parameter; at the speed with which this machine copies
memory, measured in the same run, that is the floor. All contestants take turns, window by window, so that
ratios are reliable on a noisy machine. A second table is for a model of 60 small tensors, where the number of
operations matters and not their size; a third times the core alone on NumPy and PyTorch; a fourth compares
whole compiled updates in JAX with optax's L-BFGS (`jax_cost.py` has compilation and whole steps).

On a GPU (``--device cuda``) steps of GPT-2's parameters (124 million values in 148 tensors) are timed as
well, and each kernel alone. For each step there are also the time until the host can go on, and the device's
own time without its gaps.

``--against DIR`` instead compares CPU times with those of another checkout of the library.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import array_api_compat.numpy
import array_api_compat.torch
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, AdamW, Optimizer

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_jax import scale_by_mlbfgs
from mlbfgs_torch import MLBFGS
from mlbfgs_torch.kernels import TorchKernels

HISTORY = 5
EVERY = 50
FLOOR = 4 * HISTORY + 15
"""Values that a step must move per parameter: the history twice; in the first pass the gradient, the mean
square and the root; in the second the gradient, the root and the direction; and the parameter and its
averages."""
OURS = {
    "mL-BFGS, no refresh": {"adaptive": False, "update_every": 10**6},
    "mL-BFGS, T = 50": {"adaptive": False, "update_every": EVERY},
    "mL-BFGS, adaptive": {},
    "mL-BFGS, bfloat16 history": {"adaptive": False, "update_every": EVERY, "history_dtype": "bfloat16"},
    "mL-BFGS, capturable": {"adaptive": False, "update_every": EVERY, "capturable": True},
    "mL-BFGS, formulas, T = 50": {"preset": "formulas", "update_every": EVERY},
}
PLAIN, PEER = "mL-BFGS, no refresh", "torch.optim.LBFGS"
GRAPH = "mL-BFGS, CUDA graph"
LARGE = ("mL-BFGS, no refresh", "mL-BFGS, adaptive", "mL-BFGS, bfloat16 history", GRAPH, "AdamW, fused")
"""Contestants that fit together on one GPU with GPT-2's parameters."""
COMPILED = ("mL-BFGS, adaptive", "AdamW, foreach")
"""Contestants whose step is also compiled, for small tensors."""
BUSY = 30_000_000
"""Cycles of work (about 15 milliseconds) before a step whose time on the device is measured."""
COPIED = 2**28
"""Largest number of values that are copied to measure the speed of memory."""
JAX_SIZES = {"cpu": (1_000_000, 10_000_000), "cuda": (1_000_000, 10_000_000, 100_000_000)}
JAX_OURS = {
    **{name: settings for name, settings in OURS.items() if "capturable" not in settings},
    "mL-BFGS, lbfgs, T = 1": {"preset": "lbfgs"},
}
JAX_PEER, JAX_DONATED = "optax.scale_by_lbfgs", "the same, state donated"
JAX_ADAM = "optax.scale_by_adam"
BACKENDS = {"numpy": array_api_compat.numpy, "torch": array_api_compat.torch}
TILES = {"numpy": 2**16, "torch": 2**18}
SETTINGS: dict[str, dict[str, Any]] = {"default": {}, "formulas": {"preset": "formulas"}}


class Row(NamedTuple):
    """One contestant: mean milliseconds of a step in each window, and bytes of state per parameter."""

    name: str
    windows: list[float]
    bytes_per_parameter: float
    pairs: int
    overlapped: list[tuple[float, float]]
    """On a GPU: milliseconds until the host goes on, and of the device without gaps, in each window."""

    @property
    def milliseconds(self) -> float:
        """Median over the windows."""
        return statistics.median(self.windows)


def resnet18_shapes() -> list[tuple[int, ...]]:
    """Shapes of the parameters of ResNet-18 for 1000 classes (He et al. 2016)."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    before = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, before, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if before != width:
                shapes += [(width, before, 1, 1), (width,), (width,)]
            before = width
    return [*shapes, (1000, 512), (1000,)]


def gpt2_shapes() -> list[tuple[int, ...]]:
    """Shapes of the parameters of GPT-2 with 12 layers of width 768 (Radford et al. 2019)."""
    width = 768
    layer: list[tuple[int, ...]] = [
        (width,),
        (width,),
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
    ]
    layer += [(width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(50257, width), (1024, width), *(12 * layer), (width,), (width,)]


class Problem:
    """A quadratic with a gradient that has some noise, and an optimizer on it."""

    def __init__(
        self, build: Callable[[list[nn.Parameter]], Optimizer], shapes: list[tuple[int, ...]], device: str
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter((0.01 * torch.randn(shape, generator=generator)).to(device)) for shape in shapes
        ]
        self.noise = [1e-4 * torch.randn_like(param) for param in self.params]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        self.sign = 1.0
        self.optimizer = build(self.params)
        self.step: Callable[[], Any] = self.optimizer.step

    def capture(self) -> None:
        """Run all further steps as a CUDA graph."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.optimizer.step()
        self.step = graph.replay

    def evaluate(self) -> float:
        """Write the gradient in place."""
        self.sign = -self.sign
        for param, noise in zip(self.params, self.noise, strict=True):
            torch.add(param.detach(), noise, alpha=self.sign, out=param.grad)
        return 0.0

    def window(self, steps: int) -> float:
        """Mean milliseconds of a step without the evaluation."""
        total = 0.0
        for _ in range(steps):
            if isinstance(self.optimizer, LBFGS):
                total += milliseconds(lambda: self.optimizer.step(self.evaluate))
                total -= milliseconds(self.evaluate)
            else:
                self.evaluate()
                total += milliseconds(self.step)
        return total / steps

    def overlapped(self, steps: int) -> tuple[float, float]:
        """Mean milliseconds of a step, which the device begins when the host has launched all of it: until
        the host goes on, and on the device."""
        host = device = 0.0
        for _ in range(steps):
            self.evaluate()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(BUSY)
            start.record()
            before = time.perf_counter()
            self.step()
            host += time.perf_counter() - before
            end.record()
            torch.cuda.synchronize()
            device += start.elapsed_time(end)
        return 1e3 * host / steps, device / steps

    def bytes_per_parameter(self) -> float:
        """Bytes of the optimizer's state."""
        tensors = {}
        for entry in self.optimizer.state.values():
            for value in entry.values():
                for tensor in value if isinstance(value, list) else [value]:
                    if isinstance(tensor, Tensor) and tensor.numel() > 1:
                        tensors[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(tensors.values()) / sum(param.numel() for param in self.params)


def milliseconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call, including the GPU's work."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def contestants(device: str) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """Each optimizer by name, with a rate so small that nothing changes much."""
    settings_of = {**OURS, GRAPH: {"capturable": True}} if device == "cuda" else OURS

    def ours(settings: dict[str, Any]) -> Callable[[list[nn.Parameter]], Optimizer]:
        return lambda params: MLBFGS(params, lr=1e-3, momentum=0.9, weight_decay=0.0, **settings)

    return {
        **{name: ours({"history_size": HISTORY, **settings}) for name, settings in settings_of.items()},
        PEER: lambda params: LBFGS(
            params, lr=1e-3, max_iter=1, history_size=HISTORY, tolerance_grad=0, tolerance_change=0
        ),
        "AdamW, foreach": lambda params: AdamW(params, lr=1e-6, foreach=True),
        "AdamW, fused": lambda params: AdamW(params, lr=1e-6, fused=True),
    }


def copying(values: int, device: str) -> float:
    """Milliseconds to move this many float32 values, half of them read and half written."""
    source = torch.ones(min(values, COPIED) // 2, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return milliseconds(lambda: target.copy_(source)) * values / (2 * source.numel())


def both_products(n: int, device: str) -> tuple[float, float]:
    """Milliseconds of the projection and the combination alone: as this library does them, and each as
    one matrix-vector product."""
    kernels = TorchKernels(torch.device(device))
    rows, vector = torch.ones(2 * HISTORY, n, device=device), torch.ones(n, device=device)
    weights, out = rows[:, 0].clone(), torch.ones_like(vector)
    return (
        milliseconds(lambda: (kernels.times(rows, vector), kernels.weighted(weights, rows, vector, out))),
        milliseconds(lambda: (torch.mv(rows, vector), torch.mv(rows.t(), weights, out=out))),
    )


def optimizers(
    repeats: int, device: str, shapes: list[tuple[int, ...]], names: Sequence[str] = ()
) -> tuple[list[Row], float, list[float], int]:
    """Rows of all contestants or of those named, the floor and the products in milliseconds, and the number
    of parameters."""
    builds = contestants(device)
    problems = {name: Problem(builds[name], shapes, device) for name in names or builds}
    n = sum(param.numel() for param in next(iter(problems.values())).params)
    for name, problem in problems.items():
        problem.window(2 * HISTORY + 4)  # L-BFGS's history is full, ours has its memory
        if name == GRAPH:
            problem.capture()
    windows: dict[str, list[float]] = {name: [] for name in problems}
    overlapped: dict[str, list[tuple[float, float]]] = {name: [] for name in problems}
    floors, products = [], []
    for _ in range(repeats):
        floors.append(copying(FLOOR * n, device))
        products.append(both_products(n, device))
        for name, problem in problems.items():
            steps = EVERY if "mL-BFGS" in name else 10
            windows[name].append(problem.window(steps))
            if device == "cuda" and name != PEER:  # the peer waits for the device
                overlapped[name].append(problem.overlapped(steps))
    rows = [
        Row(
            name,
            windows[name],
            problem.bytes_per_parameter(),
            _pairs(problem.optimizer),
            overlapped[name],
        )
        for name, problem in problems.items()
    ]
    return (
        rows,
        statistics.median(floors),
        [statistics.median(each) for each in zip(*products, strict=True)],
        n,
    )


def small(repeats: int, device: str) -> list[tuple[str, float]]:
    """Median milliseconds of a step for 60 tensors of 256 values."""
    builds, shapes = contestants(device), [(16, 16)] * 60
    problems = {name: Problem(build, shapes, device) for name, build in builds.items()}
    for name in COMPILED if device == "cpu" else ():
        compiled = problems[f"{name}, compiled"] = Problem(builds[name], shapes, device)
        compiled.step = torch.compile(compiled.optimizer.step)
    if GRAPH in problems:
        problems[GRAPH].window(2 * HISTORY + 4)
        problems[GRAPH].capture()
    times: dict[str, list[float]] = {name: [] for name in problems}
    for _ in range(repeats + 1):
        for name, problem in problems.items():
            times[name].append(problem.window(EVERY))
    return [(name, statistics.median(values[1:])) for name, values in times.items()]


def _pairs(optimizer: Optimizer) -> int:
    if isinstance(optimizer, MLBFGS):
        return int(optimizer.diagnostics()[0].pairs[0])
    if isinstance(optimizer, LBFGS):
        return len(next(iter(optimizer.state.values()))["old_dirs"])
    return 0


def kernels_alone(n: int, repeats: int = 20) -> Iterator[str]:
    """The table of the kernels in Triton, one leaf of n values: values moved, time and speed."""
    from mlbfgs_torch.fused import FusedKernels

    kernels, dtype = FusedKernels(torch.device("cuda")), torch.float32
    grad, exp_avg_sq, kept, update, param, momentum, *arrays = torch.rand(10, n, device="cuda")
    means, history = adapter.Means(*arrays), torch.rand(2, HISTORY, n, device="cuda")
    weights, slot = torch.rand(2 * HISTORY, device="cuda"), torch.ones(1, dtype=torch.int64, device="cuda")
    half, least, true = (torch.tensor(x, device="cuda") for x in (0.5, 1e-3, True))
    new = adapter.DiagonalRoot(exp_avg_sq, half, least, 0.25)
    known = adapter.DiagonalRoot(exp_avg_sq, None, least, 0.25, kept)
    entering, leaf = (adapter.Leaf(0, dtype, history, means, root) for root in (new, known))
    end = adapter.StepEnd(half, 0.1, 0.9, 0.01, nesterov=True)
    step = {
        "whiten": (14, lambda: kernels.whiten(entering, grad, means.grads, half)),
        "direct": (13, lambda: kernels.direct(leaf, grad, (weights, half), true)),
        "average, params": (3, lambda: kernels.average(means.params, param, half, true)),
        "average, grads": (3, lambda: kernels.average(means.grads, grad, half, true)),
        "average, squares": (3, lambda: kernels.average(exp_avg_sq, grad, half, true, squared=True)),
        "apply": (5, lambda: kernels.apply(param, update, momentum, end, true)),
    }
    check = {"next_products": (10, lambda: kernels.next_products(leaf, true))}
    refresh = {
        "push_next": (21, lambda: kernels.push_next(leaf, slot, (half, half, half), (true, true), grad)),
        "rotate, params": (3, lambda: kernels.rotate(means.params, means.prev_params, true, restart=True)),
        "rotate, grads": (3, lambda: kernels.rotate(means.grads, means.prev_grads, true, restart=True)),
    }
    yield f"n = {n:,}; a copy: {4 * COPIED / copying(COPIED, 'cuda') / 1e6:.0f} GB/s"
    yield f"{'':18}{'values':>8}{'ms':>8}{'GB/s':>7}"
    for title, work in {"each step": step, "a check": check, "a refresh": refresh}.items():
        total = 0.0
        for name, (values, run) in work.items():
            run()
            time_of_one = milliseconds(lambda run=run: [run() for _ in range(repeats)]) / repeats
            total += time_of_one
            yield f"{name:18}{values:8}{time_of_one:8.2f}{4e-6 * values * n / time_of_one:7.0f}"
        yield f"{title:18}{sum(values for values, _ in work.values()):8}{total:8.2f}"


def direction_bandwidth(n: int, device: str) -> tuple[float, float]:
    """GB/s of the direction at one leaf of n values (two reads of the history and 6 n), and of a copy."""
    param = nn.Parameter(torch.zeros(n, device=device))
    param.grad = torch.ones_like(param)
    optimizer = MLBFGS([param], preset="formulas", history_size=HISTORY)
    optimizer.step()
    unit = optimizer._units[0]
    grads = [param.grad]

    def work() -> None:
        core.Method(unit.config, blocks=unit.blocks, kernels=unit.kernels).direction(unit.state, grads)

    work()
    moved = 4 * (4 * HISTORY + 6) * n
    ours = statistics.median(milliseconds(work) for _ in range(5))
    copied = statistics.median(copying(8 * n, device) for _ in range(5))
    return moved / ours / 1e6, 32 * n / copied / 1e6


def core_alone(backend: str, settings: dict[str, Any], n: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of the floor, a plain step, one with a check and one with a refresh."""
    xp, rng = BACKENDS[backend], np.random.default_rng(0)
    config, kernels = core.Config(**settings), core.Kernels(xp, TILES[backend])
    x, g = (xp.asarray(rng.standard_normal(n, dtype=np.float32)) for _ in range(2))
    state = core.Method(config).init([x], xp=xp)
    rows = xp.reshape(state.history[0], (2 * config.history_size, n))
    rows[...] = 1e-4  # memory is touched, so that no page is missing at the first read
    weights = xp.ones(2 * config.history_size, dtype=xp.float32)

    def step(check: bool, due: bool) -> None:
        nonlocal state
        _, state = core.Method(config, kernels=kernels).step(state, [x], [g], when_check=check, when_due=due)

    parts = {
        "floor": lambda: (rows @ g, weights @ rows),
        "step": lambda: step(False, False),
        "check": lambda: step(True, False),
        "refresh": lambda: step(False, True),
    }
    step(False, False)
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):
        for name, work in parts.items():
            times[name].append(milliseconds(work))
    return {name: statistics.median(values) for name, values in times.items()}


class JaxProblem:
    """The noisy quadratic of n values in JAX, with a compiled update."""

    def __init__(self, name: str, tx: optax.GradientTransformation, n: int) -> None:
        one, other = jax.random.split(jax.random.key(0))
        self.params, noise = 1e-2 * jax.random.normal(one, (n,)), 1e-4 * jax.random.normal(other, (n,))
        self.state = tx.init(self.params)
        if name == JAX_DONATED:  # its initial state holds a buffer twice, which cannot be donated
            self.state = jax.tree.map(jnp.copy, self.state)
        self.evaluate = jax.jit(lambda params, sign: params + sign * noise)
        self.move = jax.jit(lambda params, update: params - 1e-3 * update, donate_argnums=0)
        donated = () if name == JAX_PEER else (0, 1)
        update = jax.jit(tx.update, donate_argnums=donated)
        self.update = update.lower(self.params, self.state, self.params).compile()
        self.scratch = self.update.memory_analysis().temp_size_in_bytes / n
        self.sign = 1.0

    def window(self, steps: int) -> float:
        """Mean milliseconds of an update."""
        total = 0.0
        for _ in range(steps):
            self.sign = -self.sign
            grads = jax.block_until_ready(self.evaluate(self.params, self.sign))
            start = time.perf_counter()
            update, self.state = jax.block_until_ready(self.update(grads, self.state, self.params))
            total += time.perf_counter() - start
            self.params = self.move(self.params, update)
        return 1e3 * total / steps


def jax_updates(n: int, repeats: int) -> Iterator[str]:
    """The table of JAX's updates: medians over windows in which all take turns."""
    peer = optax.scale_by_lbfgs(HISTORY)
    ours = {name: scale_by_mlbfgs(history_size=HISTORY, **settings) for name, settings in JAX_OURS.items()}
    transformations = {JAX_ADAM: optax.scale_by_adam(), JAX_PEER: peer, JAX_DONATED: peer, **ours}
    problems = {name: JaxProblem(name, tx, n) for name, tx in transformations.items()}
    times: dict[str, list[float]] = {name: [] for name in problems}
    for problem in problems.values():
        problem.window(2 * HISTORY + 4)
    for _ in range(repeats):
        for name, problem in problems.items():
            times[name].append(problem.window(EVERY if name in ours else 10))
    base = statistics.median(times[JAX_PEER])
    yield f"{'':28}{'ms/update':>10}{'spread':>14}{'x optax':>9}{'scratch B/param':>17}{'pairs':>7}"
    for name, problem in problems.items():
        middle, spread = statistics.median(times[name]), ranged(times[name])
        pairs = int(problem.state.pairs[0]) if name in ours else HISTORY * (name != JAX_ADAM)
        yield f"{name:28}{middle:10.2f}{spread:>14}{middle / base:9.2f}{problem.scratch:17.0f}{pairs:7d}"


def print_jax(repeats: int, device: str) -> None:
    """Print the tables of JAX."""
    for n in JAX_SIZES[device]:
        print(
            f"\nJAX {jax.__version__}, whole compiled updates, n = {n:,}, float32, m = {HISTORY}", flush=True
        )
        print("\n".join(jax_updates(n, repeats)), flush=True)


def report(model: str, rows: list[Row], floor: float, products: list[float], n: int) -> Iterator[str]:
    """The table of the optimizers."""
    times = {row.name: row.milliseconds for row in rows}
    yield f"{model}'s parameters, n = {n:,}, float32, m = {HISTORY}, {device_name()}"
    yield (
        f"floor: {FLOOR} n values = {4 * FLOOR * n / 1e9:.2f} GB, {floor:.3g} ms at "
        f"{4 * FLOOR * n / floor / 1e6:.0f} GB/s, the copy speed of this run"
    )
    yield (
        f"the two products with the history alone: {products[0]:.3g} ms; as two matrix-vector products: "
        f"{products[1]:.3g} ms"
    )
    waits = any(row.overlapped for row in rows)
    columns = (
        f"{'ms/step':>8}{'spread':>14}{'x floor':>9}{'x LBFGS':>9}{'x plain':>9}{'B/param':>9}{'pairs':>7}"
    )
    yield f"{'':28}{columns}" + (f"{'host ms':>9}{'device ms':>11}{'x floor':>9}" if waits else "")
    for row in rows:
        peer = f"{row.milliseconds / times[PEER]:9.2f}" if PEER in times else f"{'-':>9}"
        line = (
            f"{row.name:28}{row.milliseconds:8.2f}{ranged(row.windows):>14}{row.milliseconds / floor:9.2f}"
            f"{peer}{row.milliseconds / times[PLAIN]:9.2f}{row.bytes_per_parameter:9.1f}{row.pairs:7d}"
        )
        if row.overlapped:
            host, device = (statistics.median(each) for each in zip(*row.overlapped, strict=True))
            line += f"{host:9.2f}{device:11.2f}{device / floor:9.2f}"
        yield line


def ranged(values: Sequence[float]) -> str:
    """The smallest and the largest value."""
    return f"{min(values):.2f}-{max(values):.2f}"


def device_name() -> str:
    """The machine and versions on which the figures were measured."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}"
    return f"{os.cpu_count()} cores of {platform.machine()}, PyTorch {torch.__version__}"


def draw(rows: list[Row], floor: float, path: Path) -> None:
    """Bars of time per step and of memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names = [row.name for row in rows]
    colors = ["tab:blue" if "mL-BFGS" in name else "tab:gray" for name in names]
    left.barh(names, [row.milliseconds for row in rows], color=colors)
    left.axvline(floor, color="tab:red", label="floor: bytes at copy speed")
    left.set_xlabel("milliseconds per step")
    left.legend(loc="lower right")
    left.invert_yaxis()
    right.barh(names, [row.bytes_per_parameter for row in rows], color=colors)
    right.set_xlabel("bytes of state per parameter")
    figure.suptitle(f"ResNet-18's parameters, {device_name()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print both tables; write the numbers and the picture to files if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="windows per optimizer")
    parser.add_argument("--size", type=int, default=10_000_000, help="parameters in the core's table")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of all but the core")
    parser.add_argument("--direction", type=int, default=0, help="also the direction alone at this size")
    parser.add_argument("--figure", type=Path, help="write a picture here")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--against", type=Path, metavar="DIR", help="only compare with this other checkout")
    options = parser.parse_args()
    if options.against:
        script = Path(__file__).with_name("against.py")
        subprocess.run(
            [sys.executable, script, options.against, "--rounds", str(options.repeats)], check=True
        )
        return
    rows, floor, products, n = optimizers(options.repeats, options.device, resnet18_shapes())
    print("\n".join(report("ResNet-18", rows, floor, products, n)), flush=True)
    if options.device == "cuda":
        large = optimizers(options.repeats, options.device, gpt2_shapes(), LARGE)
        print("\n".join(["", *report("GPT-2", *large)]), flush=True)
        torch.cuda.empty_cache()
        print("\n".join(["", "Kernels in Triton, float32, m = 5", *kernels_alone(124_000_000)]), flush=True)
    print("\n60 tensors of 256 values, milliseconds per step")
    for name, time_of_step in small(options.repeats, options.device):
        print(f"{name:30}{time_of_step:6.2f}", flush=True)
    if options.figure:
        draw(rows, floor, options.figure)
    if options.json:
        numbers = {row.name: {"milliseconds": row.windows, "bytes": row.bytes_per_parameter} for row in rows}
        options.json.write_text(json.dumps({"device": device_name(), "floor": floor, "rows": numbers}))
    if options.size:
        torch.cuda.empty_cache()  # does nothing without a GPU
        print_jax(options.repeats, options.device)
    if options.direction:
        ours, copy = direction_bandwidth(options.direction, options.device)
        share = f"{ours:.0f} GB/s, {ours / copy:.0%} of a copy's {copy:.0f}"
        print(f"\nthe direction alone, n = {options.direction:,}: {share}")
    if options.device != "cpu" or options.size == 0:
        return
    print(f"\nthe core alone, {options.size:,} float32 parameters; floor: two reads of the history")
    print(f"{'backend':8}{'settings':10}{'floor':>8}{'step':>8}{'ratio':>8}{'+ check':>9}{'+ refresh':>11}")
    for backend in BACKENDS:
        for name, settings in SETTINGS.items():
            t = core_alone(backend, settings, options.size, options.repeats)
            ratio, check, refresh = t["step"] / t["floor"], t["check"] - t["step"], t["refresh"] - t["step"]
            check = check if core.Config(**settings).adaptive else 0.0
            print(
                f"{backend:8}{name:10}{t['floor']:8.0f}{t['step']:8.0f}{ratio:8.2f}{check:9.0f}{refresh:11.0f}"
            )


if __name__ == "__main__":
    main()
