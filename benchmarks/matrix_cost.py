"""What a step with `preconditioner="kronecker"` costs beside SOAP: time, products of matrices, memory.

The weights are those of four models. Values matter in one respect: pairs that are noise are stored as zeros,
and the stored pairs are not read as long as all of them are. So one contestant has gradients of noise, as
small batches give; all others the gradient of a paraboloid, where pairs say something. All contestants take
turns, window by window, in one process; a figure is the median over windows of one step's time, without that
of the gradients, and ratios are to the fastest SOAP. Bases are renewed every 10 steps by all of them. The
floor is the time of the step's matrix products alone, counted below and measured in the same turns.
HeavyBall's SOAP runs without its compiler, as the others do; Meta's Shampoo is not on PyPI.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import heavyball
import pytorch_optimizer
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.tasks.problems import TASKS
from benchmarks.tasks.training import state_bytes
from mlbfgs_torch import MLBFGS

FREQUENCY, LARGEST = 10, 2048
SOAPS = ("SOAP (pytorch_optimizer)", "SOAP (HeavyBall)")
OURS, NOISY = ("Kronecker, m = 5", "Kronecker, m = 0"), "Kronecker, m = 5, noise"
WINDOW = 10
"""Steps of one window: as many as from one basis to the next, so that each window has one."""
WARM = 6
"""Windows that are not timed: bases are formed, memory is allocated, gradients of some windows give pairs."""


def _heavyball(params: Iterator[nn.Parameter]) -> Optimizer:
    heavyball.utils.compile_mode = None
    return heavyball.SOAP(params, lr=1e-3, precondition_frequency=FREQUENCY, max_precond_dim=LARGEST)


def contestants() -> dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]]:
    """What makes the optimizer of each, by name."""
    return {
        OURS[0]: lambda params: MLBFGS(params, lr=1e-3, preconditioner="kronecker"),
        NOISY: lambda params: MLBFGS(params, lr=1e-3, preconditioner="kronecker"),
        OURS[1]: lambda params: MLBFGS(params, lr=1e-3, preconditioner="kronecker", history_size=0),
        SOAPS[0]: lambda params: pytorch_optimizer.SOAP(
            params, lr=1e-3, precondition_frequency=FREQUENCY, max_precondition_dim=LARGEST
        ),
        SOAPS[1]: _heavyball,
        "AdamW": lambda params: AdamW(params, lr=1e-3),
    }


def shapes_of(model: str) -> list[tuple[int, ...]]:
    """Shapes of a model's parameters."""
    if model == "GPT-2 layer":
        width = 768
        layer = [(3 * width, width), (3 * width,), (width, width), (width,)]
        layer += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        return [*layer, *4 * [(width,)]]
    return [tuple(param.shape) for param in TASKS[model].make(0).model.parameters()]


MODELS = ("autoencoder", "transformer", "resnet", "GPT-2 layer")


def products(shapes: list[tuple[int, ...]], history: int) -> list[tuple[int, int, int, float]]:
    """The products of matrices in a step: (rows, inner, columns) and how often each occurs, turns included.

    For a weight of a x b with both factors: a factor takes ``a a b``; into the basis and back ``a a b`` and
    ``a b b`` each; a turn, every tenth step, one product and a QR decomposition (some four thirds of a
    product) of a x a, one product for the change of basis, and the stored rows into the new basis.
    """
    found = []
    for shape in shapes:
        if len(shape) < 2:
            continue
        a, b = shape[0], torch.Size(shape[1:]).numel()
        for side, other in ((a, b), (b, a)):
            if 1 < side <= LARGEST:
                found += [(side, other, side, 1.0), (side, side, other, 2.0 + 2 * history / FREQUENCY)]
                found.append((side, side, side, (1 + 4 / 3 + 1) / FREQUENCY))
    return found


def floor(shapes: list[tuple[int, ...]], history: int, device: str) -> Callable[[], None]:
    """A function that does the products of ten steps, as matrices of their shapes."""
    work = [
        (torch.randn(m, k, device=device), torch.randn(k, n, device=device), round(count * WINDOW))
        for m, k, n, count in products(shapes, history)
    ]

    def run() -> None:
        for left, right, count in work:
            for _ in range(count):
                left @ right

    return run


def _weights(shapes: list[tuple[int, ...]], device: str) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]


def _seconds(act: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def _ten_steps(optimizer: Optimizer, params: list[nn.Parameter], device: str, *, noise: bool) -> float:
    """Seconds of ten steps, without their gradients."""
    total = 0.0
    before = [torch.zeros_like(param) for param in params]
    for _ in range(WINDOW):
        for param, last in zip(params, before, strict=True):
            if noise:  # gradients of neighbouring batches repel each other, since an epoch is drawn once
                fresh = torch.randn_like(param)
                param.grad = fresh - 0.12 * last
                last.copy_(fresh)
            else:
                param.grad = param.detach().clone()
        total += _seconds(optimizer.step, device)
    return total


class Cost(NamedTuple):
    """What a step of a contestant costs."""

    seconds: float
    """Of one step."""
    size: float | None
    """Bytes of state per parameter; None for a floor."""
    speak: bool | None
    """Whether stored pairs said something at the end; None where there are none."""


def measure(model: str, rounds: int, device: str) -> dict[str, Cost]:
    """For each contestant, and the floors."""
    shapes = shapes_of(model)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    runs: dict[str, Callable[[], float]] = {}
    optimizers = {}
    torch.manual_seed(0)
    for name, build in contestants().items():
        params = _weights(shapes, device)
        optimizers[name] = build(iter(params))
        runs[name] = partial(_ten_steps, optimizers[name], params, device, noise=name == NOISY)
    for history in (5, 0):
        work = floor(shapes, history, device)
        runs[f"products alone, m = {history}"] = partial(_seconds, work, device)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + WARM):
        for name, run in runs.items():
            seconds = run() / WINDOW
            if turn >= WARM:
                times[name].append(seconds)
    return {
        name: _figures(statistics.median(own), optimizers.get(name), count) for name, own in times.items()
    }


def _figures(seconds: float, optimizer: Optimizer | None, count: int) -> Cost:
    if optimizer is None:
        return Cost(seconds, None, None)
    speak = None
    if isinstance(optimizer, MLBFGS) and optimizer.param_groups[0]["history_size"]:
        speak = bool((optimizer.diagnostics()[0].middle_matrix != 0).any())
    return Cost(seconds, state_bytes(optimizer) / count, speak)


def main() -> None:
    """Print a table for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parsed = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for model in parsed.models:
        found = measure(model, parsed.rounds, parsed.device)
        best = min(cost.seconds for name, cost in found.items() if name in SOAPS)
        print(f"\n| {model} | ms a step | over the fastest SOAP | bytes a parameter | pairs speak |")
        print("| --- | ---: | ---: | ---: | --- |")
        for name, (seconds, size, speak) in found.items():
            bytes_told = "" if size is None else f"{size:.1f}"
            told = "" if speak is None else "yes" if speak else "no"
            ratio = f"{1e3 * seconds:.2f} | {seconds / best:.2f}"
            print(f"| {name} | {ratio} | {bytes_told} | {told} |", flush=True)


if __name__ == "__main__":
    main()
