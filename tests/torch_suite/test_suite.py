"""`MLBFGS` keeps what PyTorch's TestOptimRenewed asks of every optimizer, for every kind of input.

`COVERED` names the test here for each of PyTorch's, `NOT_APPLICABLE` says why there is none.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_methods_invocations import DecorateInfo
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db, optims
from torch.testing._internal.common_utils import TestCase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mlbfgs_core as core
from mlbfgs_core.adapter import layout
from mlbfgs_torch import MLBFGS
from mlbfgs_torch.rows import unpack

from .inputs import INFO, QUASI_NEWTON, SCHEDULES, STEPS, all_inputs

NOT_APPLICABLE = {
    "test_adamw_serialization": "It loads the state of Adam into AdamW; no other class shares this state.",
    "test_cpu_load_state_dict": "It moves state from a CPU to a GPU.",
    "test_defaults_changed_to_foreach": "There is only one implementation, and no option to choose it.",
    "test_foreach_large_tensor": "It needs a GPU with 72 GB and a foreach implementation.",
    "test_foreach_matches_forloop": "There is only one implementation, so there is nothing to compare.",
    "test_forloop_goes_right_direction_multigpu": "It needs two GPUs.",
    "test_fused_cpu_matches_cuda": "It needs a GPU and a fused implementation.",
    "test_fused_error_on_params_on_meta": "There is no fused implementation to refuse meta tensors.",
    "test_fused_large_tensor": "It needs 64 GB and a fused implementation.",
    "test_fused_matches_forloop": "There is no fused implementation to compare.",
    "test_rosenbrock_sparse": "Sparse gradients are refused; the errors test that.",
    "test_second_order_optims_return_consistent_types": "It is for optimizers that need a closure.",
    "test_state_dict_with_cuda_params": "It moves state from a CPU to a GPU.",
}
"""PyTorch's test: why it does not apply."""

COVERED = {
    "test_can_load_from_to_named_state_dict": "test_state_passes_between_named_and_unnamed_parameters",
    "test_can_load_older_state_dict": "test_a_state_without_the_newer_options_loads_with_their_defaults",
    "test_complex": "test_complex_parameters_move_as_pairs_of_reals",
    "test_complex_2d": "test_complex_parameters_move_as_their_real_and_imaginary_parts",
    "test_deepcopy_copies_all_public_attrs": "test_a_copy_has_all_attributes_and_continues_alike",
    "test_errors": "test_what_is_wrong_is_refused_in_words",
    "test_forloop_goes_right_direction": "test_the_loss_goes_the_right_way",
    "test_fused_does_not_step_if_foundinf": "test_found_inf_leaves_parameters_and_averages_as_they_are",
    "test_grads_are_never_inplaced_into": "test_gradients_are_never_written",
    "test_load_nontensor_step": "test_counters_may_load_as_numbers",
    "test_load_state_dict_post_hook": "test_load_hooks_run_after_loading",
    "test_load_state_dict_pre_hook_and_prepend": "test_the_last_hook_before_loading_wins",
    "test_load_state_dict_pre_post_hook": "test_a_hook_after_loading_sees_what_one_before_it_changed",
    "test_mixed_device_dtype": "test_parameters_of_all_dtypes_train_together",
    "test_non_empty_state": "test_every_stepped_parameter_has_state_and_counts_its_steps",
    "test_optim_infos_do_not_specify_global_cliquey_kwargs": "test_no_input_names_an_implementation",
    "test_optimizer_can_be_printed": "test_it_prints_its_name_and_options",
    "test_param_group_with_lrscheduler_goes_right_direction": "test_schedules_drive_groups_the_right_way",
    "test_param_groups_lr": "test_a_group_with_a_vanishing_rate_keeps_still",
    "test_param_groups_weight_decay": "test_groups_with_and_without_weight_decay_go_the_right_way",
    "test_peak_memory_foreach": "test_a_step_works_in_one_array_beside_the_state",
    "test_save_load_equality_with_weights_only": "test_a_saved_state_loads_equal",
    "test_set_default_dtype_works_with_foreach": "test_state_does_not_depend_on_the_default_dtype",
    "test_state_dict_deterministic": "test_a_loaded_state_continues_bit_for_bit",
    "test_state_dict_post_hook": "test_state_dict_post_hooks_may_change_what_is_returned",
    "test_state_dict_pre_hook": "test_state_dict_pre_hooks_see_the_optimizer_first",
    "test_state_dict_pre_post_hook": "test_state_dict_hooks_run_in_order",
    "test_step_all_hooks": "test_global_hooks_enclose_an_optimizers_own",
    "test_step_is_noop_for_zero_grads": "test_zero_gradients_move_nothing_but_by_weight_decay",
    "test_step_is_noop_when_params_have_no_grad": "test_parameters_without_gradients_keep_still",
    "test_step_iteration": "test_every_stepped_parameter_has_state_and_counts_its_steps",
    "test_step_post_hook": "test_step_hooks_run_until_removed",
    "test_step_pre_hook": "test_step_hooks_run_until_removed",
    "test_tensor_lr": "test_a_tensor_rate_of_any_rank_equals_the_number",
}
"""PyTorch's test: the function here that makes the same claim."""

DESCRIPTIONS = [each.desc for each in all_inputs()]
LEAF_ARRAYS = [
    entry.name for entry in layout(core.Config(), [torch.empty(1)], ((0,),)) if entry.leaf is not None
]
LEAF_STATE = (*LEAF_ARRAYS, "momentum_buffer")

