"""Parameters divided over owners by `ZeroRedundancyOptimizer`."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlbfgs_torch import MLBFGS

from .processes import on_ranks
from .test_torch_sharded import ROUNDING
from .training import SETTINGS, STEPS, batches, deviation, make_model, parallel, train, trained_alone, whole


def zero(params, **settings):
    """The optimizer under test."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns about features it uses itself

    # Not among the other settings, which are stored in the state: a function cannot be stored.
    blocks = settings.pop("blocks", "all")
    owned = partial(MLBFGS, shard_group=dist.group.WORLD, blocks=blocks)
    return ZeroRedundancyOptimizer(params, owned, **{**SETTINGS, **settings})


def by_owner(name):
    """A block for the parameters of each owner, whose names begin with its rank."""
    return name.partition(".")[0]


def owners(model, optimizer):
    """Which process owns which parameter."""
    return {name: optimizer._param_to_rank[param] for name, param in model.named_parameters()}


def trained(settings, steps=STEPS):
    model = make_model()
    wrapped, part = parallel(model, "ddp")
    optimizer = zero(model.parameters(), **settings)
    train(wrapped, optimizer, batches(steps), part)
    return whole(model), owners(model, optimizer)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "fit"},
        {"preconditioner": "none", "momentum": 0.0},
        {"preset": "lbfgs", "lr": 0.01},
        {"preconditioner": "kronecker", "precondition_frequency": 3, "check_every": 2},
    ],
    ids=["default", "fit", "plain", "lbfgs", "kronecker"],
)
def test_one_block_over_all_owners_is_that_of_one_process(count, settings):
    turns = "kronecker" in settings.values()  # each turn of a basis magnifies what the order of sums changes
    for params, _ in on_ranks(count, trained, settings):
        assert deviation(params, trained_alone(**settings)) < (100 if turns else 1) * ROUNDING


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("preset", [None, "fit"])
def test_a_block_for_each_owner_is_that_of_one_process_with_the_same_blocks(count, preset):
    settings = {"preset": preset, **({} if preset is None else {"lr": 0.05})}
    results = on_ranks(count, trained, {"blocks": by_owner, **settings})
    owner = results[0][1]
    assert set(owner.values()) == set(range(count))
    expected = trained_alone(blocks=owner.__getitem__, **settings)
    assert deviation(expected, trained_alone(**settings)) > 1e-3, "blocks make no difference"
    for params, _ in results:
        assert deviation(params, expected) < ROUNDING


def test_gradients_that_only_one_owner_lacks():
    """Both with a layer left out on some steps, and with one that joins late."""
    for params in on_ranks(4, lacking):
        assert deviation(params, lacking(None)) < ROUNDING


def lacking(count=4):
    model = make_model()
    if count is None:
        wrapped, part = model, lambda tensor: tensor
        optimizer = MLBFGS(model.named_parameters(), **SETTINGS, preconditioner="none")
    else:
        wrapped, part = parallel(model, "ddp")
        optimizer = zero(model.parameters(), preconditioner="none")
    for step, (x, y) in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        (wrapped(part(x), shallow=step % 3 == 1 or step < 10) - part(y)).square().mean().backward()
        optimizer.step()
    return whole(model)


def test_settings_of_groups_of_which_some_owners_have_nothing():
    for params in on_ranks(4, grouped):
        assert deviation(params, grouped(alone=True)) < ROUNDING


def grouped(*, alone=False):
    model = make_model()
    groups = [
        {"params": [model.inner.weight, model.hidden.weight, model.outer.weight]},
        {"params": [model.inner.bias], "history_size": 2},
        {"params": [model.hidden.bias, model.outer.bias, model.scale], "update_every": 5},
    ]
    if alone:
        train(model, MLBFGS(groups, **SETTINGS), batches(STEPS))
        return whole(model)
    wrapped, part = parallel(model, "ddp")
    train(wrapped, zero(groups), batches(STEPS), part)
    return whole(model)


def test_a_nan_is_skipped_by_all_owners():
    for params, skipped in on_ranks(4, nan_once):
        assert skipped == 1
        assert deviation(params, trained_alone()) < ROUNDING


