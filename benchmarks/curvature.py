"""Draw the curvature that mL-BFGS finds in a network while it trains, and compare it with the exact one.

Run ``python3 -m nox -s bench -- curvature``. It takes about a minute, and writes figures to docs/_static and
tables to docs/_generated.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mlbfgs_diagnostics import Recorder, figure, table
from mlbfgs_diagnostics.panels import draw_spectrum, spectrum_handles
from mlbfgs_torch import MLBFGS

DOCS = Path(__file__).parents[1] / "docs"
WIDTH, STEPS, BATCH, SEED = 24, 300, 256, 0
BATCHES = (32, 256, 1797)
EXACT_STEPS, EXACT_EVERY = 120, 15
EXACT = "#b0b0b0"


class Data(NamedTuple):
    """All digits of 8 x 8 pixels."""

    images: Tensor
    labels: Tensor

    @classmethod
    def load(cls) -> Data:
        """Load the digits of scikit-learn."""
        images, labels = load_digits(return_X_y=True)
        return cls(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))

    def batches(self, size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless sequence of batches, drawn from one permutation after another."""
        generator, left = torch.Generator().manual_seed(SEED), torch.zeros(0, dtype=torch.int64)
        for _ in range(steps):
            while len(left) < size:
                left = torch.cat([left, torch.randperm(len(self.images), generator=generator)])
            chosen, left = left[:size], left[size:]
            yield self.images[chosen], self.labels[chosen]


class Run(NamedTuple):
    """The results of a training run."""

    optimizer: MLBFGS
    recorder: Recorder
    exact: dict[int, npt.NDArray[np.float64]]
    """For some steps, the eigenvalues of the Hessian of the loss on all digits."""


def main() -> None:
    """Train, draw, write."""
    options, start = parse(), time.perf_counter()
    torch.set_num_threads(1)
    data, parts = Data.load(), 10 if options.quick else 1
    steps, width = STEPS // parts, 8 if options.quick else WIDTH
    runs = {size: train(data, size, steps, width) for size in BATCHES}
    layers = train(data, BATCH, steps, width, blocks="layer")
    exact = train(data, len(data.images), EXACT_STEPS // parts, width, exact=True, preconditioner="none")
    save(figure(runs[BATCH].recorder), "curvature_run", options)
    save(draw_batches(runs), "curvature_batches", options)
    save(draw_layers(layers), "curvature_layers", options)
    save(draw_exact(exact), "curvature_exact", options)
    write("curvature_batches", batches_table(runs), options)
    write("curvature_exact", exact_table(exact), options)
    write("curvature_table", f"```text\n{shown(layers)}\n```\n", options)
    print(f"All of it took {time.perf_counter() - start:.0f} s.")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=DOCS, help="directory with _static and _generated")
    parser.add_argument("--quick", action="store_true", help="a tenth of the steps: does everything run?")
    return parser.parse_args()


def train(data: Data, size: int, steps: int, width: int, *, exact: bool = False, **settings: Any) -> Run:
    """A classifier with one hidden layer, at a rate that falls to 0."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
    optimizer = MLBFGS(model.named_parameters(), lr=2e-3, **settings)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    recorder, found = Recorder(every=2), {}
    for step, (images, labels) in enumerate(data.batches(size, steps)):
        if exact and step % EXACT_EVERY == 0:
            found[step] = eigenvalues(model, data)
        optimizer.zero_grad()
        loss = cost(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        recorder.record(optimizer, loss)
    return Run(optimizer, recorder, found)


def cost(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy whose minimum is at finite weights."""
    return nn.functional.cross_entropy(output, labels, label_smoothing=0.1)


def eigenvalues(model: nn.Module, data: Data) -> npt.NDArray[np.float64]:
    """Eigenvalues of the exact Hessian of the loss on all digits, in rising order."""
    named = {name: param.detach() for name, param in model.named_parameters()}
    start = nn.utils.parameters_to_vector(named.values())

    def loss(vector: Tensor) -> Tensor:
        pieces = vector.split([param.numel() for param in named.values()])
        params = {
            name: piece.view_as(param) for (name, param), piece in zip(named.items(), pieces, strict=True)
        }
        output = torch.func.functional_call(model, params, (data.images,))
        return cost(output, data.labels)

    hessian = torch.func.hessian(loss)
    with torch.no_grad():
        return np.linalg.eigvalsh(hessian(start).double().numpy())