each_input = pytest.mark.parametrize("desc", DESCRIPTIONS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def settings(desc):
    """Fresh constructor arguments of an input: a schedule that writes a tensor rate spoils no other test."""
    (kwargs,) = [each.kwargs for each in all_inputs() if each.desc == desc]
    return kwargs


def grouped(params, desc, **changes):
    """A group with an input's options, which does not take the constructor's `blocks`."""
    kwargs = {**settings(desc), **changes}
    kwargs.pop("blocks", None)
    return {"params": params, **kwargs}


class Problem:
    """Minimize ``|W x + b|^2`` from afar, with ``|x| = 1``: no short run overshoots."""

    def __init__(self, dtype=torch.float32, contiguous=True, sign=1):
        generator = torch.Generator().manual_seed(0)
        weight = 100 * torch.randn(7, 5, 2, dtype=dtype, generator=generator)
        bias = 100 * torch.randn(7, 2, dtype=dtype, generator=generator)
        self.weight, self.bias = Parameter(weight[..., 0]), Parameter(bias[..., 0])
        if contiguous:
            self.weight, self.bias = Parameter(self.weight.data.clone()), Parameter(self.bias.data.clone())
        self.x, self.sign = torch.ones(5, dtype=dtype) / 5**0.5, sign

    @property
    def params(self):
        return [self.weight, self.bias]

    def named(self, named=True):
        return [("layer.weight", self.weight), ("layer.bias", self.bias)] if named else self.params

    def copy(self):
        return copy.deepcopy(self)

    def loss(self):
        return self.sign * (self.weight.mv(self.x) + self.bias).abs().square().sum()

    def backward(self):
        self.weight.grad = self.bias.grad = None
        loss = self.loss()
        loss.backward()
        return loss.item()

    def run(self, optimizer, steps=STEPS, schedulers=()):
        """Losses before the first step and after each."""
        losses = [self.backward()]
        for _ in range(steps):
            optimizer.step()
            losses.append(self.backward())
            advance(schedulers, losses[-1])
        return losses


def advance(schedulers, loss):
    for scheduler in schedulers:
        scheduler.step(*([loss] if isinstance(scheduler, ReduceLROnPlateau) else []))


def goes_right(losses, optimizer):
    first, last = losses[0], losses[-1]
    return last > first if optimizer.param_groups[0]["maximize"] else last < first


def identical(a, b):
    """Equal to the bit, of the same types and dtypes."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return type(a) is type(b) and a == b


def without_names(state_dict):
    groups = [{k: v for k, v in g.items() if k != "param_names"} for g in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def snapshot(params):
    return [param.detach().clone() for param in params]


def trained(desc, steps=3, dtype=torch.float32):
    problem = Problem(dtype)
    optimizer = MLBFGS(problem.params, **settings(desc))
    problem.run(optimizer, steps)
    return problem, optimizer


# The lists, the registration and the errors.


def test_the_lists_name_tests_that_exist():
    assert not COVERED.keys() & NOT_APPLICABLE.keys()
    for name in COVERED.values():
        assert callable(globals()[name])
    for reason in NOT_APPLICABLE.values():
        assert reason.endswith(".")


def test_the_lists_hold_every_test_that_the_installed_pytorch_mentions():
    mentioned = {
        decorator.test_name
        for info in optim_db
        for decorator in info.decorators
        if isinstance(decorator, DecorateInfo)
        and decorator.cls_name == "TestOptimRenewed"
        and decorator.test_name
    }
    assert len(mentioned) > 10
    assert mentioned <= COVERED.keys() | NOT_APPLICABLE.keys()


def test_the_published_list_of_what_does_not_apply_is_this_one():
    page = (Path(__file__).parents[2] / "docs" / "pytorch.md").read_text(encoding="utf-8")
    published = re.findall(r"^\| `(test_\w+)` \| (.+) \|$", page, re.MULTILINE)
    assert dict(published) == NOT_APPLICABLE


def test_no_input_names_an_implementation():
    assert len(set(DESCRIPTIONS)) == len(DESCRIPTIONS)
    for each in INFO.optim_inputs_func("cpu"):
        assert not {"foreach", "fused", "differentiable"} & each.kwargs.keys()


class TestThroughPytorchsDecorator(TestCase):
    @optims([INFO], dtypes=[torch.float32, torch.float64, torch.complex64])
    def test_every_input_moves_its_parameter(self, device, dtype, optim_info):
        for each in optim_info.optim_inputs_func(device, dtype):
            param = Parameter(torch.ones(3, device=device, dtype=dtype))
            param.grad = torch.ones_like(param)
            optim_info.optim_cls([param], **each.kwargs).step()
            assert (param != 1).all(), each.desc


instantiate_device_type_tests(TestThroughPytorchsDecorator, globals(), only_for=("cpu",))


def errors(dtype):
    return INFO.optim_error_inputs_func("cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("desc", [error.optimizer_error_input.desc for error in errors(torch.float32)])
def test_what_is_wrong_is_refused_in_words(desc, dtype):
    (error,) = [error for error in errors(dtype) if error.optimizer_error_input.desc == desc]
    params, kwargs = error.optimizer_error_input.params, error.optimizer_error_input.kwargs
    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            MLBFGS(params, **kwargs)
        return
    optimizer = MLBFGS(params, **kwargs) if error.error_on is OptimizerErrorEnum.STEP_ERROR else None
    with pytest.raises(error.error_type, match=error.error_regex):
        MLBFGS(params, **kwargs) if optimizer is None else optimizer.step()


def test_a_parameter_given_twice_still_trains():
    problem = Problem()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = MLBFGS([*problem.params, problem.bias])
    assert goes_right(problem.run(optimizer), optimizer)


# Direction, schedules and rates.


@each_input
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_the_loss_goes_the_right_way(desc, contiguous):
    problem = Problem(contiguous=contiguous)
    assert problem.weight.is_contiguous() == contiguous
    optimizer = MLBFGS(problem.params, **settings(desc))
    losses = problem.run(optimizer)
    assert goes_right(losses, optimizer)
    assert torch.isfinite(torch.cat([p.flatten() for p in problem.params])).all()


@pytest.mark.parametrize(
    "desc", [desc for desc in DESCRIPTIONS if {"update_every", "preset"} & settings(desc).keys()]
)
def test_short_runs_reach_the_quasi_newton_path(desc):
    problem = Problem(sign=-1 if settings(desc).get("maximize") else 1)
    optimizer = MLBFGS(problem.params, **settings(desc))
    problem.run(optimizer, 6)
    (record,) = optimizer.diagnostics()
    assert (record.pairs > 0).all()


@each_input
@each_schedule
def test_schedules_drive_every_input_the_right_way(desc, schedule):
    problem = Problem()
    optimizer = MLBFGS(problem.params, **settings(desc))
    schedulers = [make(optimizer) for make in SCHEDULES[schedule]]
    assert goes_right(problem.run(optimizer, schedulers=schedulers), optimizer)


@each_schedule
def test_schedules_drive_groups_the_right_way(schedule):
    problem = Problem()
    groups = [{"params": [problem.weight]}, {"params": [problem.bias], "lr": 0.01, "preset": "fit"}]
    optimizer = MLBFGS(groups)
    schedulers = [make(optimizer) for make in SCHEDULES[schedule]]
    assert goes_right(problem.run(optimizer, schedulers=schedulers), optimizer)


@each_schedule
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_each_step_is_as_large_as_its_schedule_says(schedule, as_tensor):
    """Steps have root mean square `lr`, and the rates are those that the schedule gives SGD."""
    problem, reference = Problem(torch.float64), Parameter(torch.ones(2))
    rate = torch.tensor(0.05) if as_tensor else 0.05
    optimizer = MLBFGS(problem.params, lr=rate, **QUASI_NEWTON)
    sgd = torch.optim.SGD([reference], lr=copy.deepcopy(rate), momentum=0.9)
    schedulers, others = ([make(each) for make in SCHEDULES[schedule]] for each in (optimizer, sgd))
    expected = set()
    for _ in range(STEPS):
        loss, before = problem.backward(), snapshot(problem.params)
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.param_groups[0]["momentum"] = 0.0  # some schedules cycle it
        optimizer.step()
        sgd.step()
        moved = torch.cat([(p - b).flatten() for p, b in zip(problem.params, before, strict=True)])
        assert moved.square().mean().sqrt().item() == pytest.approx(lr, rel=1e-5, abs=1e-9)
        advance(schedulers, loss)
        advance(others, loss)
        assert float(optimizer.param_groups[0]["lr"]) == float(sgd.param_groups[0]["lr"])
        expected.add(lr)
    assert len(expected) > 2
    assert isinstance(optimizer.param_groups[0]["lr"], Tensor) == as_tensor


@each_schedule
def test_a_run_resumes_from_the_states_of_optimizer_and_schedule(schedule):
    problem = Problem()
    optimizer = MLBFGS(problem.params, **QUASI_NEWTON)
    schedulers = [make(optimizer) for make in SCHEDULES[schedule]]
    problem.run(optimizer, 7, schedulers)
    twin = problem.copy()
    resumed = MLBFGS(twin.params)
    others = [make(resumed) for make in SCHEDULES[schedule]]
    for scheduler, other in zip(schedulers, others, strict=True):
        other.load_state_dict(copy.deepcopy(scheduler.state_dict()))
    resumed.load_state_dict(optimizer.state_dict())
    assert problem.run(optimizer, 7, schedulers) == twin.run(resumed, 7, others)
    assert identical(snapshot(problem.params), snapshot(twin.params))


@each_input
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_tensor_rate_of_any_rank_equals_the_number(desc, rank):
    results = []
    for lr in (0.03, torch.tensor(0.03, dtype=torch.float64).reshape([1] * rank)):
        problem = Problem(torch.float64)
        scalar = Parameter(torch.tensor(2.0, dtype=torch.float64))
        optimizer = MLBFGS([*problem.params, scalar], **{**settings(desc), "lr": lr})
        for _ in range(5):
            problem.backward()
            scalar.grad = 2 * scalar.detach()
            optimizer.step()
        results.append([*snapshot(problem.params), scalar.detach()])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("tensor_first", [True, False])
def test_a_group_may_hold_a_tensor_rate_beside_a_number(tensor_first):
    rates = (torch.tensor(0.05, dtype=torch.float64), 0.05)
    results = []
    for first, last in (rates if tensor_first else rates[::-1], (0.05, 0.05)):
        problem = Problem(torch.float64)
        optimizer = MLBFGS(
            [{"params": [problem.weight], "lr": first}, {"params": [problem.bias], "lr": last}],
            **QUASI_NEWTON,
        )
        problem.run(optimizer, 6)
        results.append(snapshot(problem.params))
    torch.testing.assert_close(*results)


@each_input
def test_groups_with_and_without_weight_decay_go_the_right_way(desc):
    problem = Problem()
    groups = [grouped([problem.weight], desc), grouped([problem.bias], desc, weight_decay=0.0)]
    optimizer = MLBFGS(groups)
    assert goes_right(problem.run(optimizer), optimizer)


@each_input
def test_a_group_with_a_vanishing_rate_keeps_still(desc):
    problem, still = Problem(), Parameter(torch.ones(2))
    optimizer = MLBFGS([grouped(problem.params, desc), {"params": [still]}], lr=1e-28)
    lr = settings(desc).get("lr", 0.1)
    optimizer.param_groups[0]["lr"] = lr
    losses = [problem.backward()]
    for _ in range(STEPS):
        still.grad = torch.rand(2)
        optimizer.step()
        losses.append(problem.backward())
    assert goes_right(losses, optimizer)
    assert torch.equal(still, torch.ones(2))


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
def test_weight_decay_shrinks_the_parameter_or_joins_the_gradient(decoupled):
    """One first step of the bare formulas, whose direction is the gradient, against its formula."""
    plain = {"preset": "formulas", "momentum": 0.0, "lr": 0.1, "weight_decay": 0.2}
    plain["decoupled_weight_decay"] = decoupled
    param = Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    param.grad = torch.tensor([0.1, 0.2], dtype=torch.float64)
    MLBFGS([param], **plain).step()
    start, grad = param.new_tensor([3.0, -4.0]), param.new_tensor([0.1, 0.2])
    expected = (1 - 0.1 * 0.2) * start - 0.1 * grad if decoupled else start - 0.1 * (grad + 0.2 * start)
    torch.testing.assert_close(param.detach(), expected)


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
def test_maximizing_a_loss_is_minimizing_its_negative(decoupled):
    results = []
    for maximize in (True, False):
        problem = Problem(torch.float64)
        optimizer = MLBFGS(
            problem.params,
            maximize=maximize,
            weight_decay=0.1,
            decoupled_weight_decay=decoupled,
            **QUASI_NEWTON,
        )
        for _ in range(8):
            problem.backward()
            for param in problem.params:
                param.grad.mul_(1 if maximize else -1)
            optimizer.step()
        results.append(snapshot(problem.params))
    assert identical(*results)


@each_input
def test_capturable_takes_the_same_steps(desc):
    """Also where a step brings no gradients, and where a parameter is frozen for two steps."""
    results = []
    for capturable in (True, False):
        problem = Problem(torch.float64)
        optimizer = MLBFGS(problem.params, **{**settings(desc), "capturable": capturable})
        for number in range(8):
            problem.backward()
            if number == 2:
                optimizer.zero_grad()
            if number in (4, 5):
                problem.bias.grad = None
            optimizer.step()
            results.append(snapshot(problem.params))
    torch.testing.assert_close(results[:8], results[8:])


# Complex parameters, dtypes and layouts.


@each_input
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_parameters_move_as_pairs_of_reals(desc, dtype):
    generator = torch.Generator().manual_seed(2)
    shapes = [((4, 3), dtype), ((4,), dtype), ((), dtype), ((4, 3), torch.empty((), dtype=dtype).real.dtype)]
    complexes = [Parameter(torch.randn(s, dtype=d, generator=generator)) for s, d in shapes]
    reals = [Parameter((torch.view_as_real(p) if p.is_complex() else p).detach().clone()) for p in complexes]
    optimizers = [MLBFGS(params, **settings(desc)) for params in (complexes, reals)]
    for _ in range(6):
        for real, param in zip(reals, complexes, strict=True):
            real.grad = torch.randn(real.shape, dtype=real.dtype, generator=generator) + real.detach()
            param.grad = torch.view_as_complex(real.grad) if param.is_complex() else real.grad
        for optimizer in optimizers:
            optimizer.step()
        for real, param in zip(reals, complexes, strict=True):
            got = torch.view_as_real(param) if param.is_complex() else param
            # The two lie in memory differently, and textbook L-BFGS amplifies rounding.
            amplified = got.dtype == torch.float32 and settings(desc).get("preset") == "lbfgs"
            bounds = {"rtol": 1e-4, "atol": 1e-4} if amplified else {}
            torch.testing.assert_close(got, real, **bounds)
    m = optimizers[0].param_groups[0]["history_size"]
    for param in complexes[:3]:
        entry = optimizers[0].state[param]
        assert entry["history"].shape == (2, m, *param.shape, 2)
        assert entry["mean_grads"].dtype == param.real.dtype


@pytest.mark.parametrize("desc", [desc for desc in DESCRIPTIONS if "blocks" not in settings(desc)])
def test_complex_parameters_move_as_their_real_and_imaginary_parts(desc):
    """On Rosenbrock's function of two complex numbers, in one block."""

    def rosenbrock(z):
        return ((1 - z[0]) ** 2 + 100 * (z[1] - z[0] ** 2) ** 2).abs()

    generator = torch.Generator().manual_seed(3)
    whole = Parameter(torch.randn(2, dtype=torch.complex128, generator=generator))
    parts = [Parameter(whole.real.detach().clone()), Parameter(whole.imag.detach().clone())]
    optimizers = [MLBFGS(params, **{**settings(desc), "lr": 1e-3}) for params in ([whole], parts)]
    for _ in range(4):
        for optimizer, value in zip(optimizers, (whole, torch.complex(*parts)), strict=True):
            optimizer.zero_grad()
            rosenbrock(value).backward()
            optimizer.step()
        torch.testing.assert_close(whole.detach(), torch.complex(*parts).detach())


def test_parameters_of_all_dtypes_train_together():
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
    params = [Parameter(torch.full((2, 3), 2.0, dtype=dtype)) for dtype in dtypes]
    optimizer = MLBFGS(params, lr=0.05, **QUASI_NEWTON)
    for _ in range(7):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    wide = {torch.float64, torch.complex128}
    for param, dtype in zip(params, dtypes, strict=True):
        assert param.dtype == dtype
        assert (param.abs() < 2).all()
        expected = torch.float64 if dtype in wide else torch.float32
        for name in LEAF_STATE:
            assert optimizer.state[param][name].dtype == expected, name


@pytest.mark.parametrize("desc", ["default", "quasi-Newton", "no preconditioner"])
def test_coordinates_without_gradient_do_not_stop_a_block_of_two_dtypes(desc):
    params = [Parameter(torch.tensor([2.0, 0.0], dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    optimizer = MLBFGS(params, **settings(desc))
    for _ in range(3):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    for param in params:
        assert param[0] < 2
        assert param[1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_state_does_not_depend_on_the_default_dtype(dtype):
    _, expected = trained("quasi-Newton", 6)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        _, optimizer = trained("quasi-Newton", 6)
    finally:
        torch.set_default_dtype(before)
    assert identical(optimizer.state_dict(), expected.state_dict())


@each_input
def test_layouts_of_parameters_and_gradients_do_not_matter(desc):
    """Channels-last, transposed and expanded tensors train as their contiguous copies."""
    generator = torch.Generator().manual_seed(4)
    image = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator)
    matrix = torch.randn(6, 4, dtype=torch.float64, generator=generator)
    odd = [
        Parameter(image.to(memory_format=torch.channels_last)),
        Parameter(matrix.t()),
        Parameter(torch.ones(5, dtype=torch.float64)),
    ]
    plain = [Parameter(p.detach().clone(memory_format=torch.contiguous_format)) for p in odd]
    strides = [param.stride() for param in odd]
    optimizers = [MLBFGS(params, **settings(desc)) for params in (odd, plain)]
    for number in range(6):
        for param in (*odd[:2], *plain[:2]):
            param.grad = (param.detach() * (number + 1)).contiguous()
        odd[2].grad = torch.tensor(float(number + 1), dtype=torch.float64).expand(5)
        plain[2].grad = odd[2].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close([p.detach().contiguous() for p in odd], snapshot(plain))
    assert [param.stride() for param in odd] == strides


# What leaves parameters as they are.


@each_input
def test_parameters_without_gradients_keep_still(desc):
    params = [torch.randn(2, 3), Parameter(torch.randn(2))]
    before, calls = snapshot(params), []
    optimizer = MLBFGS(params, **settings(desc))

    def closure():
        calls.append(torch.is_grad_enabled())
        return torch.tensor([1.0])

    assert optimizer.step() is None
    assert optimizer.step(closure).item() == 1
    assert calls == [True]
    assert identical(snapshot(params), before)
    assert not optimizer.state


@each_input
def test_parameters_that_lose_their_gradients_keep_still(desc):
    problem, optimizer = trained(desc)
    before = snapshot(problem.params)
    optimizer.zero_grad()
    optimizer.step()
    assert identical(snapshot(problem.params), before)


@each_input
def test_zero_gradients_move_nothing_but_by_weight_decay(desc):
    param = Parameter(torch.randn(5, 1, dtype=torch.float64))
    before = param.detach().clone()
    param.grad = torch.zeros_like(param)
    optimizer = MLBFGS([param], **settings(desc))
    optimizer.step()
    group = optimizer.param_groups[0]
    if group["weight_decay"] == 0:
        assert torch.equal(param, before)
    elif group["decoupled_weight_decay"]:
        torch.testing.assert_close(param.detach(), before * (1 - float(group["lr"]) * group["weight_decay"]))
    else:
        assert param.norm() < before.norm()  # also where a loss is maximized


@each_input
def test_non_finite_gradients_move_nothing(desc):
    problem, optimizer = trained(desc)
    before = snapshot(problem.params)
    problem.bias.grad[0] = torch.inf
    optimizer.step()
    assert identical(snapshot(problem.params), before)
    losses = problem.run(optimizer)
    assert goes_right(losses, optimizer)


def test_empty_groups_are_kept_and_change_nothing():
    problem, twin = Problem(), Problem()
    optimizer = MLBFGS([{"params": []}, {"params": problem.params}], **QUASI_NEWTON)
    optimizer.add_param_group({"params": [], "lr": 0.5, "preset": "fit"})
    plain = MLBFGS(twin.params, **QUASI_NEWTON)
    problem.run(optimizer, 5)
    twin.run(plain, 5)
    assert identical(snapshot(problem.params), snapshot(twin.params))
    assert len(optimizer.state_dict()["param_groups"]) == 3
    optimizer.load_state_dict(optimizer.state_dict())
    assert goes_right(problem.run(optimizer), optimizer)


@each_input
def test_groups_do_not_change_the_defaults(desc):
    optimizer = MLBFGS([Parameter(torch.ones(2))], **settings(desc))
    before = copy.deepcopy(optimizer.defaults)
    for params in ([], [Parameter(torch.ones(2))]):
        optimizer.add_param_group(
            {"params": params, "lr": 0.7, "momentum": 0.1, "maximize": True, "history_size": 3, "beta": 0.5}
        )
    assert identical(optimizer.defaults, before)
    assert [group["history_size"] for group in optimizer.param_groups[1:]] == [3, 3]


@each_input
def test_gradients_are_never_written(desc):
    problem = Problem(contiguous=False)
    extra = Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = MLBFGS([*problem.params, extra], **settings(desc))
    for _ in range(4):
        problem.backward()
        extra.grad = torch.full_like(extra, 1 + 2j)
        before = [(p.grad, p.grad._version, p.grad.clone()) for p in (*problem.params, extra)]
        optimizer.step()
        for param, (grad, version, values) in zip((*problem.params, extra), before, strict=True):
            assert param.grad is grad
            assert grad._version == version
            assert torch.equal(grad, values)


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad_drops_or_clears_gradients(to_none):
    problem, optimizer = trained("default")
    optimizer.zero_grad(set_to_none=to_none)
    for param in problem.params:
        assert param.grad is None if to_none else not param.grad.any()


# State dictionaries.


@each_input
@pytest.mark.parametrize("named", [(a, b) for a in (True, False) for b in (True, False)], ids=str)
def test_a_loaded_state_continues_bit_for_bit(desc, named):
    problem = Problem()
    optimizer = MLBFGS(problem.named(named[0]), **settings(desc))
    problem.run(optimizer, 6)
    twin = problem.copy()
    resumed = MLBFGS(twin.named(named[1]), **settings(desc))
    saved = copy.deepcopy(optimizer.state_dict())
    given = copy.deepcopy(saved)
    resumed.load_state_dict(given)
    assert identical(given, saved)
    for _ in range(6):
        problem.run(optimizer, 1)
        twin.run(resumed, 1)
        assert identical(snapshot(problem.params), snapshot(twin.params))
    states = [without_names(each.state_dict()) for each in (optimizer, resumed)]
    assert identical(*states)
    resumed.param_groups.extend(resumed.param_groups)  # repeated parameters keep their numbers
    assert identical(without_names(resumed.state_dict())["param_groups"][-1], states[0]["param_groups"][-1])


@each_input
@pytest.mark.parametrize("named", [(a, b) for a in (True, False) for b in (True, False)], ids=str)
def test_state_passes_between_named_and_unnamed_parameters(desc, named):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    images = torch.rand(1, 2, 4, 4)

    def run(optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(images).square().sum().backward()
            optimizer.step()

    first, last = (
        MLBFGS(model.named_parameters() if given else model.parameters(), **settings(desc)) for given in named
    )
    run(first, 3)
    last.load_state_dict(copy.deepcopy(first.state_dict()))
    before = snapshot(model.parameters())
    run(last, 1)
    assert not identical(snapshot(model.parameters()), before)
    names = last.state_dict()["param_groups"][0].get("param_names")
    assert names == (["0.weight", "0.bias", "1.weight", "1.bias"] if any(named) else None)


@each_input
def test_a_state_without_the_newer_options_loads_with_their_defaults(desc):
    problem, optimizer = trained(desc)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for option in (*INFO.not_og_supported_flags, "shrinkage"):
            del group[option]
    optimizer.load_state_dict(saved)
    (group,) = optimizer.param_groups
    assert (group["maximize"], group["decoupled_weight_decay"], group["capturable"]) == (False, True, False)
    assert (group["nesterov"], group["shrinkage"]) == (False, 1.0)
    assert goes_right(problem.run(optimizer), optimizer)


@each_input
def test_a_pickle_without_the_newer_options_takes_their_defaults(desc):
    problem, optimizer = trained(desc)
    old = copy.deepcopy((problem, optimizer.__getstate__()))
    problem, state = old
    for options in (state["defaults"], *state["param_groups"]):
        for option in (*INFO.not_og_supported_flags, "shrinkage"):
            del options[option]
    revived = MLBFGS.__new__(MLBFGS)
    revived.__setstate__(state)
    (group,) = revived.param_groups
    assert (group["maximize"], group["decoupled_weight_decay"], group["capturable"]) == (False, True, False)
    assert (group["nesterov"], group["shrinkage"]) == (False, 1.0)
    assert goes_right(problem.run(revived), revived)
    revived.add_param_group({"params": [Parameter(torch.ones(2))]})
    assert revived.param_groups[1]["maximize"] is False


@each_input
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_a_saved_state_loads_equal(desc, named, dtype):
    problem = Problem(dtype)
    optimizer = MLBFGS(problem.named(named), **settings(desc))
    problem.run(optimizer, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    for weights_only in (True, False):
        file.seek(0)
        loaded = torch.load(file, weights_only=weights_only)
        assert identical(loaded, optimizer.state_dict())
        other = MLBFGS(problem.named(named), **settings(desc))
        other.load_state_dict(loaded)
        assert identical(other.state_dict(), optimizer.state_dict())


@each_input
def test_loading_shares_no_memory_with_what_was_loaded(desc):
    problem, optimizer = trained(desc)
    twin = problem.copy()
    other = MLBFGS(twin.params, **settings(desc))
    other.load_state_dict(optimizer.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    twin.run(other, 3)
    assert identical(optimizer.state_dict()["state"], saved["state"])


@each_input
def test_counters_may_load_as_numbers(desc):
    problem, optimizer = trained(desc)
    saved = copy.deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["counters"] = entry["counters"].tolist()
    optimizer.load_state_dict(saved)
    problem.run(optimizer, 1)
    assert int(optimizer.diagnostics()[0].step) == 4


@each_input
def test_state_that_is_no_tensor_is_kept(desc):
    problem, optimizer = trained(desc)
    optimizer.state["note"] = {"epoch": 3}
    optimizer.state[problem.bias]["label"] = {"rates": [0.1, 2], "flag": True}
    twin = problem.copy()
    other = MLBFGS(twin.params, **settings(desc))
    other.load_state_dict(optimizer.state_dict())
    problem.run(optimizer, 3)
    twin.run(other, 3)
    assert identical(snapshot(problem.params), snapshot(twin.params))
    assert other.state["note"] == {"epoch": 3}
    assert other.state[twin.bias]["label"] == {"rates": [0.1, 2], "flag": True}


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[2]], "different number of parameter groups"),
        ([[2], [2, 3]], "doesn't match the size of optimizer's group"),
    ],
)
def test_a_state_of_other_groups_is_refused(groups, words):
    def make(sizes):
        return MLBFGS([{"params": [Parameter(torch.ones(n)) for n in group]} for group in sizes])

    optimizer = make([[2], [3]])
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(make(groups).state_dict())


@each_input
def test_every_stepped_parameter_has_state_and_counts_its_steps(desc):
    problem = Problem()
    optimizer = MLBFGS(problem.params, **settings(desc))
    for number in range(1, 4):
        problem.run(optimizer, 1)
        assert list(optimizer.state) == problem.params
        for entry in optimizer.state.values():
            assert unpack(entry)["step"].item() == number
            assert entry["counters"].dtype == torch.int32
            assert all(name in entry for name in LEAF_ARRAYS if name != "exp_avg_sq")


@each_input
def test_it_prints_its_name_and_options(desc):
    problem = Problem()
    optimizer = MLBFGS([{"params": [problem.weight]}, {"params": [problem.bias]}], **settings(desc))
    text = repr(optimizer)
    assert text.startswith("MLBFGS (")
    for option in optimizer.defaults:
        assert text.count(f"    {option}: ") == 2


# Hooks, copies and profiles.


def remember(optimizer):
    optimizer.state["test"] = 1


def forget(optimizer, state_dict):
    state_dict["remembered"] = state_dict["state"].pop("test", 0) == 1
    return state_dict


@each_input
def test_state_dict_pre_hooks_see_the_optimizer_first(desc):
    _, optimizer = trained(desc)
    optimizer.register_state_dict_pre_hook(remember)
    assert optimizer.state_dict()["state"]["test"] == 1


@each_input
def test_state_dict_post_hooks_may_change_what_is_returned(desc):
    _, optimizer = trained(desc)
    optimizer.register_state_dict_post_hook(forget)
    assert optimizer.state_dict()["remembered"] is False
    optimizer.register_state_dict_post_hook(lambda *_: {"replaced": True})
    assert optimizer.state_dict() == {"replaced": True}


@each_input
def test_state_dict_hooks_run_in_order(desc):
    _, optimizer = trained(desc)
    optimizer.register_state_dict_pre_hook(remember)
    optimizer.register_state_dict_post_hook(forget)
    returned = optimizer.state_dict()
    assert returned["remembered"] is True
    assert "test" not in returned["state"]
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(test=2), prepend=True)
    assert optimizer.state_dict()["remembered"] is True
    optimizer.register_state_dict_pre_hook(lambda o: o.state.update(test=2))
    assert optimizer.state_dict()["remembered"] is False


def change_lr(lr, returns_new):
    def hook(_, state_dict):
        state_dict = copy.deepcopy(state_dict) if returns_new else state_dict
        state_dict["param_groups"][0]["lr"] = lr
        return state_dict if returns_new else None

    return hook


@each_input
@pytest.mark.parametrize("prepend", [True, False])
def test_the_last_hook_before_loading_wins(desc, prepend):
    _, optimizer = trained(desc)
    optimizer.register_load_state_dict_pre_hook(change_lr(0.002, returns_new=False))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(change_lr(0.003, returns_new=True), prepend=prepend)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] == (0.002 if prepend else 0.003)


@each_input
def test_hooks_before_loading_may_change_tensors(desc):
    problem, optimizer = trained(desc)

    def hook(_, state_dict):
        new = copy.deepcopy(state_dict)
        for entry in new["state"].values():
            entry["mean_grads"] = torch.full_like(entry["mean_grads"], 7.0)
        return new

    optimizer.register_load_state_dict_pre_hook(hook)
    optimizer.load_state_dict(optimizer.state_dict())
    for param in problem.params:
        assert (optimizer.state[param]["mean_grads"] == 7).all()


@each_input
@pytest.mark.parametrize("prepend", [True, False])
def test_load_hooks_run_after_loading(desc, prepend):
    _, optimizer = trained(desc)
    saved, seen = copy.deepcopy(optimizer.state_dict()), []
    saved["param_groups"][0]["lr"] = 0.004
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("other"), prepend=prepend)
    optimizer.load_state_dict(saved)
    assert seen == (["other", 0.004] if prepend else [0.004, "other"])


