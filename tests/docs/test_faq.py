"""Each message on the page of questions is exactly one that the library gives."""

from __future__ import annotations

import re
import sys
import warnings
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy.optimize import minimize, rosen, rosen_der

from mlbfgs_arrays import MLBFGS as ArrayMLBFGS
from mlbfgs_jax import diagnostics, mlbfgs
from mlbfgs_jax import load_state as load_state_of_jax
from mlbfgs_scipy import minimize_mlbfgs
from mlbfgs_torch import MLBFGS, units
from tests.docs.test_readme import ROOT

pytestmark = pytest.mark.backends("numpy", "torch", "jax")

PROVOKED = {}


def provokes(function):
    PROVOKED[function.__name__] = function
    return function


@provokes
def a_setting_of_adam(_):
    MLBFGS(torch.nn.Linear(3, 2).parameters(), betas=(0.9, 0.999))


@provokes
def a_negative_rate(_):
    MLBFGS(torch.nn.Linear(3, 2).parameters(), lr=-0.1)


@provokes
def a_setting_out_of_range(_):
    MLBFGS(torch.nn.Linear(3, 2).parameters(), beta=1.5)


@provokes
def an_unknown_preset(_):
    MLBFGS(torch.nn.Linear(3, 2).parameters(), preset="adam")


@provokes
def layers_without_names(_):
    MLBFGS(torch.nn.Linear(3, 2).parameters(), blocks="layer")


@provokes
def a_compiler_that_is_missing(monkeypatch):
    def fail(device):
        msg = "Failed to find C compiler. Please specify via CC environment variable or set "
        raise RuntimeError(msg + "triton.knobs.build.impl.")

    module = SimpleNamespace(FusedKernels=SimpleNamespace(check=fail))
    monkeypatch.setitem(sys.modules, "mlbfgs_torch.fused", module)
    assert units.fused_kernels.__wrapped__(torch.device("cuda:0")) is None


@provokes
def a_sparse_gradient(_):
    model = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = MLBFGS(model.named_parameters())
    model(torch.tensor([1])).sum().backward()
    optimizer.step()


@provokes
def integers_in_torch(_):
    MLBFGS([torch.zeros(3, dtype=torch.int64)])


@provokes
def parameters_that_share_memory(_):
    weight = torch.ones(3, 3)
    views = {"encoder": weight, "decoder": weight.T}
    MLBFGS([(name, torch.nn.Parameter(view)) for name, view in views.items()])


