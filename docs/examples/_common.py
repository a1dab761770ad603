"""What both examples share: the process group, optimizers, the schedule, checkpoints, and a clean stop."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from mlbfgs_torch import MLBFGS

RATES = {"mlbfgs": None, "sgd": 0.1, "adamw": 1e-3}
"""None means the preset's default."""


class Job(NamedTuple):
    """This process among those that `torchrun` has started."""

    rank: int
    world: int
    device: torch.device


@contextmanager
def launched() -> Iterator[Job]:
    """Join the process group: NCCL for tensors on GPUs, gloo for tensors on CPUs."""
    if "LOCAL_RANK" not in os.environ:
        sys.exit(f"launch it with torchrun: torchrun --nproc-per-node=2 {' '.join(sys.argv)}")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    yield Job(dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()


def add_common_arguments(parser: ArgumentParser) -> None:
    """Options of the optimizer, of checkpoints and of reports."""
    group = parser.add_argument_group("optimizer")
    group.add_argument("--optimizer", choices=RATES, default="mlbfgs")
    group.add_argument("--lr", type=float, help=f"peak; by default (None: the preset's) {RATES}")
    group.add_argument("--momentum", type=float, default=0.9, help="of mlbfgs and sgd")
    group.add_argument(
        "--weight-decay", type=float, default=1e-4, help="decoupled; with sgd and the published presets not"
    )
    group.add_argument("--clip", type=float, default=0.0, help="largest norm of the gradient; 0: any")
    group.add_argument(
        "--preset", choices=("default", "paper", "formulas"), default="default", help="of mlbfgs"
    )
    group.add_argument("--blocks", choices=("all", "layer", "parameter"), default="all", help="of mlbfgs")
    group.add_argument(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any setting of mlbfgs_core.Config, such as --set history_size=5; may be repeated",
    )
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--checkpoints", type=Path, required=True, help="a folder that all ranks can see")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, if any")
    group.add_argument("--save-every", type=int, default=1000, metavar="STEPS")
    group.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="also reacts to SIGTERM")
    group.add_argument("--diagnostics-every", type=int, default=500, metavar="STEPS")
    group.add_argument("--stop-after", type=int, metavar="STEPS", help="save and end there: for a trial")
    group.add_argument("--tensorboard", type=Path, metavar="DIR")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        msg = f"must be NAME=VALUE, got {text!r}"
        raise ArgumentTypeError(msg)
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a bare word
        return name, value


def make_optimizer(args: Namespace, named: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """The optimizer that the options name."""
    lr = RATES[args.optimizer] if args.lr is None else args.lr
    if args.optimizer == "sgd":
        return torch.optim.SGD(named, lr, momentum=args.momentum, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(named, lr, weight_decay=args.weight_decay)
    return MLBFGS(
        named,
        lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        decoupled_weight_decay=args.preset == "default",  # the published method decays as SGD does
        blocks=args.blocks,
        preset=args.preset,
        **dict(args.set),
    )


def describe(optimizer: torch.optim.Optimizer) -> str:
    """One line about the curvature that was found."""
    if not isinstance(optimizer, MLBFGS):
        return ""
    figures = optimizer.diagnostics()
    pairs, rejected, skipped = (
        int(sum(getattr(figure, name).sum() for figure in figures))
        for name in ("pairs", "rejected", "skipped")
    )
    cosine = torch.cat([figure.cosine.reshape(-1) for figure in figures]).mean()
    return f"pairs {pairs}  rejected {rejected}  skipped steps {skipped}  cosine {float(cosine):.3f}"


def cosine_schedule(optimizer: torch.optim.Optimizer, warmup: int, total: int) -> LRScheduler:
    """A linear rise over `warmup` steps, then half a cosine down to 0; stepped after every step."""
    if not 0 <= warmup < total:
        msg = f"the warm-up must be shorter than the run of {total} steps, got {warmup}"
        raise ValueError(msg)
    cosine = CosineAnnealingLR(optimizer, total - warmup)
    if warmup == 0:
        return cosine
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, cosine], [warmup])


