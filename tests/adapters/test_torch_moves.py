"""A run that is moved to another dtype, device or shape takes its state along, or says what it forgets."""

from __future__ import annotations

import copy
import itertools
import re
import warnings

import pytest
import torch
from torch import nn

import mlbfgs_core as core
from mlbfgs_torch import MLBFGS
from mlbfgs_torch import leaves as torch_leaves
from tests.trainers.helpers import FAST, assert_same, make_data, make_model, train, weights

pytestmark = pytest.mark.backends("torch")

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHANGES = list(itertools.permutations(DTYPES, 2))
SETTINGS = [FAST, {"preset": "fit", "update_every": 3}, {"history_dtype": "bfloat16", **FAST}]


@pytest.fixture(params=["packed", "alone"])
def packing(request, monkeypatch):
    """Whether small parameters lie side by side."""
    if request.param == "alone":
        monkeypatch.setitem(torch_leaves._SMALL, "cpu", 0)
    return request.param


def assign(params, dtype):
    """As users who convert parameters by hand."""
    for param in params:
        param.data = param.data.to(dtype)
        param.grad = None


def whole_model(model, dtype):
    model.to(dtype)


def swapped(model, dtype):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to(dtype)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


WAYS = {
    "assigned": lambda model, dtype: assign(model.parameters(), dtype),
    "model": whole_model,
    "swap": swapped,
}


def average_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_dtypes(optimizer):
    """Every entry of every parameter has the dtype of a fresh optimizer's."""
    for param, entry in optimizer.state.items():
        history = optimizer.param_groups[0]["history_dtype"]
        own = average_dtype(param.dtype)
        for name in (
            "mean_params",
            "mean_grads",
            "prev_params",
            "prev_grads",
            "exp_avg_sq",
            "momentum_buffer",
        ):
            assert name not in entry or entry[name].dtype == own
        assert entry["history"].dtype == (getattr(torch, history) if history else own)
        assert entry["counters"].dtype == torch.int32
    widest = max((average_dtype(param.dtype) for param in optimizer.state), key=lambda dtype: dtype.itemsize)
    assert {entry["coefficients"].dtype for entry in optimizer.state.values()} == {widest}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("history_dtype", [None, "bfloat16"])
def test_a_run_moved_to_float64_reaches_the_precision_of_one_begun_there(way, history_dtype, coefficients):
    torch.manual_seed(0)
    inputs = torch.randn(30, 5, dtype=torch.float64)
    targets = inputs @ torch.randn(5, 1, dtype=torch.float64) + 0.5

    def least_squares():
        for _ in range(200):
            optimizer.zero_grad()
            dtype = next(model.parameters()).dtype
            (model(inputs.to(dtype)) - targets.to(dtype)).square().mean().backward()
            optimizer.step()
        return (model(inputs.to(dtype)) - targets.to(dtype)).square().mean().sqrt()

    model = nn.Linear(5, 1)
    optimizer = MLBFGS(model.parameters(), lr=0.3, preset="fit", history_dtype=history_dtype)
    assert least_squares() > 1e-9
    WAYS[way](model, torch.float64)
    assert least_squares() < 1e-14
    check_dtypes(optimizer)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("first", "second"), CHANGES, ids=str)
def test_state_follows_every_change_of_dtype_without_a_warning(first, second, settings, packing):
    model = make_model(dtype=first)
    optimizer = MLBFGS(model.parameters(), lr=0.01, weight_decay=0.1, **settings)
    train(model, optimizer, make_data(7, first))
    before = copy.deepcopy(optimizer.state_dict()["state"])
    model.to(second)
    here = weights(model)
    optimizer.diagnostics()  # binds the state
    check_dtypes(optimizer)
    for number, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, before[number][name].to(value.dtype)), name
    assert_same(weights(model), here)
    train(model, optimizer, make_data(9, second))
    assert int(optimizer.diagnostics()[0].step) == 16
    assert all(torch.isfinite(param).all() for param in model.parameters())
    check_dtypes(optimizer)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_widened_run_goes_on_as_one_in_which_everything_was_widened_by_hand(
    settings, coefficients, packing
):
    model, data = make_model(dtype=torch.float32), make_data(12, torch.float64)
    optimizer = MLBFGS(model.parameters(), lr=0.05, **settings)
    train(model, optimizer, make_data(7, torch.float32))
    wide = copy.deepcopy(model).double()
    other = MLBFGS(wide.parameters(), lr=0.05, **settings)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        for name, value in entry.items():
            if value.dtype == torch.float32:
                entry[name] = value.double()
    other.load_state_dict(state)
    model.double()
    assert_same(weights(train(model, optimizer, data)), weights(train(wide, other, data)))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("first", "second"), CHANGES, ids=str)