def draw_batches(runs: dict[int, Run]) -> Figure:
    """Draw the live spectrum for each batch size."""
    drawn, panels = row_of(len(runs))
    for axes, (size, run) in zip(panels, runs.items(), strict=True):
        draw_spectrum(axes, run.recorder, title=f"batches of {size}" if size < 1797 else "all 1797 digits")
    return labelled(drawn, panels)


def draw_layers(run: Run) -> Figure:
    """Draw the live spectrum of each layer."""
    drawn, panels = row_of(len(run.recorder.names))
    for number, (axes, name) in enumerate(zip(panels, run.recorder.names, strict=True)):
        draw_spectrum(axes, run.recorder, number, title=f"layer {name}")
    return labelled(drawn, panels)


def draw_exact(run: Run) -> Figure:
    """Draw the live spectrum over the positive eigenvalues of the exact Hessian."""
    drawn, (axes,) = row_of(1)
    draw_spectrum(axes, run.recorder, title="live spectrum and the eigenvalues of the exact Hessian")
    for step, values in run.exact.items():
        there = values[values > 0]
        marks = axes.scatter(
            np.full(len(there), step), there, marker="_", s=70, color=EXACT, lw=0.8, zorder=1.5
        )
    marks.set_label("exact eigenvalues")
    most = max(values[-1] for values in run.exact.values())
    axes.set_ylim(np.nanmin(run.recorder.spectra()) / 2, 2 * most)
    return labelled(drawn, [axes], marks)


def row_of(count: int) -> tuple[Figure, list[Axes]]:
    """Panels side by side, with the same scale."""
    drawn = Figure(figsize=(9.5, 4.2), layout="constrained")
    return drawn, list(np.ravel(drawn.subplots(1, count, sharex=True, sharey=True)))


def labelled(drawn: Figure, panels: list[Axes], *more: Any) -> Figure:
    """Write the labels that all panels share."""
    panels[0].set_ylabel("eigenvalue")
    for axes in panels:
        axes.set_xlabel("step")
    handles = [*spectrum_handles(), *more]
    drawn.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def batches_table(runs: dict[int, Run]) -> str:
    """The table of what each run shows at its end."""
    lines = [
        "| batch | pairs | steps between pairs | signal to noise | curvatures in use | loss |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for size, run in runs.items():
        recorder = run.recorder
        spectrum = recorder.spectra()[-1]
        there = spectrum[np.isfinite(spectrum)]
        ends = f"{there[0]:.2g} … {there[-1]:.2g}" if there.size else "none"
        cells = [
            f"{size}",
            f"{recorder.series('pairs')[-1, 0]:.0f}",
            f"{np.median(recorder.series('interval')):.0f}",
            f"{np.median(recorder.series('signal_to_noise')):.2g}",
            ends,
            f"{np.mean(recorder.series('loss')[-5:]):.2g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def exact_table(run: Run) -> str:
    """The table of the largest curvatures, found and exact."""
    lines = [
        "| step | pairs | largest found | largest exact | exact ones above the smallest found |",
        "|---:|---:|---:|---:|---:|",
    ]
    calls, spectra = run.recorder.calls(), run.recorder.spectra()
    pairs = run.recorder.series("pairs")[:, 0]
    for step, values in run.exact.items():
        place = int(np.searchsorted(calls, step, side="right")) - 1
        there = spectra[place][np.isfinite(spectra[place])]
        if not there.size:
            continue
        above = int(np.sum(values > there[0]))
        lines.append(f"| {step} | {pairs[place]:.0f} | {there[-1]:.3g} | {values[-1]:.3g} | {above} |")
    return "\n".join(lines) + "\n"


def shown(run: Run) -> str:
    """The table of `mlbfgs_diagnostics` as plain text."""
    console = Console(file=io.StringIO(), width=108)
    console.print(table(run.optimizer))
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def save(drawn: Figure, name: str, options: argparse.Namespace) -> None:
    """Write a figure at twice its size."""
    path = options.docs / "_static" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=200)
    print(path)


def write(name: str, text: str, options: argparse.Namespace) -> None:
    """Write a fragment of a page."""
    path = options.docs / "_generated" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
