"""Sharded parameters on the GPUs that there are, one process each."""

from __future__ import annotations

import pytest
import torch

from mlbfgs_torch import MLBFGS
from tests.distributed.processes import on_ranks
from tests.distributed.training import (
    SETTINGS,
    STEPS,
    batches,
    deviation,
    make_model,
    parallel,
    train,
    trained_alone,
    whole,
)


def on_gpus(function, *args):
    count = torch.cuda.device_count()
    assert count > 0, "these tests need a CUDA GPU, and PyTorch sees none"
    return on_ranks(count, function, *args, backend="cpu:gloo,cuda:nccl")


@pytest.mark.parametrize("layout", ["ddp", "fsdp", "mixed"])
def test_trajectory_is_that_of_one_process_on_a_cpu(layout):
    for params in on_gpus(trained, layout):
        assert deviation(params, trained_alone()) < 1e-9


def trained(layout):
    """Parameters after training on this process's GPU."""
    model = make_model().cuda()
    wrapped, part = parallel(model, layout, "cuda")
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, ((x.cuda(), y.cuda()) for x, y in batches(STEPS)), part)
    return {name: value.cpu() for name, value in whole(model).items()}


def test_offloaded_parameters_are_those_of_one_process_on_a_cpu():
    for params in on_gpus(offloaded):
        assert deviation(params, trained_alone()) < 1e-9


def offloaded():
    """The same with parameters and state on the CPU."""
    model = make_model()
    wrapped, part = parallel(model, "offload", "cuda")
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, ((x.cuda(), y.cuda()) for x, y in batches(STEPS)), part)
    assert {param.device.type for param in model.parameters()} == {"cpu"}
    return {name: value.cpu() for name, value in whole(model).items()}