def test_moving_saving_and_loading_commute(first, second, settings, tmp_path):
    """A state saved before a move and loaded after it, and a state saved after it, continue alike."""
    model = make_model(dtype=first)
    optimizer = MLBFGS(model.named_parameters(), lr=0.01, **settings)
    train(model, optimizer, make_data(7, first))
    before = copy.deepcopy(optimizer.state_dict())
    model.to(second)
    behind = copy.deepcopy(optimizer.state_dict())
    check_dtypes(optimizer)
    optimizer.save_state(tmp_path / "run")
    data, runs = make_data(6, second), []
    for state in (before, behind, "file"):
        twin = copy.deepcopy(model)
        resumed = MLBFGS(twin.named_parameters(), lr=0.01, **settings)
        if state == "file":
            resumed.load_state(tmp_path / "run")
        else:
            resumed.load_state_dict(state)
        runs.append(weights(train(twin, resumed, data)))
        check_dtypes(resumed)
    twin, resumed = copy.deepcopy((model, optimizer))
    runs.append(weights(train(twin, resumed, data)))
    runs.append(weights(train(model, optimizer, data)))
    for run in runs[1:]:
        assert_same(runs[0], run)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("index", [0, 1, 3])
def test_single_parameters_of_a_block_may_change_their_dtype(index, settings, packing, tmp_path):
    model = make_model(dtype=torch.float32)
    params = list(model.parameters())
    optimizer = MLBFGS(model.named_parameters(), lr=0.01, **settings)

    def go(steps):
        for number in range(steps):
            for param in params:
                param.grad = param.detach() * (1 + 0.1 * (number % 3))
            optimizer.step()

    go(7)
    assign([params[index]], torch.float64)
    go(5)
    check_dtypes(optimizer)
    assert int(optimizer.diagnostics()[0].step) == 12
    optimizer.save_state(tmp_path / "run")
    twin = copy.deepcopy(model)
    resumed = MLBFGS(twin.named_parameters(), lr=0.01, **settings)
    resumed.load_state(tmp_path / "run")
    assign([params[index]], torch.float32)
    go(5)
    check_dtypes(optimizer)
    assert int(optimizer.diagnostics()[0].step) == 17


def test_complex_parameters_follow_too():
    param = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64).conj())
    optimizer = MLBFGS([param], lr=0.3, preset="fit")
    for dtype in (torch.complex64, torch.complex128):
        param.data = param.data.to(dtype)
        for _ in range(150):
            param.grad = (param.detach() - 0.1) * torch.tensor([1, 1.5], dtype=dtype)
            optimizer.step()
    assert (param - 0.1).abs().max() < 1e-14
    assert optimizer.state[param]["history"].dtype == torch.float64


def test_a_gradient_left_in_the_old_dtype_is_refused_with_the_name_of_its_parameter():
    for pair in ([torch.ones(3)], [torch.ones(3), torch.ones(2)]):
        params = [nn.Parameter(value) for value in pair]
        names = ["weight", "bias"][: len(params)]
        optimizer = MLBFGS(list(zip(names, params, strict=True)), **FAST)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        before, memory = [param.detach().clone() for param in params], copy.deepcopy(optimizer.state_dict())
        params[-1].data = params[-1].data.double()
        words = f"gradients of the dtype float64, got float32 for {names[-1]!r}"
        with pytest.raises(TypeError, match=words):
            optimizer.step()
        assert_same([param.float() for param in params], before)
        params[-1].data = params[-1].data.float()
        assert int(optimizer.diagnostics()[0].step) == 1
        for key, entry in optimizer.state_dict()["state"].items():
            assert_same(entry.values(), memory["state"][key].values())


