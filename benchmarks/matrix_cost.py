"""What a step with `preconditioner="kronecker"` costs beside SOAP: time, products of matrices, memory.

The weights are those of four models; gradients are random, since their values do not matter. All contestants
take turns, window by window, in one process; a figure is the median over windows of one step's time, and
ratios are to the fastest SOAP. Bases are renewed every 10 steps by all of them. The floor is the time of the
step's matrix products alone, counted below and measured in the same turns. HeavyBall's SOAP takes part where
it is installed, without its compiler, as the others run; Meta's Shampoo is not on PyPI.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytorch_optimizer
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from benchmarks.tasks.problems import TASKS
from benchmarks.tasks.training import state_bytes
from mlbfgs_torch import MLBFGS

FREQUENCY, LARGEST = 10, 2048
SOAPS = ("SOAP (pytorch_optimizer)", "SOAP (HeavyBall)")
OURS = ("Kronecker, m = 5", "Kronecker, m = 0")
WINDOW = 10
"""Steps of one window: as many as from one basis to the next, so that each window has one."""


def _heavyball(params: Iterator[nn.Parameter]) -> Optimizer:
    import heavyball

    heavyball.utils.compile_mode = None
    return heavyball.SOAP(params, lr=1e-3, precondition_frequency=FREQUENCY, max_precond_dim=LARGEST)


def contestants() -> dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]]:
    """Those that are installed."""
    found: dict[str, Callable[[Iterator[nn.Parameter]], Optimizer]] = {
        OURS[0]: lambda params: MLBFGS(params, lr=1e-3, preconditioner="kronecker"),
        OURS[1]: lambda params: MLBFGS(params, lr=1e-3, preconditioner="kronecker", history_size=0),
        SOAPS[0]: lambda params: pytorch_optimizer.SOAP(
            params, lr=1e-3, precondition_frequency=FREQUENCY, max_precondition_dim=LARGEST
        ),
    }
    if importlib.util.find_spec("heavyball") is not None:
        found[SOAPS[1]] = _heavyball
    found["AdamW"] = lambda params: AdamW(params, lr=1e-3)
    return found


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
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device)
    return params


def _seconds(act: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    act()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ten_steps(optimizer: Optimizer, params: list[nn.Parameter], grads: list[Tensor]) -> None:
    for _ in range(WINDOW):
        for param, grad in zip(params, grads, strict=True):  # some optimizers write to gradients
            param.grad = grad
        optimizer.step()


def measure(model: str, rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """For each contestant, and the floors: seconds of a step and bytes of state per parameter."""
    shapes = shapes_of(model)
    count = sum(torch.Size(shape).numel() for shape in shapes)
    runs: dict[str, Callable[[], Any]] = {}
    optimizers = {}
    for name, build in contestants().items():
        params = _weights(shapes, device)
        grads = [param.grad for param in params]
        optimizers[name] = build(iter(params))
        runs[name] = lambda o=optimizers[name], p=params, g=grads: _ten_steps(o, p, g)
    runs["products alone, m = 5"] = floor(shapes, 5, device)
    runs["products alone, m = 0"] = floor(shapes, 0, device)
    for run in runs.values():  # the first windows form bases and allocate memory
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, device) / WINDOW)
    return {
        name: (
            statistics.median(own),
            state_bytes(optimizers[name]) / count if name in optimizers else 0.0,
        )
        for name, own in times.items()
    }


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
        best = min(seconds for name, (seconds, _) in found.items() if name in SOAPS)
        print(f"\n| {model} | ms a step | over the fastest SOAP | bytes a parameter |")
        print("| --- | ---: | ---: | ---: |")
        for name, (seconds, size) in found.items():
            told = f"{size:.1f}" if size else ""
            print(f"| {name} | {1e3 * seconds:.2f} | {seconds / best:.2f} | {told} |", flush=True)


if __name__ == "__main__":
    main()
