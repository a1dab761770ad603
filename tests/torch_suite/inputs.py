"""`MLBFGS` described for PyTorch's optimizer tests: constructor inputs, schedules and errors."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import Parameter
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import SWALR
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)

from mlbfgs_torch import MLBFGS

QUASI_NEWTON = {"update_every": 1, "history_size": 2, "adaptive": False}
"""A pair at every step, so that a few steps fill and overwrite the history."""

STEPS = 20
"""Steps of a short run; `SCHEDULES` end with it."""


def optim_inputs(device, dtype=None):
    """Fresh constructor inputs; each call makes new tensors."""
    configurations = {
        "default": {},
        "number lr": {"lr": 0.02},
        "tensor lr": {"lr": torch.tensor(0.05, device=device)},
        "no momentum": {"momentum": 0.0},
        "heavy-ball momentum": {"nesterov": False},
        "decoupled weight decay": {"weight_decay": 0.1},
        "coupled weight decay": {"weight_decay": 0.1, "decoupled_weight_decay": False},
        "maximize": {"maximize": True},
        "maximize with coupled weight decay": {
            **QUASI_NEWTON,
            "maximize": True,
            "weight_decay": 0.1,
            "decoupled_weight_decay": False,
        },
        "capturable": {"capturable": True},
        "capturable with tensor lr": {
            **QUASI_NEWTON,
            "capturable": True,
            "lr": torch.tensor(0.05, device=device),
        },
        "quasi-Newton": QUASI_NEWTON,
        "paper": {"preset": "paper", "update_every": 2},
        "formulas": {"preset": "formulas", "update_every": 2},
        "lbfgs": {"preset": "lbfgs"},
        "fit": {"preset": "fit", "update_every": 2, "adaptive": False},
        "parameter blocks": {**QUASI_NEWTON, "blocks": "parameter"},
        "bfloat16 history": {**QUASI_NEWTON, "history_dtype": "bfloat16"},
        "no preconditioner": {**QUASI_NEWTON, "preconditioner": "none"},
    }
    return [OptimizerInput(None, dict(kwargs), desc) for desc, kwargs in configurations.items()]


def error_inputs(device, dtype):
    """PyTorch's errors of every optimizer, one of them in this library's words, and its own."""
    common = get_error_inputs_for_all_optims(device, dtype)
    for error in common:
        if error.error_regex == "Tensor lr must be 1-element":
            error.error_type, error.error_regex = TypeError, r"`lr` must be a number, got a tensor of shape"
    param = partial(torch.ones, 2, device=device, dtype=dtype)
    settings = [
        ({"lr": -1.0}, ValueError, "`lr` must be finite and >= 0, got -1.0"),
        ({"lr": float("nan")}, ValueError, "`lr` must be finite and >= 0, got nan"),
        ({"lr": "0.1"}, TypeError, "`lr` must be a number, got '0.1'"),
        ({"momentum": 1.0}, ValueError, r"`momentum` must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -0.1}, ValueError, "`weight_decay` must be finite and >= 0, got -0.1"),
        ({"maximize": 1}, TypeError, "`maximize` must be a bool, got 1"),
        ({"nesterov": 1}, TypeError, "`nesterov` must be a bool, got 1"),
        ({"capturable": 1}, TypeError, "`capturable` must be a bool, got 1"),
        ({"decoupled_weight_decay": 1}, TypeError, "`decoupled_weight_decay` must be a bool, got 1"),
        ({"history_size": -1}, ValueError, "`history_size` must be >= 0, got -1"),
        ({"update_every": 0}, ValueError, "`update_every` must be >= 1, got 0"),
        ({"beta": 1.0}, ValueError, r"`beta` must be None or in \[0, 1\), got 1.0"),
        ({"preset": "best"}, ValueError, "`preset` must be None or one of"),
        ({"blocks": "layers"}, ValueError, "`blocks` must be .*, got 'layers'"),
        ({"foreach": True}, TypeError, "unknown setting `foreach`"),
        ({"fused": True}, TypeError, "unknown setting `fused`"),
        ({"differentiable": True}, TypeError, "unknown setting `differentiable`"),
    ]
    parameters = [
        ("no parameters", [], ValueError, "empty parameter list"),
        ("a set", [{"params": {param()}}], TypeError, "ordered collections"),
        ("integers", [torch.ones(2, dtype=torch.int64)], TypeError, "int64"),
        ("not a tensor", [1.0], TypeError, "can only optimize Tensors"),
        ("not a leaf", [param(requires_grad=True) * 2], ValueError, "can't optimize a non-leaf Tensor"),
        ("repeated name", [("w", param()), ("w", param())], ValueError, "must be distinct"),
    ]
    table = Parameter(param())
    table.grad = torch.zeros_like(table).to_sparse()
    return [
        *common,
        *(
            ErrorOptimizerInput(
                OptimizerInput([param()], kwargs, f"{next(iter(kwargs))}={next(iter(kwargs.values()))!r}"),
                error_type=kind,
                error_regex=words,
            )
            for kwargs, kind, words in settings
        ),
        *(
            ErrorOptimizerInput(OptimizerInput(params, {}, desc), error_type=kind, error_regex=words)
            for desc, params, kind, words in parameters
        ),
        ErrorOptimizerInput(
            OptimizerInput([table], {}, "sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="does not support sparse gradients",
        ),
    ]


SCHEDULES = {
    "step": [lambda o: schedules.StepLR(o, step_size=5, gamma=0.5)],
    "exponential": [lambda o: schedules.ExponentialLR(o, gamma=0.9)],
    "warm-up": [lambda o: schedules.LinearLR(o, start_factor=0.2, total_iters=4)],
    "constant, then exponential": [
        lambda o: schedules.ConstantLR(o, factor=0.4, total_iters=4),
        lambda o: schedules.ExponentialLR(o, gamma=0.9),
    ],
    "polynomial": [lambda o: schedules.PolynomialLR(o, total_iters=STEPS, power=0.9)],
    "cosine": [lambda o: schedules.CosineAnnealingLR(o, T_max=STEPS)],
    "warm restarts": [lambda o: schedules.CosineAnnealingWarmRestarts(o, T_0=7)],
    "one cycle": [lambda o: schedules.OneCycleLR(o, max_lr=0.1, total_steps=STEPS + 1)],
    "cyclic": [lambda o: schedules.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=5)],
    "lambda": [lambda o: schedules.LambdaLR(o, lambda epoch: 0.95**epoch)],
    "multiplicative": [lambda o: schedules.MultiplicativeLR(o, lambda _: 0.95)],
    "milestones and plateau": [
        lambda o: schedules.MultiStepLR(o, milestones=[4, 12], gamma=0.5),
        lambda o: schedules.ReduceLROnPlateau(o, patience=0, factor=0.5, threshold=0.5),
    ],
    "sequential": [
        lambda o: schedules.SequentialLR(
            o, [schedules.LinearLR(o, total_iters=4), schedules.ExponentialLR(o, 0.9)], milestones=[4]
        )
    ],
    "stochastic weight averaging": [lambda o: SWALR(o, swa_lr=0.01, anneal_epochs=8)],
}

INFO = OptimizerInfo(
    MLBFGS,
    optim_inputs_func=optim_inputs,
    optim_error_inputs_func=error_inputs,
    scheduler_inputs=tuple(SCHEDULES.values()),
    supported_impls=(),
    not_og_supported_flags=("nesterov", "maximize", "decoupled_weight_decay", "capturable"),
    supports_sparse=False,
    has_capturable_arg=True,
    only_supports_sparse_grads=False,
    supports_complex=True,
    step_requires_closure=False,
    supports_param_groups=True,
    supports_multiple_devices=True,
    supports_fused_on=(),
)


def all_inputs():
    """The inputs that PyTorch's tests would draw on a CPU."""
    return _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFO)
