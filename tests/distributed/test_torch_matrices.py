"""The Kronecker preconditioner of sharded matrices: a block of factors for each part of rows or columns."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import mlbfgs_core as core
from mlbfgs_core.reference import Reference
from mlbfgs_torch import MLBFGS

from .processes import on_ranks
from .training import batches, deviation, digest, make_model, parallel, train, whole

METHOD = {
    "preconditioner": "kronecker",
    "precondition_frequency": 3,
    "check_every": 2,
    "update_every": 4,
    "history_size": 3,
}
SETTINGS = {**METHOD, "lr": 0.003, "momentum": 0.0}
STEPS = 24


def chunks(size, count):
    """The lengths of the parts into which PyTorch divides an axis."""
    parts = [len(part) for part in torch.arange(size).chunk(count)]
    return parts + [0] * (count - len(parts))


def rows_over(count):
    """The parts of each weight that `fully_shard` makes."""
    return {name: (chunks(a, count), [b]) for name, (a, b) in weights().items()}


def weights():
    return {name: param.shape for name, param in make_model().named_parameters() if param.ndim == 2}


def tensor_parallel(count, rows=1):
    """The parts under tensor parallelism of the first two layers, whose parts are divided again by rows."""
    shapes = weights()
    parts = {name: (chunks(a, rows), [b]) for name, (a, b) in shapes.items()}
    first, second = shapes["hidden.weight"], shapes["inner.weight"]
    parts["hidden.weight"] = ([n for m in chunks(first[0], count) for n in chunks(m, rows)], [first[1]])
    parts["inner.weight"] = (chunks(second[0], rows), chunks(second[1], count))
    return parts


@functools.cache
def dense(layout, count):
    """The run of the dense twin, whose factors have the same blocks."""
    parts = {
        "fsdp": lambda: rows_over(count),
        "hsdp": lambda: rows_over(count // 2),
        "tensor": lambda: tensor_parallel(count),
        "fsdp_tensor": lambda: tensor_parallel(count // 2, 2),
        "ddp": lambda: rows_over(1),
    }[layout]()
    model = make_model()
    params = dict(model.named_parameters())
    starts = np.cumsum([0, *(param.numel() for param in params.values())])
    matrices = [
        (0, start, tuple(param.shape), parts[name])
        for (name, param), start in zip(params.items(), starts, strict=False)
        if name in parts
    ]
    twin = Reference(core.Config(**METHOD), [int(starts[-1])], matrices)
    for x, y in batches(STEPS):
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        theta, grad = (
            torch.cat([x.reshape(-1) for x in own]).numpy()
            for own in ([p.detach() for p in params.values()], [p.grad for p in params.values()])
        )
        (update,) = twin.step([theta], [grad])
        for param, start in zip(params.values(), starts, strict=False):
            own = update[start : start + param.numel()].reshape(param.shape)
            param.data -= SETTINGS["lr"] * torch.from_numpy(own)
    assert len(twin.blocks[0].pairs) == 3
    return whole(model)


def trained(layout):
    model = make_model()
    wrapped, part = parallel(model, layout)
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, batches(STEPS), part)
    return whole(model), digest(model, optimizer)


@pytest.mark.parametrize(
    ("layout", "count"),
    [("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tensor", 2), ("fsdp_tensor", 4)],
)
def test_run_is_that_of_the_dense_twin_with_the_same_blocks(layout, count):
    for params, _ in on_ranks(count, trained, layout):
        assert deviation(params, dense(layout, count)) < 1e-7
    assert layout == "ddp" or count == 1 or deviation(dense(layout, count), dense("ddp", 1)) > 1e-4


def test_replicas_of_shards_stay_equal_bit_by_bit():
    digests = [found for _, found in on_ranks(4, trained, "hsdp")]
    assert digests[0] == digests[2] != digests[1] == digests[3]


def test_only_the_turn_of_a_basis_sums_factors_and_only_of_the_whole_side():
    for counts, sizes in on_ranks(2, collectives):
        assert counts["turn"] == counts["plain"] + 3, "one sum for each of three weights"
        assert sizes == {"hidden.weight": 5, "inner.weight": 12, "outer.weight": 7}


def collectives():
    model = make_model()
    wrapped, part = parallel(model, "fsdp")
    optimizer = MLBFGS(model.named_parameters(), **{**SETTINGS, "history_size": 0})
    train(wrapped, optimizer, batches(7), part)  # the next to turn is the ninth
    found = {}
    for name in ("plain", "turn"):
        ((x, y),) = batches(1)
        optimizer.zero_grad()
        (wrapped(part(x)) - part(y)).square().mean().backward()
        with CommDebugMode() as mode:
            optimizer.step()
        found[name] = mode.get_total_counts()
    sizes = {
        name: optimizer.state[param]["right_factor"].shape[-1]
        for name, param in model.named_parameters()
        if param.ndim == 2
    }
    return found, sizes


def test_layers_stacked_along_a_sharded_axis_are_whole_matrices():
    (expected,) = on_ranks(1, stacked)
    for found in on_ranks(2, stacked):
        assert float((found[0] - expected[0]).abs().max()) < 1e-11
        assert found[1] == 2, "a process has the factors of its own layers"


def stacked():
    torch.manual_seed(0)
    start = torch.randn(4, 3, 5, dtype=torch.float64)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(start, mesh, [Shard(0)]))
    optimizer = MLBFGS([("w", weight)], matrix_axes={"w": (1, 1)}, **{**SETTINGS, "momentum": 0.9})
    for step in range(12):
        noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        weight.grad = distribute_tensor(2 * weight.full_tensor().detach() + noise, mesh, [Shard(0)])
        optimizer.step()
    local = optimizer.state[weight]["left_factor"].to_local()
    return weight.full_tensor().detach(), int((local.diagonal(dim1=1, dim2=2).sum(1) > 0).sum())


def test_checkpoints_resume_to_the_last_bit_on_as_many_processes(tmp_path):
    for on, resumed in on_ranks(4, saved_and_loaded, str(tmp_path)):
        assert on == resumed


def saved_and_loaded(path):
    def begin():
        model = make_model()
        wrapped, part = parallel(model, "fsdp")
        return model, wrapped, part, MLBFGS(model.named_parameters(), **SETTINGS)

    model, wrapped, part, optimizer = begin()
    train(wrapped, optimizer, batches(10), part)
    params, state = get_state_dict(model, optimizer)
    dcp.save({"model": params, "optimizer": state}, checkpoint_id=path)
    train(wrapped, optimizer, batches(6, first=10), part)
    expected = digest(model, optimizer)
    model, wrapped, part, optimizer = begin()
    params, state = get_state_dict(model, optimizer)
    dcp.load({"model": params, "optimizer": state}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=params, optim_state_dict=state)
    train(wrapped, optimizer, batches(6, first=10), part)
    return expected, digest(model, optimizer)


def test_a_file_for_other_adapters_is_refused():
    for message in on_ranks(2, refusal):
        assert "got 'kronecker' for 'hidden.weight'" in message
        assert "torch.distributed.checkpoint" in message


def refusal():
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    assert isinstance(model.hidden.weight, DTensor)
    try:
        MLBFGS(model.named_parameters(), preconditioner="kronecker").save_state("unused.safetensors")
    except ValueError as error:
        return str(error)
    return ""
