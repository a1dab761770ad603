"""The Kronecker preconditioner in PyTorch, held to the core on NumPy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import mlbfgs_core as core
from mlbfgs_arrays import MLBFGS as ArraysMLBFGS
from mlbfgs_core.adapter import OF_MATRICES
from mlbfgs_torch import MLBFGS

pytestmark = pytest.mark.backends("torch")

SHAPES = {
    "a.w": (6, 4),
    "a.b": (3,),
    "b.w": (6, 4),
    "conv": (5, 2, 3),
    "row": (1, 7),
    "none": (),
    "empty": (0, 3),
}
FAST = {"preconditioner": "kronecker", "update_every": 6, "check_every": 2, "precondition_frequency": 3}


def start(dtype=torch.float64):
    rng = np.random.default_rng(0)
    return {name: torch.tensor(rng.normal(size=shape), dtype=dtype) for name, shape in SHAPES.items()}


def gradients(step, shapes=SHAPES):
    rng = np.random.default_rng(100 + step)
    return {
        name: rng.normal(size=shape)
        * np.geomspace(0.1, 2, max(1, np.prod(shape, dtype=int)))
        .reshape(-1)[: int(np.prod(shape))]
        .reshape(shape)
        for name, shape in shapes.items()
    }


def params_of(values):
    return {name: torch.nn.Parameter(value.clone()) for name, value in values.items()}


def train(params, optimizer, steps, first=0, missing=lambda name, step: False):
    for step in range(first, first + steps):
        for name, grad in gradients(step).items():
            own = params[name]
            grad = torch.tensor(grad) + 0.5 * own.detach().double()
            own.grad = None if missing(name, step) else grad.to(own.dtype)
        optimizer.step()


def core_run(steps, *, missing=lambda name, step: False, lr=0.05, **settings):
    values = {name: value.numpy().copy() for name, value in start().items()}
    method = core.Method(core.Config(**{**FAST, **settings}))
    state = method.init(list(values.values()))
    for step in range(steps):
        grads = gradients(step)
        given = [None if missing(n, step) else np.asarray(grads[n] + 0.5 * x) for n, x in values.items()]
        update, state = method.step(state, [np.asarray(x) for x in values.values()], given)
        values = {
            name: np.asarray(x if d is None else x - lr * d)
            for (name, x), d in zip(values.items(), update, strict=True)
        }
    return values


def compare(params, values, tolerance=1e-9):
    for name, value in values.items():
        np.testing.assert_allclose(params[name].detach().numpy(), value, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("own", [{}, {"history_size": 0}, {"adaptive": False}, {"max_preconditioner_dim": 4}])
def test_packed_matrices_follow_the_core_on_one_leaf_each(own):
    params = params_of(start())
    train(params, MLBFGS(params.items(), lr=0.05, momentum=0.0, **{**FAST, **own}), 25)
    compare(params, core_run(25, **own))


def test_missing_gradients_split_a_stack_of_matrices():
    def missing(name, step):
        return name == "b.w" and (step < 4 or step % 3 == 0)

    params = params_of(start())
    train(params, MLBFGS(params.items(), lr=0.05, momentum=0.0, **FAST), 25, missing=missing)
    compare(params, core_run(25, missing=missing))


def test_channels_last_and_transposed_weights_have_the_matrices_of_their_axes():
    values = {
        "conv": torch.randn(4, 3, 2, 2, dtype=torch.float64),
        "w": torch.randn(5, 4, dtype=torch.float64),
    }
    plain = params_of(values)
    other = {
        "conv": torch.nn.Parameter(values["conv"].clone().to(memory_format=torch.channels_last)),
        "w": torch.nn.Parameter(values["w"].T.contiguous().T),
    }
    for params in (plain, other):
        optimizer = MLBFGS(params.items(), lr=0.05, **FAST)
        for step in range(15):
            for name, grad in gradients(step, {n: tuple(v.shape) for n, v in values.items()}).items():
                params[name].grad = torch.empty_like(params[name]).copy_(torch.tensor(grad))
            optimizer.step()
    for name in values:
        torch.testing.assert_close(other[name].detach(), plain[name].detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_resumed_run_is_the_same_bit_by_bit(dtype, tmp_path):
    whole, parts = params_of(start(dtype)), params_of(start(dtype))
    optimizer = MLBFGS(whole.items(), lr=0.05, **FAST)
    train(whole, optimizer, 12)
    first = MLBFGS(parts.items(), lr=0.05, **FAST)
    train(parts, first, 12)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    again = {name: torch.nn.Parameter(param.detach().clone()) for name, param in parts.items()}
    second = MLBFGS(again.items(), lr=0.05, **FAST)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(whole, optimizer, 8, first=12)
    train(again, second, 8, first=12)
    for name in SHAPES:
        assert torch.equal(whole[name], again[name]), name
    entry = second.state[again["a.w"]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {entry[name].dtype for name in OF_MATRICES} == {wide}
    assert entry["left_basis"].shape == (1, 6, 6)


def test_a_run_of_pytorch_goes_on_in_numpy_and_back(tmp_path):
    params = params_of(start())
    optimizer = MLBFGS(params.items(), lr=0.05, momentum=0.0, **FAST)
    train(params, optimizer, 12)
    optimizer.save_state(tmp_path / "run.safetensors")
    arrays = {name: param.detach().numpy().copy() for name, param in params.items()}
    other = ArraysMLBFGS(arrays, lr=0.05, momentum=0.0, **FAST)
    other.load_state(tmp_path / "run.safetensors")
    for step in range(12, 20):
        grads = gradients(step)
        other.step({name: grads[name] + 0.5 * x for name, x in arrays.items()})
    back = params_of(start())
    third = MLBFGS(back.items(), lr=0.05, momentum=0.0, **FAST)
    other.save_state(tmp_path / "back.safetensors")
    third.load_state(tmp_path / "back.safetensors")
    train(params, optimizer, 8, first=12)
    compare(back, {name: param.detach().numpy() for name, param in params.items()})


def test_a_gradient_that_is_not_finite_changes_no_array():
    params = params_of(start())
    optimizer = MLBFGS(params.items(), lr=0.05, **FAST)
    train(params, optimizer, 7)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    params["a.w"].grad[1, 2] = torch.nan
    optimizer.step()
    for index, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            if name not in ("counters", "coefficients"):
                assert torch.equal(value, before[index][name]), name


def test_stacked_layers_are_named_by_matrix_axes():
    stacked = torch.nn.Parameter(torch.randn(3, 4, 5, dtype=torch.float64))
    apart = [torch.nn.Parameter(layer.detach().clone()) for layer in stacked]
    one = MLBFGS([("layers", stacked)], lr=0.05, matrix_axes={"layers": (1, 1)}, **FAST)
    many = MLBFGS(apart, lr=0.05, **FAST)
    for step in range(15):
        stacked.grad = torch.tensor(gradients(step, {"layers": (3, 4, 5)})["layers"])
        for layer, grad in zip(apart, stacked.grad, strict=True):
            layer.grad = grad.clone()
        one.step()
        many.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([p.detach() for p in apart]), rtol=0, atol=1e-11)
    assert one.state[stacked]["left_factor"].shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("axes", "error", "words"),
    [
        ({"v": (0, 1)}, ValueError, r"`matrix_axes` must hold names of parameters, such as \['w'\], got 'v'"),
        ({"w": (1, 1)}, ValueError, r"`matrix_axes` must leave axes for the columns, got \(1, 1\) for 'w'"),
        ({"w": 1}, ValueError, "`matrix_axes` must give None or two ints.*, got 1 for 'w'"),
        ("first", TypeError, "`matrix_axes` must be None, a mapping of names or a function, got 'first'"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, error, words):
    with pytest.raises(error, match=words):
        MLBFGS([("w", torch.nn.Parameter(torch.ones(3, 4)))], matrix_axes=axes, **FAST)


def test_a_compiled_step_runs_from_the_coordinates_of_the_parameters():
    params = params_of(start(torch.float32))
    optimizer = MLBFGS(params.items(), lr=0.05, capturable=True, **FAST)
    train(params, optimizer, 12)
    basis = optimizer.state[params["a.w"]]["left_basis"][0]
    torch.testing.assert_close(basis.T @ basis, torch.eye(6), rtol=0, atol=1e-5)
    assert not torch.equal(basis, torch.eye(6))
    assert all(torch.isfinite(param).all() for param in params.values())


def test_a_complex_vector_has_the_diagonal_and_a_complex_matrix_factors():
    vector, matrix = (
        torch.nn.Parameter(torch.randn(shape, dtype=torch.complex64)) for shape in ((6,), (6, 4))
    )
    optimizer = MLBFGS([vector, matrix], **FAST)
    vector.grad, matrix.grad = torch.randn_like(vector), torch.randn_like(matrix)
    optimizer.step()
    assert "left_factor" not in optimizer.state[vector]
    assert optimizer.state[matrix]["right_factor"].shape == (1, 8, 8)


def test_other_sizes_of_matrices_make_a_parameter_forget_its_curvature():
    param = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = MLBFGS([param], **FAST)
    for _ in range(3):
        param.grad = torch.randn(6, 4)
        optimizer.step()
    optimizer.param_groups[0]["max_preconditioner_dim"] = 4
    with pytest.warns(UserWarning, match="settings of 'param0' have changed"):
        optimizer.step()
    assert "left_factor" not in optimizer.state[param]