def summed(device: torch.device, *values: Tensor | float) -> list[float]:
    """The sum of each value over all ranks, in one reduction."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in values])
    dist.all_reduce(total)
    return total.tolist()


def average_buffers(model: nn.Module) -> None:
    """Give all ranks the mean of their buffers: batch norm's statistics of the whole batch."""
    for buffer in model.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()


class TrainingState(Stateful):
    """Everything that a run needs to go on, in the form that `torch.distributed.checkpoint` takes.

    The step says how far the run is in the data, because the order of the data depends only on `plan`:
    settings that must be the same when a run is resumed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: LRScheduler,
        plan: dict[str, Any],
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.plan, self.step = plan, 0
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        parts = {"model": model, "optimizer": optimizer, "schedule": self.schedule.state_dict()}
        if self.scaler is not None:
            parts["scaler"] = self.scaler.state_dict()
        return {**parts, "plan": dict(self.plan), "step": self.step}  # loading writes into it

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["plan"] != self.plan:
            msg = f"a resumed run must have the settings of its checkpoint, {state['plan']}, got {self.plan}"
            raise ValueError(msg)
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]


class Checkpoints:
    """The last two checkpoints of a run; the file `latest` names the newest that is complete."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job = folder, job
        self.pointer = folder / "latest"

    def load(self, state: TrainingState, *, resume: bool) -> bool:
        """Load the newest checkpoint on any number of ranks, and return whether there was one."""
        name = self._latest()
        if name is None:
            return False
        if not resume:
            msg = f"`--checkpoints` must be a folder without a run, or --resume be given; got {self.folder}"
            raise FileExistsError(msg)
        dcp.load({"state": state}, checkpoint_id=self.folder / name)
        return True

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint, then point to it, then delete all except the last two."""
        name, previous = f"step-{state.step:09}", self._latest()
        if name == previous:
            return
        average_buffers(state.model)
        if self.job.rank == 0:  # what a killed run may have left
            shutil.rmtree(self.folder / name, ignore_errors=True)
        dist.barrier()
        dcp.save({"state": state}, checkpoint_id=self.folder / name)
        if self.job.rank == 0:
            self._point_to(name)
            for path in self.folder.glob("step-*"):
                if path.name not in (name, previous):
                    shutil.rmtree(path, ignore_errors=True)
        dist.barrier()

    def _latest(self) -> str | None:
        found = [self.pointer.read_text() if self.job.rank == 0 and self.pointer.exists() else None]
        dist.broadcast_object_list(found)
        return found[0]

    def _point_to(self, name: str) -> None:
        draft = self.folder / "latest.draft"
        with draft.open("w") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(self.pointer)


class StopRequest:
    """Notes SIGTERM, which schedulers send some time before they kill a job."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, *_: object) -> None:
        self.received = True


class Report:
    """A progress bar, log lines and TensorBoard curves, on rank 0 only."""

    def __init__(self, job: Job, total: int, done: int, tensorboard: Path | None) -> None:
        self.console = Console(quiet=job.rank != 0)
        columns = [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
        self.bar = Progress(*columns, console=self.console, disable=job.rank != 0)
        self.task = self.bar.add_task("", total=total, completed=done)
        self.writer = _writer(tensorboard) if tensorboard is not None and job.rank == 0 else None

    def __enter__(self) -> Report:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        if self.writer is not None:
            self.writer.close()

    def line(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Move the bar; if none is drawn, as in the log file of a job, write a line."""
        self.bar.update(self.task, completed=step, description=_text(figures))
        if not self.console.is_terminal:
            self.line(f"step {step}  {_text(figures)}")
        self.curves(step, figures)

    def figures(self, step: int, title: str, figures: dict[str, float]) -> None:
        self.line(f"{title}  {_text(figures)}")
        self.curves(step, figures)

    def curves(self, step: int, figures: dict[str, float]) -> None:
        if self.writer is not None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)


def _text(figures: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        msg = "`--tensorboard` needs the package tensorboard: python3 -m pip install tensorboard"
        raise ImportError(msg) from error
    return SummaryWriter(folder)
