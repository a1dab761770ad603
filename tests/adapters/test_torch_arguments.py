"""What users pass to PyTorch's `MLBFGS`, at construction or later, is treated as by AdamW, or refused."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import mlbfgs_core as core
from mlbfgs_torch import MLBFGS
from tests.trainers.helpers import FAST, assert_same, make_data, make_model, train, weights

pytestmark = pytest.mark.backends("torch")

NUMBERS = {"lr": 0.0625, "momentum": 0.75, "weight_decay": 0.25}
"""Exact in half precision."""


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.asarray], ids=repr)
@pytest.mark.parametrize("nesterov", [True, False])
def test_numbers_of_numpy_serve_as_those_of_python(kind, nesterov, coefficients):
    runs, settings = [], {"history_size": 3, "beta": 0.5, "update_every": 4}
    for make in (float, kind):
        model = make_model()
        numbers = {name: make(value) for name, value in NUMBERS.items()}
        own = {name: make(value) if name == "beta" else np.int64(value) for name, value in settings.items()}
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": make(0.125)}]
        optimizer = MLBFGS(groups, **numbers, **own, nesterov=nesterov)
        for group in optimizer.param_groups:
            assert {type(group[name]) for name in NUMBERS} == {float}
            assert type(group["history_size"]) is int
        runs.append(weights(train(model, optimizer, make_data(8))))
    assert_same(*runs)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(
    ("old", "words"), [({"metric_power": 0.0}, "_power`, and 0 is"), ({"metric_beta": 0.9}, "_beta`")]
)
def test_an_old_name_of_a_setting_in_a_group_is_refused_with_the_new_one(old, words, later):
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    group = {"params": [second], **old}
    optimizer = MLBFGS([first])
    with pytest.raises(TypeError, match=f"unknown setting `metric_.*; it is now `preconditioner{words}"):
        optimizer.add_param_group(group) if later else MLBFGS([{"params": [first]}, group])
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [second], "name": "a name, as for other optimizers"})


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.asarray], ids=repr)
@pytest.mark.parametrize("decoupled", [True, False])
def test_numbers_of_numpy_may_be_assigned_during_a_run(kind, decoupled, coefficients):
    runs = []
    for make in (float, kind):
        model, data = make_model(), make_data(12)
        optimizer = MLBFGS(model.parameters(), decoupled_weight_decay=decoupled, **FAST)
        train(model, optimizer, data[:6])
        for name, value in NUMBERS.items():
            optimizer.param_groups[0][name] = make(value)
        optimizer.param_groups[0]["beta"] = make(0.5)
        train(model, optimizer, data[6:])
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)
        runs.append(weights(model))
    assert_same(*runs)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [True, np.True_, np.asarray(True), 0.5j, np.complex64(0.5), np.ones(1), [0.5], "0.5", None]
)
def test_what_is_no_number_is_refused_by_name(name, value):
    params = [nn.Parameter(torch.ones(2))]
    if value is None:  # at construction it means the default
        with pytest.raises(TypeError, match=f"`{name}` must be a number, got None"):
            MLBFGS([{"params": params, name: None}])
        return
    with pytest.raises(TypeError, match=f"`{name}` must be a number, got"):
        MLBFGS(params, **{name: value})


NAMES = ["w0", "b0", "w1", "b1"]
EDITS = {
    "a parameter taken out": lambda group, new: group.update(params=group["params"][1:]),
    "the last taken out": lambda group, new: group["params"].pop(),
    "reordered": lambda group, new: group.update(params=group["params"][::-1]),
    "one replaced": lambda group, new: group.update(params=[*group["params"][:2], new, *group["params"][3:]]),
    "all replaced": lambda group, new: group.update(params=[new]),
    "appended": lambda group, new: group["params"].append(new),
    "put in front": lambda group, new: group["params"].insert(0, new),
    "a tuple": lambda group, new: group.update(params=tuple(group["params"][:-1])),
    "without names": lambda group, new: group.pop("param_names", None),
    "with no names": lambda group, new: group.update(param_names=[]) if "param_names" in group else None,
    "the same again": lambda group, new: group.update(params=list(group["params"])),
}


def go(optimizer, params, steps=6):
    """Which parameters some steps move, where all have gradients."""
    before = [param.detach().clone() for param in params]
    for _ in range(steps):
        for param in params:
            param.grad = param.detach() * torch.linspace(1, 2, param.shape[-1], dtype=param.dtype)
        optimizer.step()
    return [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]


def make_params():
    return [p.detach().clone().requires_grad_() for p in make_model().parameters()]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("start", [0, 5], ids=["before the first step", "during a run"])
@pytest.mark.parametrize("named", [True, False])
def test_the_parameters_that_move_after_an_edit_of_a_group_are_those_that_adamw_moves(edit, start, named):
    moved = []
    for make in (MLBFGS, torch.optim.AdamW):
        params = [*make_params(), nn.Parameter(torch.ones(2, dtype=torch.float64))]
        optimizer = make(list(zip(NAMES, params[:4], strict=True)) if named else params[:4], lr=0.01)
        go(optimizer, params, start)
        EDITS[edit](optimizer.param_groups[0], params[4])
        moved.append(go(optimizer, params))
        if make is MLBFGS:
            assert len(optimizer.block_names()) == len(optimizer.diagnostics()) == 1
    assert moved[0] == moved[1]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("start", [0, 5], ids=["before the first step", "during a run"])
@pytest.mark.parametrize("steps", [0, 5], ids=["at once", "later"])
def test_an_edited_group_is_saved_and_goes_on_with_the_right_names(edit, start, steps, tmp_path):
    params = [*make_params(), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = MLBFGS(list(zip(NAMES, params[:4], strict=True)), lr=0.01, **FAST)
    go(optimizer, params, start)
    group = optimizer.param_groups[0]
    EDITS[edit](group, params[4])
    go(optimizer, params, steps)
    state = optimizer.state_dict()
    optimizer.save_state(tmp_path / "run")
    (snapshot,) = core.load_state(tmp_path / "run")
    assert {id(param) for param in optimizer.state} <= {id(param) for param in group["params"]}
    for value, param in zip(snapshot.params, group["params"], strict=True):
        np.testing.assert_array_equal(value, param.detach().numpy())
    names = group.get("param_names")
    if names:
        assert list(snapshot.names) == names == state["param_groups"][0]["param_names"]
        known = dict(zip(map(id, params), NAMES, strict=False))
        for name, param in zip(names, group["params"], strict=True):
            assert name == known.get(id(param), name)
    runs = [(optimizer, group["params"])]
    for way in ("dictionary", "file"):
        own = [param.detach().clone().requires_grad_() for param in group["params"]]
        twin = MLBFGS(list(zip(names, own, strict=True)) if names else own, lr=0.01, **FAST)
        if way == "dictionary":
            twin.load_state_dict(state)
        else:
            twin.load_state(tmp_path / "run")
        runs.append((twin, own))
    for one, own in runs:
        go(one, own)
    for _, own in runs[1:]:
        assert_same(group["params"], own)


def test_groups_may_be_emptied_removed_and_replaced():
    params = make_params()
    groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1])]}, {"params": [("c", params[2])]}]
    optimizer = MLBFGS(groups, lr=0.01, **FAST)

    def moved():
        found = go(optimizer, params)
        optimizer.state_dict()
        return "".join(name for name, moves in zip("abcd", found, strict=True) if moves)

    assert moved() == "abc"
    optimizer.param_groups[1]["params"] = []
    assert moved() == "ac"
    optimizer.param_groups.pop(0)
    assert moved() == "c"
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": 0.0}
    assert moved() == ""
    optimizer.param_groups[1]["lr"] = 0.02
    assert moved() == "c"
    optimizer.add_param_group({"params": [("d", params[3])]})
    assert moved() == "cd"
    for group in optimizer.param_groups:
        group["params"] = []
    assert moved() == ""
    assert optimizer.diagnostics() == optimizer.block_names() == []
    optimizer.param_groups[0]["params"] = params[:1]
    assert moved() == "a"


def test_a_parameter_that_leaves_and_comes_back_starts_anew_in_its_block():
    """Its part of the old pairs is gone, as if it had had no gradient then."""
    params = make_params()
    optimizer = MLBFGS(params, lr=0.01, **FAST)
    go(optimizer, params)
    optimizer.param_groups[0]["params"] = params[1:]
    go(optimizer, params)
    optimizer.param_groups[0]["params"] = params
    go(optimizer, params, 1)
    assert not optimizer.state[params[0]]["history"].any()
    assert optimizer.state[params[1]]["history"].any()


def test_names_that_cannot_be_matched_are_refused_by_name():
    params = make_params()
    optimizer = MLBFGS(list(zip("abcd", params, strict=True)), lr=0.01)
    optimizer.param_groups[0]["param_names"] = ["x", "y"]
    params[0].grad = torch.ones_like(params[0])
    words = r"`param_names` must hold a name for each of the group's 4 parameters, got \['x', 'y'\]"
    for act in (optimizer.step, optimizer.state_dict, optimizer.diagnostics):
        with pytest.raises(ValueError, match=words):
            act()
    optimizer.param_groups[0]["param_names"] = list("wxyz")
    optimizer.step()
    assert optimizer._units[0].part.members[0].name == "w"
    optimizer.param_groups[0]["param_names"] = list("stuv")
    optimizer.step()
    assert optimizer._units[0].part.members[0].name == "s"


@pytest.mark.parametrize("count", [4, 2])
def test_groups_made_anew_for_another_model_train_with_the_old_hyperparameters(count):
    """As trainers do after surgery on a model: they keep everything in the old group except its
    parameters."""
    params = make_params()
    optimizer = MLBFGS(list(zip(NAMES, params, strict=True)), lr=0.02, **FAST)
    go(optimizer, params)
    kept = {name: value for name, value in optimizer.param_groups[0].items() if name != "params"}
    optimizer.param_groups.clear()
    optimizer.state.clear()
    new = make_params()[:count]
    optimizer.add_param_group({"params": new, **kept})
    assert all(go(optimizer, new))
    assert optimizer.param_groups[0]["lr"] == 0.02
    assert len(optimizer.state_dict()["param_groups"][0]["param_names"]) == count


def test_a_group_may_be_edited_right_after_loading_or_copying():
    params = make_params()
    optimizer = MLBFGS(list(zip(NAMES, params, strict=True)), lr=0.01, **FAST)
    go(optimizer, params)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["params"] = params[1:]
    other = copy.deepcopy(optimizer)
    for one in (optimizer, other, pickle.loads(pickle.dumps(optimizer))):
        assert one.state_dict()["param_groups"][0]["param_names"] == NAMES[1:]
        go(one, one.param_groups[0]["params"])
        assert one._units[0].part.members[0].name == "b0"


def test_a_state_with_too_few_names_is_refused_with_nothing_changed():
    params = make_params()
    optimizer = MLBFGS(list(zip("abcd", params, strict=True)), lr=0.01)
    state = optimizer.state_dict()
    state["param_groups"][0]["param_names"] = ["a"]
    state["param_groups"][0]["lr"] = 1.0
    with pytest.raises(ValueError, match=r"`state_dict` must hold a name for each .* got \['a'\]"):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.01


BAD = {
    "an entry that is no mapping": (lambda entry: None, "must hold a dictionary for 'w1', got NoneType"),
    "a dictionary": ({"history": {}}, "must hold a tensor as 'history' of 'w1', got dict"),
    "a number": ({"mean_params": 3.0}, "must hold a tensor as 'mean_params' of 'w1', got float"),
    "nothing": ({"exp_avg_sq": None}, "must hold a tensor as 'exp_avg_sq' of 'w1', got NoneType"),
    "a list of momentum": ({"momentum_buffer": [1.0]}, "tensor as 'momentum_buffer' of 'w1', got list"),
    "a string": ({"coefficients": "1"}, "must hold a tensor as 'coefficients' of 'w1', got str"),
    "an int": ({"counters": 1}, "must hold a tensor as 'counters' of 'w1', got int"),
    "history alone": (lambda entry: {"history": entry["history"]}, "hold 'mean_params' beside a 'history'"),
    "no counters": (
        lambda entry: {name: entry[name] for name in entry if name != "counters"},
        "hold 'counters' beside a 'history'",
    ),
    "another shape": (
        {"momentum_buffer": torch.ones(3)},
        r"'momentum_buffer' of the shape \(2, 8\) of ",
    ),
    "a history without axes": ({"history": torch.ones(())}, "'history' of the shape"),
    "too few coefficients": (
        {"coefficients": torch.ones(7)},
        r"'coefficients' of the shape \(\d+,\), got \(7,\)",
    ),
    "counters with axes": ({"counters": torch.ones(2, 2)}, r"'counters' of the shape \(\d+,\), got \(2, 2\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_state_entry_that_cannot_be_one_is_refused_by_name_with_nothing_changed(kind):
    change, words = BAD[kind]
    params = make_params()
    optimizer = MLBFGS(list(zip(NAMES, params, strict=True)), lr=0.01, **FAST)
    go(optimizer, params)
    state, before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.state_dict())
    entry = dict(state["state"][2])
    state["state"][2] = {**entry, **change} if isinstance(change, dict) else change(entry)
    with pytest.raises(ValueError, match=f"`state_dict` .*{words}"):
        optimizer.load_state_dict(state)
    for key, entry in optimizer.state_dict()["state"].items():
        assert_same(entry.values(), before["state"][key].values())


def test_a_flattened_state_that_lacks_a_parameter_is_refused_by_name():
    """As `torch.distributed.checkpoint` gives it where a layer was unfrozen since."""
    model = make_model()
    model[0].weight.requires_grad_(False)
    optimizer = MLBFGS(model.named_parameters(), lr=0.01, **FAST)
    train(model, optimizer, make_data(3))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other = make_model()
    resumed = MLBFGS(other.named_parameters(), lr=0.01, **FAST)
    with pytest.raises(ValueError, match=r"`state_dict` must hold a tensor as '.*' of '0.weight', got dict"):
        set_optimizer_state_dict(other, resumed, state, options=options)


def test_a_state_dict_of_an_older_version_goes_on_as_if_the_scale_of_gradients_had_been_1():
    runs = []
    for older in (False, True):
        param = nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = MLBFGS([param], lr=0.05, update_every=4)
        for number in range(12):
            param.grad = (
                param.detach() * torch.arange(1.0, 5.0, dtype=torch.float64) * (1 + 0.1 * (number % 3))
            )
            optimizer.step()
            if number == 7:
                state = copy.deepcopy(optimizer.state_dict())
                if older:
                    entry = state["state"][0]
                    entry["coefficients"] = entry["coefficients"][:-1].clone()
                optimizer = MLBFGS([param], lr=0.05, update_every=4)
                optimizer.load_state_dict(state)
        runs.append(param.detach().clone())
    assert torch.equal(*runs)
