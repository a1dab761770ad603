r"""Train ResNet-50, or another model of torchvision, on ImageNet with mL-BFGS, SGD or AdamW.

One node with 8 GPUs:

    torchrun --nproc-per-node=8 docs/examples/imagenet_resnet50.py \
        --data /path/to/imagenet --checkpoints runs/mlbfgs --amp bf16 --resume

Four nodes (run the same line on each, with a checkpoint folder that all can see):

    torchrun --nnodes=4 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=$FIRST_NODE:29500 \
        docs/examples/imagenet_resnet50.py --data /path/to/imagenet --checkpoints /shared/runs/mlbfgs \
        --batch-size 1024 --amp bf16 --resume

`--data` holds `train/` and `val/` with a folder for each class. `--optimizer sgd` and `--optimizer adamw`
make the same run with another optimizer. `--parallel fsdp2` shards parameters and the optimizer's state.

The experiment of the paper (Niu et al., TMLR 2023, arXiv:2307.13744) with the rate, decay, momentum, epochs,
clipping and precision of the authors' launch script (run-SLIM.sh of https://github.com/yuehniu/mL-BFGS, for
four GPUs; its schedule is a cosine without warm-up), whose history, period, averages, damping and step length
are those of `--preset paper`:

    torchrun --nproc-per-node=4 docs/examples/imagenet_resnet50.py --data ... --checkpoints ... \
        --preset paper --blocks layer --lr 0.1 --weight-decay 0.0002 --momentum 0.9 --epochs 100 --clip 1 \
        --warmup-epochs 0 --label-smoothing 0 --amp fp16

This differs from theirs in the batch size (256 is this script's choice; their script does not give one for
ImageNet), the blocks (theirs are four, chosen by hand, without the first convolution and the last layer), the
last learning rate (theirs is 1e-4), the steps before the first pair (theirs are plain SGD), and the averages
(`--preset paper` uses the formulas of the paper, not those of their code). This script has not been run on
ImageNet: nothing is claimed about accuracy or speed there.

`--resume` goes on from the last checkpoint, if there is one, with the same images and crops in the same
order, on any number of ranks that divides the batch; with the same number of ranks the parameters come out
the same to the last bit if PyTorch's kernels are deterministic. SIGTERM saves and ends the run at the next
report (`--log-every`). Rate, decay and the optimizer's other settings are those of the checkpoint. Dropout,
which ResNets do not have, draws other numbers after a resume.
"""

from __future__ import annotations

import itertools
import signal
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _common import (
    Checkpoints,
    Job,
    Report,
    StopRequest,
    TrainingState,
    add_common_arguments,
    average_buffers,
    cosine_schedule,
    describe,
    launched,
    make_optimizer,
    summed,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.models import get_model
from torchvision.transforms import v2

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="a folder with train/ and val/")
    parser.add_argument("--model", default="resnet50", help="a name of torchvision.models.list_models()")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--warmup-epochs", type=float, default=5.0)
    parser.add_argument("--batch-size", type=int, default=256, help="images per step, over all ranks")
    parser.add_argument("--accumulate", type=int, default=1, help="parts in which a rank does its share")
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--amp", choices=DTYPES, default="none")
    parser.add_argument("--workers", type=int, default=8, help="processes per rank that load images")
    add_common_arguments(parser)
    args = parser.parse_args()
    if args.parallel == "fsdp2" and args.amp == "fp16":
        parser.error("--amp must be none or bf16 with --parallel fsdp2, got fp16")
    return args


class Images(ImageFolder):
    """Crops and flips depend only on seed, epoch and image, whichever rank or worker draws them."""

    seed, epoch = 0, 0

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        entropy = np.random.SeedSequence([self.seed, self.epoch, index])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))
            return super().__getitem__(index)


class EpochSampler(DistributedSampler):
    """Begins an epoch after the first `seen` images, counted over all ranks."""

    seen = 0

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.seen // self.num_replicas, None)