@each_input
def test_a_hook_after_loading_sees_what_one_before_it_changed(desc):
    _, optimizer = trained(desc)
    seen = []
    optimizer.register_load_state_dict_pre_hook(change_lr(0.003, returns_new=True))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.param_groups[0]["lr"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0.003]


def test_loading_leaves_no_hook_behind():
    _, optimizer = trained("quasi-Newton")
    calls = []
    handle = optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append(1))
    optimizer.load_state_dict(optimizer.state_dict())
    handle.remove()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == [1]
    assert not optimizer._optimizer_load_state_dict_pre_hooks


@each_input
def test_step_hooks_run_until_removed(desc):
    problem, optimizer = trained(desc)
    seen = []
    before = optimizer.register_step_pre_hook(lambda *_: seen.append(("before", problem.bias._version)))
    after = optimizer.register_step_post_hook(lambda *_: seen.append(("after", problem.bias._version)))
    optimizer.step()
    optimizer.step()
    assert [name for name, _ in seen] == ["before", "after"] * 2
    assert all(first[1] < last[1] for first, last in pairwise(seen) if last[0] == "after")
    before.remove()
    after.remove()
    optimizer.step()
    assert len(seen) == 4


def test_a_step_hook_may_give_the_closure():
    problem, optimizer = trained("default")
    optimizer.register_step_pre_hook(lambda o, _args, kwargs: ((o, problem.backward), kwargs))
    assert optimizer.step() > 0


