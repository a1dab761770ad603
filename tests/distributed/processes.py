"""Ranks of a process group on this machine, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

__all__ = ["on_ranks"]

PRELOAD = ["torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp"]
COLLECTIVE_TIMEOUT = timedelta(seconds=60)


def on_ranks(
    count: int, function: Callable[..., Any], *args: Any, backend: str = "gloo", timeout: float = 240.0
) -> list[Any]:
    """What a module's function returns on each rank of a group of `count` processes.

    Raises
    ------
    torch.multiprocessing.ProcessRaisedException
        With the traceback of the first rank that failed; the others are ended.
    """
    # A forked copy of one process that has imported PyTorch starts at once.
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = start_processes(
            _run, (count, folder, backend, function, args), count, join=False, start_method="forkserver"
        )
        try:
            deadline = time.monotonic() + timeout
            while not ranks.join(deadline - time.monotonic()):  # returns when one has ended
                if time.monotonic() > deadline:
                    msg = f"{function.__name__} has not ended on all ranks after {timeout} s"
                    raise TimeoutError(msg)
        finally:
            for process in ranks.processes:
                process.kill()
        paths = [Path(folder) / f"result{rank}" for rank in range(count)]
        return [torch.load(path, weights_only=False) for path in paths]


def _run(
    rank: int, count: int, folder: str, backend: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=count, timeout=COLLECTIVE_TIMEOUT
    )
    torch.save(function(*args), f"{folder}/result{rank}")
    dist.barrier()  # no rank leaves while another one still needs it
    dist.destroy_process_group()