class Data(NamedTuple):
    train: Images
    sampler: EpochSampler
    batches: DataLoader
    validation: DataLoader

    def begin(self, epoch: int, seen: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.sampler.set_epoch(epoch)
        self.sampler.seen = seen
        self.train.epoch = epoch
        return iter(self.batches)


def load_data(args: Namespace, job: Job) -> Data:
    crop = [v2.RandomResizedCrop(args.image_size), v2.RandomHorizontalFlip()]
    centre = [v2.Resize(args.image_size * 8 // 7), v2.CenterCrop(args.image_size)]
    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    train = Images(args.data / "train", v2.Compose([*crop, *last]))
    train.seed = args.seed
    validation = ImageFolder(args.data / "val", v2.Compose([*centre, *last]))
    share, remainder = divmod(args.batch_size, job.world * args.accumulate)
    if remainder:
        msg = f"`--batch-size` must be a multiple of ranks times --accumulate, got {args.batch_size}"
        raise ValueError(msg)
    if len(train) < args.batch_size:
        msg = f"`--batch-size` must be at most the number of images, {len(train)}, got {args.batch_size}"
        raise ValueError(msg)
    sampler = EpochSampler(train, job.world, job.rank, seed=args.seed, drop_last=True)
    loading: dict[str, Any] = {
        "batch_size": share,
        "num_workers": args.workers,
        "pin_memory": job.device.type == "cuda",
        "worker_init_fn": _leave_sigterm_to_the_rank,
    }
    in_order = DistributedSampler(validation, job.world, job.rank, shuffle=False)
    return Data(
        train,
        sampler,
        DataLoader(train, sampler=sampler, drop_last=True, **loading),
        DataLoader(validation, sampler=in_order, **loading),
    )


def _leave_sigterm_to_the_rank(_: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to every process of a job


def make_model(args: Namespace, job: Job, classes: int) -> nn.Module:
    torch.manual_seed(args.seed)  # the same initial weights on all ranks
    model = get_model(args.model, weights=None, num_classes=classes)
    if args.parallel == "fsdp2":
        return shard(model.to(job.device), DTYPES[args.amp])
    model = model.to(job.device, memory_format=layout(job))  # FSDP2 takes only contiguous parameters
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def layout(job: Job) -> torch.memory_format:
    return torch.channels_last if job.device.type == "cuda" else torch.contiguous_format


def shard(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Shard each composite part of the model's stages (in a ResNet, the residual blocks), then the rest."""
    stages = [stage for stage in model.children() if isinstance(stage, nn.Sequential)]
    units = [unit for unit in itertools.chain(*stages) if any(True for _ in unit.children())]
    for unit in [*units, model]:
        norms = [part for part in unit.modules() if isinstance(part, _BatchNorm)]
        norms = [norm for norm in norms if not isinstance(norm, FSDPModule)]
        if dtype != torch.float32 and norms:  # their weights stay in the precision of their statistics
            fully_shard(norms)
        fully_shard(unit, mp_policy=MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32))
    return model


class Meter:
    """Sums over the steps since they were last read; reading adds them up over the ranks."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.clear()

    def clear(self) -> None:
        self.sums, self.images = torch.zeros(2, device=self.job.device), 0
        self.start = time.perf_counter()

    def add(self, sums: Tensor, images: int) -> None:
        self.sums, self.images = self.sums + sums, self.images + images

    def read(self, *, stop: bool) -> tuple[dict[str, float], bool]:
        """The figures, and whether any rank has been asked to stop."""
        loss, correct, stops = summed(self.job.device, *self.sums, stop)
        speed = self.images / (time.perf_counter() - self.start)
        figures = {"loss": loss / self.images, "accuracy": correct / self.images, "images/s": speed}
        self.clear()
        return figures, stops > 0


class Trainer:
    """Steps, evaluations and checkpoints of one run."""

    def __init__(self, args: Namespace, job: Job) -> None:
        self.args, self.job, self.stop = args, job, StopRequest()
        self.data = load_data(args, job)
        self.epoch_steps = len(self.data.train) // args.batch_size
        self.total = args.epochs * self.epoch_steps
        self.model = make_model(args, job, len(self.data.train.classes))
        named = ((name.removeprefix("module."), param) for name, param in self.model.named_parameters())
        self.optimizer = make_optimizer(args, named)
        warmup = round(args.warmup_epochs * self.epoch_steps)
        schedule = cosine_schedule(self.optimizer, warmup, self.total)
        plan = {
            "images": len(self.data.train),
            "batch size": args.batch_size,
            "epochs": args.epochs,
            "seed": args.seed,
        }
        self.scaler = torch.amp.GradScaler(job.device.type, enabled=args.amp == "fp16")
        self.state = TrainingState(self.model, self.optimizer, schedule, plan, self.scaler)
        self.checkpoints = Checkpoints(args.checkpoints, job)

    def run(self) -> None:
        """Train to the last epoch, or until asked to stop."""
        state, stopped, scores = self.state, False, None
        resumed = self.checkpoints.load(state, resume=self.args.resume)
        with Report(self.job, self.total, state.step, self.args.tensorboard) as report:
            report.line(f"{'resumed at' if resumed else 'begins with'} step {state.step} of {self.total}")
            while state.step < self.total and not stopped:
                stopped = self.train_to_end_of_epoch(report)
                if state.step % self.epoch_steps == 0:
                    scores = self.evaluate()
                    report.figures(state.step, f"epoch {state.step // self.epoch_steps}", scores)
                self.checkpoints.save(state)
            if stopped and state.step < self.total:
                report.line(f"stopped after step {state.step}; --resume goes on from there")
            else:
                top1 = (scores or self.evaluate())["val top-1"]
                report.line(f"finished after {state.step} steps with a top-1 accuracy of {top1:.2%}")

    def train_to_end_of_epoch(self, report: Report) -> bool:
        """Train one epoch, and return whether the run was stopped in it."""
        args, state, meter = self.args, self.state, Meter(self.job)
        epoch, done = divmod(state.step, self.epoch_steps)
        batches = self.data.begin(epoch, done * args.batch_size)
        for left in reversed(range(self.epoch_steps - done)):
            meter.add(self.train_step(batches), args.batch_size)
            last = left == 0 or state.step == args.stop_after
            if last or state.step % args.log_every == 0:
                figures, asked = meter.read(stop=self.stop.received or state.step == args.stop_after)
                report.step(state.step, figures)
                if asked:
                    return True
            if state.step % args.diagnostics_every == 0:
                report.line(f"step {state.step}  {describe(self.optimizer)}")
            if state.step % args.save_every == 0:
                self.checkpoints.save(state)
        return False

    def train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        """One step of the optimizer; sums of the loss and of correct answers over this rank's images."""
        args, scaler = self.args, self.scaler
        sums = torch.zeros(2, device=self.job.device)
        self.optimizer.zero_grad()
        for part in range(args.accumulate):
            images, labels = self.move(next(batches))
            with self.reduction(last=part == args.accumulate - 1):
                logits = self.forward(images)
                loss = nn.functional.cross_entropy(logits, labels, label_smoothing=args.label_smoothing)
                scaler.scale(loss / args.accumulate).backward()
            sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
        if args.clip:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), args.clip)
        scaler.step(self.optimizer)
        scaler.update()
        self.state.schedule.step()
        self.state.step += 1
        return sums

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy over each image once, without those that the sampler repeats at its end."""
        average_buffers(self.model)
        self.model.eval()
        count = len(self.data.validation.dataset)
        left = len(range(self.job.rank, count, self.job.world))
        sums = torch.zeros(3, device=self.job.device)
        for batch in self.data.validation:
            images, labels = self.move(batch)
            logits, labels = self.forward(images)[:left], labels[:left]
            left -= len(labels)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum()])
        self.model.train()
        values = summed(self.job.device, *sums)
        names = ("val loss", "val top-1", "val top-5")
        return {name: value / count for name, value in zip(names, values, strict=True)}

    def move(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        images, labels = (part.to(self.job.device, non_blocking=True) for part in batch)
        return images.contiguous(memory_format=layout(self.job)), labels

    def forward(self, images: Tensor) -> Tensor:
        cast = self.args.amp != "none" and self.args.parallel == "ddp"  # FSDP2 has its own policy
        context = torch.autocast(self.job.device.type, DTYPES[self.args.amp]) if cast else nullcontext()
        with context:
            return self.model(images).float()

    def reduction(self, *, last: bool) -> Any:
        """Gradients are reduced over the ranks only in the last part of a step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
            return nullcontext()
        return nullcontext() if last else self.model.no_sync()


if __name__ == "__main__":
    arguments = parse()
    with launched() as this_job:
        Trainer(arguments, this_job).run()