@each_input
def test_global_hooks_enclose_an_optimizers_own(desc):
    problem, optimizer = trained(desc)
    sgd, seen = torch.optim.SGD(problem.params), []
    for each in (optimizer, sgd):
        each.register_step_pre_hook(lambda *_: seen.append("own before"))
        each.register_step_post_hook(lambda *_: seen.append("own after"))
    order = ["before", "own before", "own after", "after"]
    with (
        register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ):
        for each in (optimizer, sgd, optimizer):
            each.step()
    assert seen == 3 * order
    optimizer.step()
    assert seen[12:] == order[1:3]


@each_input
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_all_attributes_and_continues_alike(desc, duplicate):
    problem, optimizer = trained(desc)
    twin, other = duplicate((problem, optimizer))
    assert {k for k in vars(other) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    assert identical(other.state_dict(), optimizer.state_dict())
    problem.run(optimizer, 4)
    twin.run(other, 4)
    assert identical(snapshot(twin.params), snapshot(problem.params))
    assert identical(other.state_dict(), optimizer.state_dict())


def test_its_last_reference_frees_it():
    problem, optimizer = trained("quasi-Newton")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    entry = next(iter(optimizer.state.values()))
    watched = [weakref.ref(optimizer), weakref.ref(scheduler), weakref.ref(entry["history"])]
    gc.disable()
    try:
        del optimizer, scheduler, entry
        assert [each() for each in watched] == [None] * 3
    finally:
        gc.enable()
    assert torch.isfinite(problem.bias).all()


def test_profiles_show_steps_by_name():
    problem, optimizer = trained("quasi-Newton")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(2):
            problem.backward()
            optimizer.step()
            optimizer.zero_grad()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["Optimizer.step#MLBFGS.step"] == 2
    assert counts["Optimizer.zero_grad#MLBFGS.zero_grad"] == 2


# Memory.


class Allocations(TorchDispatchMode):
    """Bytes of the tensors made inside and alive, now and at the most."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = id(storage)
            if key not in given and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key)
                self.peak = max(self.peak, self.held)
        return result

    @property
    def held(self):
        return sum(self.alive.values())


def storage_bytes(tree):
    storages = [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@each_input
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16], ids=str)
def test_state_takes_the_planned_bytes(desc, dtype):
    params = [Parameter(torch.ones(20, 5, dtype=dtype)), Parameter(torch.ones(20, dtype=dtype))]
    optimizer = MLBFGS(params, **settings(desc))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    group = optimizer.param_groups[0]
    config = core.Config(**{name: group[name] for name in core.Config().__dataclass_fields__})
    leaves = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    blocks = ((0,), (1,)) if "blocks" in settings(desc) else ((0, 1),)
    plan = core.plan_memory(config, [leaf.detach() for leaf in leaves], blocks)
    item = 8 if dtype == torch.float64 else 4
    momentum = sum(leaf.numel() for leaf in leaves) * item if group["momentum"] else 0
    entries = optimizer.state.values()
    assert all(("momentum_buffer" in entry) == (group["momentum"] > 0) for entry in entries)
    parameter_sized = [entry[name] for entry in entries for name in LEAF_STATE if name in entry]
    held = storage_bytes(list(entries))
    arrays = plan.history + plan.averages + plan.preconditioner
    assert sum(t.numel() * t.element_size() for t in parameter_sized) == arrays + momentum
    repeated = 80 * (len(blocks) - 1)  # each further block has the numbers of the whole too
    assert arrays + momentum <= held <= plan.total + momentum + repeated


@each_input
def test_a_step_works_in_one_array_beside_the_state(desc):
    """In one of the parameter's size, one more for each change of the gradient, and a few tiles."""
    param = Parameter(torch.ones(2**22))
    optimizer = MLBFGS([param], **{**settings(desc), "history_size": 2})
    group, size, tiles = optimizer.param_groups[0], 4 * 2**22, 12 * 4 * 2**20
    coupled = group["weight_decay"] > 0 and not group["decoupled_weight_decay"]
    kept = []
    with Allocations() as allocations:
        for number in range(4):
            param.grad = torch.full_like(param, number + 1.0)
            allocations.peak = 0
            optimizer.step()
            known = size + storage_bytes(optimizer.state[param])  # the gradient and the state
            kept.append(allocations.held - known)
            assert 0 < allocations.peak - known < (1 + group["maximize"] + coupled) * size + tiles
    assert 0 <= kept[1] < size + tiles
    assert kept[1] == kept[2] == kept[3]


# Loss scaling and weight averaging.


@each_input
def test_found_inf_leaves_parameters_and_averages_as_they_are(desc):
    problem, optimizer = trained(desc)
    assert optimizer._step_supports_amp_scaling is True
    before = snapshot(problem.params)
    kept = copy.deepcopy([{k: e[k] for k in LEAF_STATE if k in e} for e in optimizer.state.values()])
    for scale in (None, torch.ones(())):
        optimizer.grad_scale, optimizer.found_inf = scale, torch.ones(())
        optimizer.step()
    assert identical(snapshot(problem.params), before)
    assert identical([{k: e[k] for k in LEAF_STATE if k in e} for e in optimizer.state.values()], kept)


@each_input
def test_grad_scale_divides_the_gradients(desc):
    problem, optimizer = trained(desc)
    twin, other = copy.deepcopy((problem, optimizer))
    optimizer.step()
    twin.backward()
    for param in twin.params:
        param.grad.mul_(8)
    other.grad_scale, other.found_inf = torch.tensor(8.0), torch.zeros(())
    other.step()
    assert identical(snapshot(problem.params), snapshot(twin.params))


@each_input
@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled first", "scaled"])
def test_a_grad_scaler_changes_no_step_and_skips_overflows(desc, unscale):
    problem, twin = Problem(), Problem()
    plain, scaled = (MLBFGS(each.params, **settings(desc)) for each in (problem, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(5):
        overflow = number == 2
        twin.weight.grad = twin.bias.grad = None
        scaler.scale(twin.loss()).backward()
        if overflow:
            twin.bias.grad[0] = torch.inf
        if unscale:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        if not overflow:
            problem.backward()
            plain.step()
        assert identical(snapshot(problem.params), snapshot(twin.params))
    assert scaler.get_scale() == 2.0**9
    assert not hasattr(scaled, "found_inf")


@pytest.mark.parametrize("desc", ["default", "quasi-Newton", "fit"])
def test_averaged_models_hold_the_mean_of_its_steps(desc):
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = MLBFGS(model.named_parameters(), **settings(desc))
    averaged, scheduler = AveragedModel(model), SWALR(optimizer, swa_lr=0.02, anneal_epochs=4)
    data = [torch.randn(8, 3) for _ in range(6)]
    seen = []
    for batch in data:
        optimizer.zero_grad()
        (model(batch) - batch.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        scheduler.step()
        averaged.update_parameters(model)
        seen.append(snapshot(model.parameters()))
    means = [torch.stack(steps).mean(0) for steps in zip(*seen, strict=True)]
    torch.testing.assert_close(snapshot(averaged.parameters()), means)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    assert not identical(seen[0], seen[-1])
    update_bn(data, averaged)
    inner = torch.cat([averaged.module[0](batch) for batch in data]).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, inner.detach())