def nan_once():
    model = make_model()
    wrapped, part = parallel(model, "ddp")
    optimizer = zero(model.parameters())
    train(wrapped, optimizer, batches(STEPS // 2), part)
    optimizer.zero_grad()
    ((x, y),) = batches(1)
    (wrapped(part(x)) - part(y)).square().mean().backward()
    if dist.get_rank() == 1:  # as an owner that computes gradients of its own
        next(iter(optimizer.optim.state)).grad.fill_(torch.nan)
    optimizer.step()
    skipped = int(optimizer.optim.diagnostics()[0].skipped)
    train(wrapped, optimizer, batches(STEPS - STEPS // 2, first=STEPS // 2), part)
    return whole(model), skipped


@pytest.mark.parametrize("count", [2, 4])
def test_memory_is_divided_evenly(count):
    ((total, _),) = on_ranks(1, memory)
    held = [found for found, _ in on_ranks(count, memory)]
    assert sum(held) == total
    assert max(held) < 1.05 * total / count


def memory():
    """Bytes of the parameter-sized state of this process, and of its parameters."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
    replicated = DistributedDataParallel(model)
    optimizer = zero(model.parameters())
    replicated(torch.ones(2, 32)).square().sum().backward()
    optimizer.step()
    held = 0
    for param, entry in optimizer.optim.state.items():
        sized = [v for v in entry.values() if isinstance(v, Tensor) and v.shape[-2:] == param.shape[-2:]]
        held += sum(value.nbytes for value in sized)
    return held, sum(param.nbytes for param in optimizer.optim.state)


def test_a_layer_that_is_unfrozen_during_a_run():
    for params in on_ranks(4, frozen):
        assert deviation(params, frozen(alone=True)) < ROUNDING


def frozen(*, alone=False):
    model = make_model()
    model.inner.requires_grad_(False)
    if alone:
        wrapped, part, optimizer = model, lambda tensor: tensor, MLBFGS(model.parameters(), **SETTINGS)
    else:
        wrapped, part = parallel(model, "ddp")
        optimizer = zero(model.parameters())
    train(wrapped, optimizer, batches(STEPS // 2), part)
    model.inner.requires_grad_(True)
    if not alone:  # which learns of it so
        wrapped, part = parallel(model, "ddp")
    train(wrapped, optimizer, batches(STEPS - STEPS // 2, first=STEPS // 2), part)
    return whole(model)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_consolidated_state_goes_on_with_another_number_of_owners(count, tmp_path):
    path = str(tmp_path / "state.pt")
    on_ranks(4, consolidated, path)
    for params, warned in on_ranks(count, gone_on, path):
        assert not warned
        assert deviation(params, trained_alone()) < ROUNDING


def consolidated(path, **settings):
    model = make_model()
    wrapped, part = parallel(model, "ddp")
    optimizer = zero(model.parameters(), **settings)
    train(wrapped, optimizer, batches(STEPS // 2), part)
    optimizer.consolidate_state_dict(to=0)
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)


def gone_on(path, **settings):
    found = torch.load(path, weights_only=True)
    model = make_model()
    model.load_state_dict(found["model"])
    wrapped, part = parallel(model, "ddp")
    optimizer = zero(model.parameters(), **settings)
    optimizer.load_state_dict(found["optimizer"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(wrapped, optimizer, batches(STEPS // 2, first=STEPS // 2), part)
    return whole(model), [str(w.message) for w in caught if "forgets" in str(w.message)]


def test_blocks_of_owners_go_on_with_the_same_number_and_are_forgotten_with_another(tmp_path):
    path = str(tmp_path / "state.pt")
    on_ranks(4, partial(consolidated, blocks=by_owner), path)
    (expected, _), *_ = on_ranks(4, trained, {"blocks": by_owner})
    for params, warned in on_ranks(4, partial(gone_on, blocks=by_owner), path):
        assert not warned
        assert deviation(params, expected) < ROUNDING
    for params, warned in on_ranks(2, partial(gone_on, blocks=by_owner), path):
        assert len(warned) == 1
        assert "since its blocks have changed" in warned[0]
        assert all(torch.isfinite(value).all() for value in params.values())


def test_sharded_parameters_have_no_owners():
    for message in on_ranks(2, sharded_and_owned):
        assert message.startswith("`shard_group` must be None with sharded parameters, got a DTensor for")


def sharded_and_owned():
    model = make_model()
    parallel(model, "fsdp")
    with pytest.raises(ValueError, match="`shard_group`") as error:
        MLBFGS(model.named_parameters(), shard_group=dist.group.WORLD)
    return str(error.value)
