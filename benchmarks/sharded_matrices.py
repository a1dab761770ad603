"""What it costs in steps that a sharded weight has a block of factors for each shard.

Tasks of `benchmarks.tasks` are trained with `preconditioner="kronecker"` and PyTorch's `fully_shard` on 1, 2,
4, ... processes, all of which see every batch whole, so that nothing but the blocks differs. The learning
rate is the documented 1e-3, with the tasks' cosine schedule.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import statistics

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.tasks.contestants import CONTESTANTS
from benchmarks.tasks.problems import TASKS
from benchmarks.tasks.training import Trainer

CHOSEN = ("digits", "classifier", "autoencoder", "transformer")
CONTESTANT = "mlbfgs_kronecker"


def _process(rank: int, world: int, port: int, task: str, seed: int, found: mp.SimpleQueue) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    problem = TASKS[task].make(seed)
    fully_shard(problem.model, mesh=init_device_mesh("cpu", (world,)))
    trainer = Trainer(problem, CONTESTANTS[CONTESTANT], 1e-3, TASKS[task].steps)
    for _ in range(TASKS[task].steps):
        trainer.step()
    losses = problem.evaluate()
    if rank == 0:
        found.put(losses[0])
    dist.destroy_process_group()


def loss(task: str, world: int, seed: int) -> float:
    """Final training loss on this many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: mp.SimpleQueue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_process, (world, port, task, seed, found), nprocs=world)
    return found.get()


def main() -> None:
    """Print a table: geometric means of the final training loss over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=CHOSEN)
    parser.add_argument("--worlds", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--seeds", type=int, default=2)
    parsed = parser.parse_args()
    print(f"| task | {' | '.join(f'{world} shards' for world in parsed.worlds)} |")
    print(f"| --- |{' ---: |' * len(parsed.worlds)}")
    for task in parsed.tasks:
        cells = []
        for world in parsed.worlds:
            finals = [loss(task, world, seed) for seed in range(parsed.seeds)]
            cells.append(f"{math.exp(statistics.fmean(map(math.log, finals))):.4g}")
        print(f"| {TASKS[task].title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
