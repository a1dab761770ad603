"""Parameters sharded or replicated by PyTorch's own engines: the run of one process, by several."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import mlbfgs_core as core
from mlbfgs_torch import MLBFGS
from mlbfgs_torch.rows import unpack

from .processes import on_ranks
from .training import (
    LAYOUTS,
    SETTINGS,
    STEPS,
    batches,
    deviation,
    digest,
    make_model,
    parallel,
    train,
    trained_alone,
    whole,
)

ROUNDING = 1e-11
"""Of a run in float64 of 24 steps: 1e-15 is lost to the order of sums, and curvature magnifies it."""


def trained(layout, settings, dtype=torch.float64):
    """Parameters, all numbers of the state, what this process holds, and the bits of that, after training."""
    model = make_model(dtype)
    wrapped, part = parallel(model, layout)
    optimizer = MLBFGS(model.named_parameters(), **{**SETTINGS, **settings})
    train(wrapped, optimizer, batches(STEPS, dtype=dtype), part)
    held = [part_of(param).numel() for param in model.parameters()]
    return whole(model), unpack(optimizer.state[model.scale]), held, digest(model, optimizer)


def part_of(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("layout", "count"),
    [(layout, count) for layout in LAYOUTS for count in ((1, 2, 4) if layout in ("ddp", "fsdp") else (2, 4))],
)
def test_trajectory_is_that_of_one_process(layout, count):
    results = on_ranks(count, trained, layout, {})
    for params, known, _, _ in results:
        assert deviation(params, trained_alone()) < ROUNDING
        assert int(known["pairs"]) > 3
        assert_same_decisions(known, results[0][1])


def assert_same_decisions(known, others):
    """To the last bit."""
    for name, value in known.items():
        assert torch.equal(value, others[name]), name


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "fit"},
        {"preset": "lbfgs", "lr": 0.01},
        {"preset": "paper", "update_every": 20},
        {"preset": "formulas"},
        {"momentum": 0.0, "weight_decay": 0.1},
        {"adaptive": False, "beta": 0.8},
    ],
    ids=["fit", "lbfgs", "paper", "formulas", "decay", "ema"],
)
def test_every_setting_is_that_of_one_process(settings):
    results = on_ranks(4, trained, "fsdp", settings)
    for params, known, _, _ in results:
        assert deviation(params, trained_alone(**settings)) < ROUNDING
        assert_same_decisions(known, results[0][1])
    assert [min(held) for *_, held, _ in results] == [1, 0, 0, 0], "no shard was empty"


@pytest.mark.parametrize("blocks", ["layer", "parameter"])
def test_blocks_may_be_spread_over_all_processes(blocks):
    (params, *_), *_ = on_ranks(4, trained, "fsdp", {"blocks": blocks})
    assert deviation(params, trained_alone(blocks=blocks)) < ROUNDING


def test_replicas_of_shards_stay_equal_bit_by_bit():
    digests = [found for *_, found in on_ranks(4, trained, "hsdp", {})]
    assert digests[0] == digests[2] != digests[1] == digests[3]


def test_bfloat16_parameters_have_a_float32_state():
    for dtype, *_ in on_ranks(2, bfloat16_state):
        assert dtype == {"history": torch.float32, "mean_params": torch.float32, "param": torch.bfloat16}


def bfloat16_state():
    model = make_model(torch.bfloat16)
    wrapped, part = parallel(model, "fsdp")
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, batches(STEPS, dtype=torch.bfloat16), part)
    entry = optimizer.state[model.inner.weight]
    loss = [(wrapped(part(x)) - part(y)).square().mean().item() for x, y in batches(1, dtype=torch.bfloat16)]
    assert loss[0] < 0.6
    dtypes = {name: entry[name].dtype for name in ("history", "mean_params")}
    return {**dtypes, "param": model.inner.weight.dtype}, loss


def test_state_is_sharded_like_its_parameter():
    for layout in ("fsdp", "hsdp", "fsdp_tensor"):
        for placements, shape, local, memory in on_ranks(4, state_layout, layout):
            for param, history, mean in placements:
                assert mean == param
                assert history == tuple(p if p == Replicate() else behind_two_axes(p) for p in param)
            assert shape == (2, 3, 12, 5)
            assert memory == sum(local) * (2 * 3 + 6) * 8, "the parameter-sized bytes of this process"


def behind_two_axes(placement):
    if isinstance(placement, _StridedShard):
        return _StridedShard(placement.dim + 2, split_factor=placement.split_factor)
    return Shard(placement.dim + 2)


def state_layout(layout):
    model = make_model()
    wrapped, part = parallel(model, layout)
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, batches(3), part)
    states = [(param, optimizer.state[param]) for param in model.parameters()]
    memory = sum(
        part_of(value).nbytes for _, entry in states for value in entry.values() if isinstance(value, DTensor)
    )
    return (
        [(p.placements, s["history"].placements, s["mean_params"].placements) for p, s in states],
        tuple(optimizer.state[model.hidden.weight]["history"].shape),
        [part_of(param).numel() for param in model.parameters()],
        memory,
    )


@pytest.mark.parametrize("layout", ["fsdp", "ddp", "hsdp"])
def test_a_nan_on_one_process_skips_the_step_on_all(layout):
    for same, skipped, params in on_ranks(4, nan_on_one, layout):
        assert skipped == 1
        assert same
        assert deviation(params, trained_alone()) < ROUNDING


def nan_on_one(layout):
    model = make_model()
    wrapped, part = parallel(model, layout)
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, batches(STEPS // 2), part)
    before = whole(model)
    ((x, y),) = batches(1)
    x, y = part(x), part(y)
    if dist.get_rank() == 3:
        y = y * torch.nan
    train(wrapped, optimizer, [(x, y)])
    after = whole(model)
    same = all(bool((before[name] == after[name]).all()) for name in before)
    skipped = int(optimizer.diagnostics()[0].skipped)
    train(wrapped, optimizer, batches(STEPS - STEPS // 2, first=STEPS // 2), part)
    return same, skipped, whole(model)


def test_a_nan_in_a_plain_parameters_gradient_on_one_process_skips_the_step_on_all():
    for skipped in on_ranks(4, nan_in_plain):
        assert skipped == 1


def nan_in_plain():
    model = make_model()
    wrapped, part = parallel(model, "mixed")
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, batches(5), part)
    ((x, y),) = batches(1)
    (wrapped(x) - y).square().mean().backward()
    if dist.get_rank() == 2:  # whose copy does not enter the sums
        model.scale.grad.fill_(torch.nan)
    optimizer.step()
    return int(optimizer.diagnostics()[0].skipped)


@pytest.mark.parametrize(
    ("layout", "settings", "plain", "check", "refresh"),
    [
        ("fsdp", {"preset": "paper"}, 1, 0, 3),
        ("fsdp", {"preset": "formulas"}, 1, 0, 3),
        ("fsdp", {"preset": "fit"}, 1, 2, 3),
        ("fsdp", {}, 2, 2, 3),
        ("hsdp", {}, 2, 2, 3),
        ("mixed", {}, 2, 2, 3),
    ],
    ids=["paper", "formulas", "fit", "default", "hsdp", "mixed"],
)
def test_a_step_sends_a_few_coefficients_and_nothing_else(layout, settings, plain, check, refresh):
    for sent in on_ranks(4, collectives, layout, settings):
        m = core.Config(**settings).history_size
        for number, (kinds, sizes, checked, refreshed) in enumerate(sent):
            assert list(kinds) == ["c10d.allreduce_"]
            assert kinds["c10d.allreduce_"] == len(sizes)
            if number == 0:  # the largest values of gradient and parameters decide on a scale
                assert sizes.pop(0) == 2
            # A check and a refresh share the inner products of the pair.
            pair = check if checked and not refreshed else refresh * refreshed
            assert len(sizes) == plain + pair
            assert 2 * m + 1 <= sizes[0] <= 2 * m + 5
            assert sum(sizes) <= 6 * m + 22
        assert any(refreshed for *_, refreshed in sent)


def collectives(layout, settings):
    """For each step: the collectives, the numbers in each, and whether it made a check and a refresh."""
    model = make_model()
    wrapped, part = parallel(model, layout)
    optimizer = MLBFGS(model.named_parameters(), lr=0.001, update_every=6, **settings)
    result = []
    for x, y in batches(16):
        optimizer.zero_grad()
        (wrapped(part(x)) - part(y)).square().mean().backward()
        unit = next(iter(optimizer._units), None)
        checked, refreshed = (
            (False, False) if unit is None else core.Method(unit.config).upcoming(unit.state).tolist()[:2]
        )
        sizes = []
        original = dist.all_reduce

        def counted(tensor, *args, original=original, sizes=sizes, **kwargs):
            sizes.append(tensor.numel())
            return original(tensor, *args, **kwargs)

        with CommDebugMode() as counts, mock.patch.object(dist, "all_reduce", counted):
            optimizer.step()
        kinds = {str(operation): number for operation, number in counts.get_comm_counts().items() if number}
        result.append((kinds, sizes, checked, refreshed))
    return result


def test_gradients_left_as_summands_are_summed_first():
    for actual, expected in on_ranks(2, summands):
        torch.testing.assert_close(actual, expected)


def summands():
    mesh = init_device_mesh("cpu", (2,))
    values = torch.arange(6.0).reshape(3, 2)
    param = nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    optimizer = MLBFGS([param], lr=1.0, momentum=0.0, preconditioner="none")
    local = torch.full((3, 2), 1.0 + dist.get_rank())
    param.grad = DTensor.from_local(local, mesh, [Partial()])
    optimizer.step()
    return param.full_tensor().detach(), values - 1.0


def test_a_parameter_held_as_summands_is_refused():
    for message in on_ranks(2, partial_parameter):
        assert message.startswith(
            "`params` must be sharded or replicated, got the placements (Partial(sum),)"
        )


def partial_parameter():
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    with pytest.raises(ValueError, match="`params`") as error:
        MLBFGS([param])
    return str(error.value)


def test_a_step_that_only_some_parameters_take_part_in():
    """A layer without a gradient keeps still, as in one process."""
    expected = shallow_and_deep(None)
    for params in on_ranks(4, shallow_and_deep, "fsdp"):
        assert deviation(params, expected) < ROUNDING


def shallow_and_deep(layout):
    model = make_model()
    if layout is None:
        wrapped, part = model, lambda tensor: tensor
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model, mesh=mesh)
        wrapped, part = model, lambda tensor: tensor.chunk(mesh.size())[mesh.get_local_rank()]
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    for step, (x, y) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        (wrapped(part(x), shallow=step % 3 == 1) - part(y)).square().mean().backward()
        optimizer.step()
    return whole(model)


def test_a_file_of_all_processes_goes_on_in_another_number(tmp_path):
    path = str(tmp_path / "run.safetensors")
    on_ranks(4, saved_halfway, path)
    for count in (1, 2, 4):
        for params in on_ranks(count, resumed, path):
            assert deviation(params, trained_alone()) < ROUNDING
    model = make_model()
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    optimizer.load_state(path)
    train(model, optimizer, batches(STEPS // 2, first=STEPS // 2))
    assert deviation(whole(model), trained_alone()) < ROUNDING


def saved_halfway(path):
    model = make_model()
    wrapped, part = parallel(model, "fsdp_tensor")
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(wrapped, optimizer, batches(STEPS // 2), part)
    optimizer.save_state(path)


def resumed(path):
    model = make_model()
    wrapped, part = parallel(model, "fsdp")
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    optimizer.load_state(path)
    train(wrapped, optimizer, batches(STEPS // 2, first=STEPS // 2), part)
    return whole(model)


def test_a_file_that_cannot_be_written_is_an_error_on_all(tmp_path):
    for message in on_ranks(2, not_saved, str(tmp_path / "missing" / "run.safetensors")):
        assert "missing" in message


def not_saved(path):
    model = make_model()
    parallel(model, "fsdp")
    with pytest.raises(OSError, match="missing") as error:
        MLBFGS(model.named_parameters(), **SETTINGS).save_state(path)
    return str(error.value)
