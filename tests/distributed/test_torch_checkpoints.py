"""Sharded runs in `torch.distributed.checkpoint`: on another number of processes, and after a kill."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.multiprocessing import ProcessExitedException

from mlbfgs_torch import MLBFGS

from .processes import on_ranks
from .test_torch_sharded import ROUNDING
from .training import (
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

HALF = STEPS // 2


def begin(layout, dtype=torch.float64, **settings):
    model = make_model(dtype)
    wrapped, part = parallel(model, layout)
    return model, wrapped, part, MLBFGS(model.named_parameters(), **{**SETTINGS, **settings})


def save(path, model, optimizer, *, asynchronously=False):
    """Parameters and optimizer, as a user's checkpoint holds them."""
    found, state = get_state_dict(model, optimizer)
    content = {"model": found, "optimizer": state}
    if asynchronously:
        # It needs its own group, since it communicates while training does.
        group = dist.new_group(backend="gloo")
        return dcp.async_save(content, checkpoint_id=path, process_group=group)
    return dcp.save(content, checkpoint_id=path)


def load(path, model, optimizer):
    found, state = get_state_dict(model, optimizer)
    content = {"model": found, "optimizer": state}
    dcp.load(content, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])


def first_half(path, layout, *, asynchronously=False):
    """Saves after half of the steps; digests then and at the end, and the parameters at the end."""
    model, wrapped, part, optimizer = begin(layout)
    train(wrapped, optimizer, batches(HALF), part)
    halfway = digest(model, optimizer)
    saving = save(path, model, optimizer, asynchronously=asynchronously)
    train(wrapped, optimizer, batches(STEPS - HALF, first=HALF), part)
    if saving is not None and asynchronously:
        saving.result()
    return halfway, digest(model, optimizer), whole(model)


def second_half(path, layout, again=None):
    """The same for a run that starts from the saved state; `again` saves it once more before it goes on."""
    model, wrapped, part, optimizer = begin(layout)
    load(path, model, optimizer)
    assert all(int(record.skipped) == 0 for record in optimizer.diagnostics())
    halfway = digest(model, optimizer)
    if again is not None:
        save(again, model, optimizer)
    train(wrapped, optimizer, batches(STEPS - HALF, first=HALF), part)
    return halfway, digest(model, optimizer), whole(model)


@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "fsdp_tensor", "ddp"])
def test_the_same_layout_goes_on_bit_by_bit(layout, tmp_path):
    path = str(tmp_path / "saved")
    expected = on_ranks(4, first_half, path, layout)
    for (halfway, end, _), (saved, goal, _) in zip(
        on_ranks(4, second_half, path, layout), expected, strict=True
    ):
        assert halfway == saved
        assert end == goal


def test_four_processes_two_one_and_back(tmp_path):
    paths = [str(tmp_path / name) for name in ("four", "two", "one", "back")]
    expected = on_ranks(4, first_half, paths[0], "fsdp")
    for count, path, again in ((2, *paths[:2]), (1, *paths[1:3])):
        for *_, params in on_ranks(count, second_half, path, "fsdp", again):
            assert deviation(params, trained_alone()) < ROUNDING
    for (halfway, end, _), (saved, goal, _) in zip(
        on_ranks(4, second_half, paths[2], "fsdp", paths[3]), expected, strict=True
    ):
        assert halfway == saved, "the way over two and one has changed a bit"
        assert end == goal


def test_another_layout_goes_on(tmp_path):
    path = str(tmp_path / "saved")
    on_ranks(4, first_half, path, "fsdp_tensor")
    for layout in ("hsdp", "fsdp"):
        for *_, params in on_ranks(4, second_half, path, layout):
            assert deviation(params, trained_alone()) < ROUNDING


def test_an_asynchronous_save_holds_the_moment_of_its_call(tmp_path):
    path = str(tmp_path / "saved")
    expected = on_ranks(2, functools.partial(first_half, asynchronously=True), path, "fsdp")
    for (halfway, end, _), (saved, goal, _) in zip(
        on_ranks(2, second_half, path, "fsdp"), expected, strict=True
    ):
        assert halfway == saved
        assert end == goal


def test_a_run_of_which_one_process_was_killed_resumes(tmp_path):
    folder = str(tmp_path)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        on_ranks(4, live, folder, 17)
    for count in (4, 2):
        for first, params in on_ranks(count, live, folder, None):
            assert first == 15
            assert deviation(params, trained_alone()) < ROUNDING


def live(folder, killed_at):
    """Train from the newest checkpoint to the end, saving every fifth step."""
    model, wrapped, part, optimizer = begin("fsdp")
    done = sorted(int(path.parent.name) for path in Path(folder).glob("*/.metadata"))  # written last
    first = done[-1] if done else 0
    if done:
        load(f"{folder}/{first}", model, optimizer)
    for step in range(first, STEPS):
        if step == killed_at and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        train(wrapped, optimizer, batches(1, first=step), part)
        if killed_at is not None and (step + 1) % 5 == 0:
            save(f"{folder}/{step + 1}", model, optimizer)
    return first, whole(model)


def test_bfloat16_parameters_keep_their_float32_state(tmp_path):
    for saved, loaded in on_ranks(2, bfloat16, str(tmp_path / "saved")):
        assert saved == loaded


def bfloat16(path):
    model, wrapped, part, optimizer = begin("fsdp", torch.bfloat16)
    train(wrapped, optimizer, batches(HALF, dtype=torch.bfloat16), part)
    save(path, model, optimizer)
    other, _, _, fresh = begin("fsdp", torch.bfloat16)
    load(path, other, fresh)
    assert fresh.state[other.inner.weight]["history"].dtype == torch.float32
    return digest(model, optimizer), digest(other, fresh)


def test_making_an_empty_state_is_no_step():
    for params, steps in on_ranks(2, empty_state):
        assert deviation(params, whole(make_model())) == 0
        assert steps == 0


def empty_state():
    model, _, _, optimizer = begin("fsdp")
    get_optimizer_state_dict(model, optimizer)
    (record,) = optimizer.diagnostics()
    return whole(model), int(record.skipped) + int(record.step)


def test_a_full_state_of_one_process_is_spread_over_all(tmp_path):
    """As `full_state_dict` with `broadcast_from_rank0` does."""
    model = make_model()
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    train(model, optimizer, batches(HALF))
    path = str(tmp_path / "full.pt")
    options = StateDictOptions(full_state_dict=True, cpu_offload=False)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        },
        path,
    )
    for params in on_ranks(4, spread, path):
        assert deviation(params, trained_alone()) < ROUNDING


def spread(path):
    found = torch.load(path, weights_only=True)
    model = make_model()
    model.load_state_dict(found["model"])
    wrapped, part = parallel(model, "fsdp")
    optimizer = MLBFGS(model.named_parameters(), **SETTINGS)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = found["optimizer"] if dist.get_rank() == 0 else {}
    set_optimizer_state_dict(model, optimizer, state, options=options)
    train(wrapped, optimizer, batches(STEPS - HALF, first=HALF), part)
    return whole(model)


def test_a_state_that_is_not_sharded_is_refused():
    for message in on_ranks(2, unsharded):
        assert message.startswith("`state_dict` must hold a 'history' sharded like its parameter")


def unsharded():
    plain = make_model()
    optimizer = MLBFGS(plain.named_parameters(), **SETTINGS)
    train(plain, optimizer, batches(3))
    *_, sharded = begin("fsdp")
    with pytest.raises(ValueError, match="`state_dict`") as error:
        sharded.load_state_dict(optimizer.state_dict())
    return str(error.value)
