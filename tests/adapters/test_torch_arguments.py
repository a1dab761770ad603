"""What users hand to `MLBFGS` of PyTorch, at its construction or later: taken as by AdamW, or refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from torch import nn

from mlbfgs_torch import MLBFGS, units
from tests.trainers.helpers import FAST, assert_same, make_data, make_model, train, weights

NUMBERS = {"lr": 0.0625, "momentum": 0.75, "weight_decay": 0.25}
"""Exact in half precision."""


@pytest.fixture(params=["numpy", "tensors"])
def coefficients(request, monkeypatch):
    """What a step computes its coefficients with: on a CPU NumPy, elsewhere tensors."""
    if request.param == "tensors":
        monkeypatch.setattr(units, "HOSTS", ())
    return request.param


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


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.asarray], ids=repr)
@pytest.mark.parametrize("decoupled", [True, False])
def test_numbers_of_numpy_may_be_assigned_in_mid_run(kind, decoupled, coefficients):
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