@provokes
def a_gradient_from_before_a_conversion(_):
    model = torch.nn.Linear(3, 2)
    optimizer = MLBFGS(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    model.weight.data = model.weight.data.double()
    optimizer.step()


@provokes
def another_shape_during_a_run(_):
    model = torch.nn.Linear(3, 2)
    optimizer = MLBFGS(model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model.weight.data = torch.ones(4, 3)
    model.bias.data = torch.ones(4)
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


@provokes
def a_flattened_state_without_a_parameter(_):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MLBFGS([("weight", param)])
    state = optimizer.state_dict()
    state["state"][0] = {"history": {}}
    optimizer.load_state_dict(state)


@provokes
def a_capture_without_capturable(patch):
    model = torch.nn.Linear(3, 2)
    optimizer = MLBFGS(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    unit = optimizer._units[0]
    patch.setattr(unit, "_device", torch.device("cuda"))  # where coefficients stay on the device
    patch.setattr(unit, "_host_kernels", None)
    patch.setattr(type(unit), "kernels", unit._plain_kernels)
    optimizer.step()


@provokes
def changed_settings(_):
    model = torch.nn.Linear(3, 2)
    optimizer = MLBFGS(model.named_parameters())
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.param_groups[0]["history_size"] = 10


@provokes
def a_state_of_another_shape(_):
    small, large = (torch.nn.Parameter(torch.ones(n)) for n in (3, 4))
    optimizers = [MLBFGS([param]) for param in (small, large)]
    small.grad = torch.ones(3)
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())


@provokes
def a_loaded_history_of_another_size(_):
    own = MLBFGS([torch.nn.Parameter(torch.ones(3))], history_size=10)
    own.load_state_dict(MLBFGS([torch.nn.Parameter(torch.ones(3))]).state_dict())


@provokes
def gradients_that_are_never_finite(_):
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = MLBFGS([param])
    for _ in range(20):
        param.grad = torch.full((3,), float("nan"))
        optimizer.step()


@provokes
def a_state_of_adam(_):
    model = torch.nn.Linear(3, 2)
    optimizer = MLBFGS(model.parameters())
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


@provokes
def an_update_without_params(_):
    tx, params = mlbfgs(0.1), {"w": jnp.ones(3)}
    tx.update(params, tx.init(params))


@provokes
def a_value_beside_the_gradient(_):
    tx, params = mlbfgs(0.1), {"w": jnp.ones(3)}
    tx.update((jnp.ones(()), params), tx.init(params), params)


@provokes
def integers_in_jax(_):
    mlbfgs(0.1).init({"step": jnp.zeros((), jnp.int32), "w": jnp.ones(3)})


@provokes
def a_foreign_state(_):
    diagnostics(jnp.ones(3))


@provokes
def a_gradient_too_few(_):
    ArrayMLBFGS({"weight": np.ones(3), "bias": np.ones(1)}).step({"weight": np.ones(3)})


@provokes
def an_array_in_the_place_of_a_parameter(_):
    params = {"weight": np.ones(3)}
    optimizer = ArrayMLBFGS(params)
    params["weight"] = np.zeros(3)
    optimizer.step({"weight": np.ones(3)})


@provokes
def a_gradient_of_another_dtype(_):
    ArrayMLBFGS({"weight": np.ones(3, np.float32)}).step({"weight": np.ones(3)})


@provokes
def an_array_of_jax_in_numpy(_):
    array = np.ones(3)
    array.flags.writeable = False
    ArrayMLBFGS({"weight": array})


@provokes
def other_sizes_during_a_run(_):
    optimizer = ArrayMLBFGS(np.ones(3))
    optimizer.config = type(optimizer.config)(history_size=10)


@provokes
def bounds(_):
    minimize(rosen, np.zeros(2), jac=rosen_der, method=minimize_mlbfgs, bounds=[(0, 1), (0, 1)])


@provokes
def an_option_of_lbfgsb(_):
    minimize(rosen, np.zeros(2), jac=rosen_der, method=minimize_mlbfgs, options={"maxcor": 5})


@provokes
def momentum_without_a_rate(_):
    minimize(rosen, np.zeros(2), jac=rosen_der, method=minimize_mlbfgs, options={"momentum": 0.9})


@provokes
def a_wrong_gradient(_):
    return minimize(rosen, np.zeros(2), jac=lambda x: -rosen_der(x), method=minimize_mlbfgs)


@provokes
def too_few_iterations(_):
    return minimize(rosen, np.zeros(2), jac=rosen_der, method=minimize_mlbfgs, options={"maxiter": 3})


@provokes
def a_start_outside(_):
    return minimize(lambda x: np.nan, np.zeros(2), jac=lambda x: np.full(2, np.nan), method=minimize_mlbfgs)


@provokes
def no_safetensors(patch):
    patch.setitem(sys.modules, "safetensors", None)
    ArrayMLBFGS({"weight": np.ones(3)}).save_state("run.safetensors")


@provokes
def a_file_cut_short(_):
    optimizer = ArrayMLBFGS({"weight": np.ones(3)})
    optimizer.save_state("run.safetensors")
    with open("run.safetensors", "r+b") as file:
        file.truncate(100)
    optimizer.load_state("run.safetensors")


@provokes
def a_damaged_file(_):
    optimizer = ArrayMLBFGS({"weight": np.ones(3)})
    optimizer.save_state("run.safetensors")
    with open("run.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    optimizer.load_state("run.safetensors")


@provokes
def a_file_of_other_names(_):
    MLBFGS([torch.nn.Parameter(torch.ones(3))]).save_state("run.safetensors")
    ArrayMLBFGS({"weight": np.ones(3, np.float32)}).load_state("run.safetensors")


@provokes
def a_file_of_another_shape(_):
    ArrayMLBFGS({"weight": np.ones((2, 3))}).save_state("run.safetensors")
    ArrayMLBFGS({"weight": np.ones((3, 2))}).load_state("run.safetensors")


@provokes
def a_file_of_another_history(_):
    ArrayMLBFGS({"weight": np.ones(3)}).save_state("run.safetensors")
    ArrayMLBFGS({"weight": np.ones(3)}, history_size=10).load_state("run.safetensors")


@provokes
def a_file_of_another_dtype(_):
    ArrayMLBFGS({"weight": np.ones(3)}).save_state("run.safetensors")
    params = {"weight": jnp.ones(3, jnp.float32)}
    load_state_of_jax("run.safetensors", params, mlbfgs(0.1).init(params))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", list(PROVOKED))
def test_message_is_on_the_page(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message_of(PROVOKED[name], monkeypatch) in messages_on_the_page()


def test_page_has_no_other_message():
    assert len(messages_on_the_page()) == len(set(messages_on_the_page())) == len(PROVOKED)


def messages_on_the_page():
    page = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    _, _, errors = page.partition("## Errors and warnings")
    return re.findall(r"```output\n(.*?)\n```", errors, re.DOTALL)


def message_of(provoke, monkeypatch):
    """What an error, a result or else a warning says."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = provoke(monkeypatch)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    if result is not None:
        return result.message
    return f"{caught[0].category.__name__}: {caught[0].message}"
