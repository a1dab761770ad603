r"""Train a small decoder on bytes of text with FSDP2 and mL-BFGS.

Two processes on one machine, with GPUs or without; on two CPU cores it takes one to two minutes:

    torchrun --nproc-per-node=2 docs/examples/language_model.py --checkpoints runs/bytes

Larger, on 8 GPUs:

    torchrun --nproc-per-node=8 docs/examples/language_model.py --checkpoints runs/large --resume \
        --layers 24 --width 1024 --heads 16 --context 1024 --batch-size 256 --steps 20000 --dtype bfloat16

The text is the source of Python's standard library, or the files that `--text` names. Every parameter, and
with it the optimizer's state, is sharded over the ranks. A run that was killed goes on from its last
checkpoint with the same batches, on any number of ranks that divides the batch.
"""

from __future__ import annotations

import sysconfig
import time
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from _common import (
    Checkpoints,
    Job,
    Report,
    StopRequest,
    TrainingState,
    add_common_arguments,
    cosine_schedule,
    describe,
    launched,
    make_optimizer,
    summed,
)
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

BYTES = 256


def parse() -> Namespace:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", help="files; by default the standard library's")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="bytes that the model sees at once")
    parser.add_argument("--batch-size", type=int, default=32, help="pieces of text per step, over all ranks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--warmup", type=int, default=20, metavar="STEPS")
    parser.add_argument("--evaluate-every", type=int, default=100, metavar="STEPS")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products")
    parser.add_argument("--offload", action="store_true", help="keep parameters and state in CPU memory")
    add_common_arguments(parser)
    return parser.parse_args()


class Block(nn.Module):
    """Causal attention, then two layers on each position."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.projection = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.movedim(-3, 0).transpose(-2, -3)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(mixed.transpose(-2, -3).flatten(-2))
        return x + self.feed_forward(self.norm2(x))


class Decoder(nn.Module):
    """Logits of the next byte at every position."""

    def __init__(self, args: Namespace) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(BYTES, args.width), nn.Embedding(args.context, args.width)
        self.blocks = nn.ModuleList(Block(args.width, args.heads) for _ in range(args.layers))
        self.norm, self.head = nn.LayerNorm(args.width), nn.Linear(args.width, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_model(args: Namespace, job: Job) -> nn.Module:
    torch.manual_seed(args.seed)  # the same initial weights on all ranks
    model = Decoder(args)
    policy = MixedPrecisionPolicy(getattr(torch, args.dtype), reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=job.device.type == "cuda") if args.offload else OffloadPolicy()
    for block in model.blocks:
        fully_shard(block, mp_policy=policy, offload_policy=offload)
    fully_shard(model, mp_policy=replace(policy, output_dtype=torch.float32), offload_policy=offload)
    return model


class Text:
    """Pieces of a text, each with the bytes that follow; the last twentieth is for validation."""

    def __init__(self, args: Namespace, job: Job) -> None:
        paths = args.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = np.frombuffer(b"".join(path.read_bytes() for path in paths), dtype=np.uint8)
        self.train, self.validation = np.split(text, [len(text) * 19 // 20])
        if len(self.validation) <= args.context:
            msg = f"`--text` must be over {20 * (args.context + 1)} bytes long, got {len(text)}"
            raise ValueError(msg)
        if args.batch_size % job.world:
            msg = f"`--batch-size` must be a multiple of {job.world} ranks, got {args.batch_size}"
            raise ValueError(msg)
        self.args, self.job = args, job

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of a batch that depends only on seed and step."""
        generator = np.random.default_rng([self.args.seed, step])
        last = len(self.train) - self.args.context
        return self._pieces(self.train, generator.integers(last, size=self.args.batch_size))

    def validation_batches(self) -> list[tuple[Tensor, Tensor]]:
        """This rank's share of four batches, evenly spaced."""
        last = len(self.validation) - self.args.context - 1
        starts = np.linspace(0, last, 4 * self.args.batch_size).astype(int)
        return [self._pieces(self.validation, part) for part in np.split(starts, 4)]

    def _pieces(self, text: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        share = starts[self.job.rank :: self.job.world, None]
        pieces = text[share + np.arange(self.args.context + 1)].astype(np.int64)
        tokens = torch.from_numpy(pieces).to(self.job.device)
        return tokens[:, :-1], tokens[:, 1:]


class Trainer:
    """Steps, reports and checkpoints of one run."""

    def __init__(self, args: Namespace, job: Job) -> None:
        self.args, self.job, self.stop = args, job, StopRequest()
        self.text, self.model = Text(args, job), make_model(args, job)
        self.optimizer = make_optimizer(args, self.model.named_parameters())
        schedule = cosine_schedule(self.optimizer, args.warmup, args.steps)
        plan = {"batch size": args.batch_size, "steps": args.steps, "seed": args.seed}
        self.state = TrainingState(self.model, self.optimizer, schedule, plan)
        self.checkpoints = Checkpoints(args.checkpoints, job)

    def run(self) -> None:
        """Train to the last step, or until asked to stop."""
        args, state, stopped = self.args, self.state, False
        resumed = self.checkpoints.load(state, resume=args.resume)
        with Report(self.job, args.steps, state.step, args.tensorboard) as report:
            size = sum(param.numel() for param in self.model.parameters())
            report.line(f"{size} parameters, {len(self.text.train)} bytes of text to train on")
            report.line(f"{'resumed at' if resumed else 'begins with'} step {state.step} of {args.steps}")
            report.figures(state.step, f"step {state.step}", self.validate())
            self.clock = state.step, time.perf_counter()
            while state.step < args.steps and not stopped:
                loss = self.train_step()
                if self.due(args.log_every) or state.step == args.stop_after:
                    figures, stopped = self.read(loss)
                    report.step(state.step, figures)
                if self.due(args.diagnostics_every):
                    report.line(f"step {state.step}  {describe(self.optimizer)}")
                if self.due(args.evaluate_every):
                    report.figures(state.step, f"step {state.step}", self.validate())
                if self.due(args.save_every) or stopped:
                    self.checkpoints.save(state)
            report.line(f"{'finished' if state.step == args.steps else 'stopped'} after step {state.step}")

    def due(self, every: int) -> bool:
        return self.state.step % every == 0 or self.state.step == self.args.steps

    def train_step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(self.text.batch(self.state.step))
        loss.backward()
        if self.args.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.state.schedule.step()
        self.state.step += 1
        return loss.detach()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        tokens, following = batch
        return nn.functional.cross_entropy(self.model(tokens).flatten(0, 1), following.flatten())

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Mean loss, in nats per byte, over the same pieces of text on any number of ranks."""
        losses = torch.stack([self.loss(batch) for batch in self.text.validation_batches()])
        (total,) = summed(self.job.device, losses.mean())
        return {"val loss": total / self.job.world}

    def read(self, loss: Tensor) -> tuple[dict[str, float], bool]:
        """The figures since they were last read, and whether any rank has been asked to stop."""
        asked = self.stop.received or self.state.step == self.args.stop_after
        total, asks = summed(self.job.device, loss, asked)
        now, (step, start) = time.perf_counter(), self.clock
        self.clock = self.state.step, now
        seconds = (now - start) / (self.state.step - step)
        return {"loss": total / self.job.world, "s/step": seconds}, asks > 0


if __name__ == "__main__":
    arguments = parse()
    with launched() as this_job:
        Trainer(arguments, this_job).run()
