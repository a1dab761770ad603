"""Replicas under `DistributedDataParallel`."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mlbfgs_torch import MLBFGS

from .processes import on_ranks
from .training import SETTINGS, batches, deviation, digest, make_model, whole

STEPS = 500


def test_replicas_stay_equal_bit_by_bit_for_500_steps():
    """With accumulated gradients, batches of other sizes, and a layer that some steps leave out."""
    (expected, params, skipped), *others = on_ranks(4, replica)
    assert len(set(expected)) == STEPS, "each step changed something"
    assert skipped == 0
    for digests, _, _ in others:
        assert digests == expected
    # The first steps, before rounding has an effect, are those of one process.
    ((_, alone, _),) = on_ranks(1, replica, 20)
    ((_, early, _), *_) = on_ranks(4, replica, 20)
    assert deviation(early, alone) < 1e-11
    assert all(torch.isfinite(param).all() for param in params.values())


def test_factors_and_bases_of_replicas_are_equal_bit_by_bit():
    settings = {"preconditioner": "kronecker", "precondition_frequency": 5}
    (expected, params, _), *others = on_ranks(2, replica, 60, settings)
    assert len(set(expected)) == 60, "each step changed something"
    for digests, _, _ in others:
        assert digests == expected
    assert all(torch.isfinite(param).all() for param in params.values())


def replica(steps=STEPS, settings=None):
    """Digests of parameters and state after each step."""
    model = make_model()
    world, rank = dist.get_world_size(), dist.get_rank()
    replicated = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = MLBFGS(model.named_parameters(), **{**SETTINGS, **(settings or {})})
    digests = []
    for step, (x, y) in enumerate(batches(steps)):
        optimizer.zero_grad()
        last = step % 10 == 9  # shorter at the end, and not of one size for all
        if last:
            x, y = x[:6], y[:6]
        parts = list(zip(x.tensor_split(world), y.tensor_split(world), strict=True))
        x, y = parts[rank]
        share = world / (6 if last else 24) / 3  # DDP takes the mean over processes
        halves = list(zip(x.tensor_split(2), y.tensor_split(2), strict=True))
        for i, (inputs, targets) in enumerate(halves):
            with replicated.no_sync() if i == 0 else nullcontext():
                outputs = replicated(inputs, shallow=step % 4 == 3)
                ((outputs - targets).square().sum() * share).backward()
        optimizer.step()
        digests.append(digest(model, optimizer) if step % 10 == 0 else _bits(model))
    return digests, whole(model), int(optimizer.diagnostics()[0].skipped)


def _bits(model):
    found = hashlib.sha256()
    for param in model.parameters():
        found.update(param.detach().numpy().tobytes())
    return found.hexdigest()
