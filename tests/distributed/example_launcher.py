"""Runs an example under `torchrun` as if it had been launched directly: ``FILE EXAMPLE [OPTION ...]``.

The environment can name a fault: ``KILLED_IN_SAVE=2`` ends every rank in the middle of the second
checkpoint, ``TERMINATED_AFTER=7`` sends rank 1 alone SIGTERM after the seventh step.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from itertools import count
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.optim.optimizer import register_optimizer_step_post_hook

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def make_torchvision_importable() -> None:
    # PyPI's Linux wheels of torchvision are built for CUDA. With the CPU build of PyTorch their compiled
    # operators do not load, and the import stops at the first one that Python code extends, although
    # classification models and transforms use none. A declaration is all that the import asks for.
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            OPERATORS.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def register_small_model() -> None:
    """A ResNet with a sixteenth of the channels and one block a stage."""
    from torchvision.models._api import register_model
    from torchvision.models.resnet import BasicBlock, ResNet

    class Small(ResNet):
        def _make_layer(self, block, planes, *args, **options):
            return super()._make_layer(block, planes // 16, *args, **options)

    def small(*, weights: None, num_classes: int) -> Small:
        model = Small(BasicBlock, [1, 1, 1, 1])
        model.fc = torch.nn.Linear(model.fc.in_features // 16, num_classes)
        return model

    register_model()(small)


def kill_in_save(number: int) -> None:
    """Leave the data of a checkpoint without the file that makes it complete."""
    calls, write = count(1), FileSystemWriter.write_data

    def write_data(*args, **options):
        written = write(*args, **options)
        if next(calls) == number:
            written.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    FileSystemWriter.write_data = write_data


def terminate_after(number: int) -> None:
    calls = count(1)

    def signal_one_rank(*_) -> None:
        if next(calls) == number and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    register_optimizer_step_post_hook(signal_one_rank)


if __name__ == "__main__":
    make_torchvision_importable()
    register_small_model()
    if "KILLED_IN_SAVE" in os.environ:
        kill_in_save(int(os.environ["KILLED_IN_SAVE"]))
    if "TERMINATED_AFTER" in os.environ:
        terminate_after(int(os.environ["TERMINATED_AFTER"]))
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