@pytest.mark.parametrize(
    ("dtype", "grad", "words"),
    [
        (torch.float32, torch.float64, "of the dtype float32, got float64 for 'x'"),
        (torch.float64, torch.float32, "of the dtype float64, got float32 for 'x'"),
        (torch.bfloat16, torch.float16, "of the dtype bfloat16 or float32, got float16 for 'x'"),
        (torch.complex64, torch.complex128, "of the dtype complex64, got complex128 for 'x'"),
        (torch.complex64, torch.float32, "of the dtype complex64, got float32 for 'x'"),
        (torch.float32, torch.complex64, "of the dtype float32, got complex64 for 'x'"),
        (torch.bfloat16, torch.float32, None),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch refuses such gradients itself"
)
def test_gradients_of_another_dtype_are_refused_by_name(dtype, grad, words, count):
    params = [nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(count)]
    optimizer = MLBFGS([(name, param) for name, param in zip("xy", params, strict=False)])
    params[0].grad_dtype = None
    for param in params:
        param.grad = torch.ones(3, dtype=dtype if param is not params[0] else grad)
    if words is None:
        optimizer.step()
        return
    with pytest.raises(TypeError, match=words):
        optimizer.step()
    assert all((param == 1).all() for param in params)


@pytest.mark.parametrize("shape", [(4, 8), (8, 5), (32,), (8, 4, 1), (0, 4), ()])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_change_of_shape_starts_anew_with_a_warning_that_says_it(shape, momentum, packing, tmp_path):
    model = make_model()
    params = list(model.parameters())
    optimizer = MLBFGS(model.named_parameters(), lr=0.01, momentum=momentum, **FAST)
    train(model, optimizer, make_data(7))
    start = torch.ones(shape, dtype=torch.float64)
    params[0].data, params[0].grad = start.clone(), None

    def go():
        for param in params:
            param.grad = param.detach() * 0.5
        optimizer.step()

    words = f"since the shape of '0.weight' has changed from (8, 4) to {shape}"
    with pytest.warns(UserWarning, match=re.escape(words)):
        optimizer.save_state(tmp_path / "run")
    for _ in range(6):
        go()
    assert optimizer.state[params[0]]["history"].shape == (2, 3, *shape)
    assert start.numel() == 0 or not torch.equal(params[0], start)
    other = copy.deepcopy(model)
    MLBFGS(other.named_parameters(), lr=0.01, momentum=momentum, **FAST).load_state(tmp_path / "run")
    assert torch.equal(next(other.parameters()), start)


def test_real_parameters_that_become_complex_start_anew():
    param = nn.Parameter(torch.ones(3))
    optimizer, said = MLBFGS([("x", param)], **FAST), []
    for dtype in (torch.float32, torch.complex64, torch.float32):
        value = param.data.real if param.is_complex() else param.data
        param.data, param.grad = value.to(dtype).clone(), None
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(4):
                param.grad = param.detach() * 0.5
                optimizer.step()
        said.append([str(warning.message).partition("since ")[2] for warning in seen])
    change = "the shape of 'x' has changed from {} to {}"
    assert said == [[], [change.format((3,), (3, 2))], [change.format((3, 2), (3,))]]
    assert torch.isfinite(param).all()


def test_momentum_may_be_switched_on_during_a_run_and_starts_at_zero():
    """A step with a fresh buffer goes 1 + momentum times as far with Nesterov momentum."""
    moved = []
    for momentum in (0.0, 0.5):
        param = nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = MLBFGS([param], lr=0.01, momentum=0.0)
        for number in range(6):
            if number == 5:
                optimizer.param_groups[0]["momentum"] = momentum
                before = param.detach().clone()
            param.grad = param.detach() * torch.tensor([1.0, 2.0, 3.0])
            optimizer.step()
        moved.append(param.detach() - before)
    torch.testing.assert_close(moved[1], 1.5 * moved[0])


def test_a_change_of_the_order_in_memory_loses_nothing():
    runs = []
    for moved in (False, True):
        model, data = make_model(), make_data(14)
        optimizer = MLBFGS(model.parameters(), **FAST)
        train(model, optimizer, data[:7])
        if moved:
            for param in model.parameters():
                if param.ndim == 2:
                    param.data = param.data.t().contiguous().t()
                    param.grad = None
        train(model, optimizer, data[7:])
        runs.append(torch.cat([param.detach().reshape(-1) for param in model.parameters()]))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's compiler calls it itself
def test_a_compiled_step_follows_too():
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = make_model(dtype=torch.float32)
        optimizer = MLBFGS(model.parameters(), lr=0.05, **FAST)
        step = (
            torch.compile(optimizer.step, backend="aot_eager", fullgraph=True) if compiled else optimizer.step
        )
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            for inputs, targets in make_data(6, dtype):
                optimizer.zero_grad()
                (model(inputs) - targets).square().mean().backward()
                step()
            check_dtypes(optimizer)
        runs.append(weights(model))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


def test_swapped_tensors_keep_their_state():
    runs = []
    for swap in (False, True):
        model, data = make_model(), make_data(14)
        optimizer = MLBFGS(model.parameters(), **FAST)
        train(model, optimizer, data[:7])
        optimizer.zero_grad()
        if swap:
            for param in model.parameters():
                torch.utils.swap_tensors(param, nn.Parameter(param.detach().clone()))
        train(model, optimizer, data[7:])
        runs.append(weights(model))
    assert_same(*runs)


def test_a_file_of_another_dtype_is_refused_and_its_parameters_can_be_converted(tmp_path):
    model = make_model(dtype=torch.float32)
    optimizer = MLBFGS(model.named_parameters(), **FAST)
    train(model, optimizer, make_data(7, torch.float32))
    optimizer.save_state(tmp_path / "run")
    model.double()
    with pytest.raises(ValueError, match=r"float64 of shape .*, got float32"):
        optimizer.load_state(tmp_path / "run")
    optimizer.save_state(tmp_path / "wide")
    optimizer.load_state(tmp_path / "wide")
    assert core.load_state(tmp_path / "wide")[0].state.mean_params[0].dtype == "float64"
    train(model, optimizer, make_data(7))
    assert int(optimizer.diagnostics()[0].step) == 14
