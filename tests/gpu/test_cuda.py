"""On a CUDA GPU: the same results as on the CPU, and no step that waits for the device."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from mlbfgs_torch import MLBFGS, units
from mlbfgs_torch.fused import FusedKernels
from mlbfgs_torch.kernels import TorchKernels
from tests.adapters.test_torch_kernels import trained

pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
SETTINGS = [{}, {"preset": "lbfgs", "lr": 0.05}, {"adaptive": False, "update_every": 3}]


@pytest.fixture(autouse=True, scope="module")
def _needs_a_gpu():
    assert torch.cuda.is_available(), "these tests need a CUDA GPU, and PyTorch sees none"
    assert os.environ.get("TRITON_INTERPRET") == "0", "these tests need Triton's compiler: TRITON_INTERPRET=0"


def train(device, settings, steps, forbid_waiting):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double().to(device)
    inputs, targets = torch.randn(64, 8).double().to(device), torch.randn(64, 3).double().to(device)
    optimizer = MLBFGS(model.parameters(), **settings)
    for step in range(steps):
        optimizer.zero_grad()
        (model(inputs) - targets).square().mean().backward()
        torch.cuda.set_sync_debug_mode("error" if forbid_waiting and step > 0 else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return torch.cat([param.detach().cpu().reshape(-1) for param in model.parameters()])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_trajectory_on_the_gpu_is_that_on_the_cpu(settings):
    torch.testing.assert_close(
        train("cuda", settings, 30, False), train("cpu", settings, 30, False), rtol=1e-6, atol=1e-8
    )


NARROW = {"history_dtype": "bfloat16", "adaptive": False, "update_every": 3}


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-8), (torch.float32, 1e-3), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("settings", [*SETTINGS, NARROW], ids=str)
def test_kernels_in_triton_are_used_and_train_like_those_of_pytorch(settings, dtype, bound, monkeypatch):
    def run(kind):
        if kind is TorchKernels:
            monkeypatch.setattr(units, "fused_kernels", lambda device: None)
        torch.manual_seed(0)
        params = [
            nn.Parameter(torch.randn(shape, device="cuda").to(dtype)) for shape in [(70, 50), (), (9001,)]
        ]
        optimizer = trained(params, 24, settings)
        assert {type(unit.kernels) for unit in optimizer._units} == {kind}
        return [param.detach() for param in params]

    for one, other in zip(run(FusedKernels), run(TorchKernels), strict=True):
        torch.testing.assert_close(one, other, rtol=bound, atol=bound)


@pytest.mark.parametrize("settings", [*SETTINGS, {"lr": torch.tensor(0.005)}], ids=str)
def test_no_step_waits_for_the_gpu(settings):
    train("cuda", settings, 20, forbid_waiting=True)


def test_steps_replayed_from_a_cuda_graph_are_those_of_the_eager_loop():
    def run(captured):
        param = nn.Parameter(torch.linspace(-1, 1, 40, dtype=torch.float64, device="cuda"))
        curvature = torch.linspace(1, 9, 40, dtype=torch.float64, device="cuda")
        param.grad = torch.zeros_like(param)
        optimizer = MLBFGS([param], lr=0.008, capturable=True, adaptive=False, update_every=3)

        def one(step):
            torch.mul(param.detach(), curvature, out=param.grad)
            step()

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                one(optimizer.step)
        torch.cuda.current_stream().wait_stream(side)
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()  # recorded, not run
            step = graph.replay
        for _ in range(12):
            one(step)
        assert int(optimizer.diagnostics()[0].step) == 15
        return param.detach().cpu()

    torch.testing.assert_close(run(captured=True), run(captured=False))


def test_a_capture_needs_capturable():
    param = nn.Parameter(torch.ones(3, device="cuda"))
    param.grad = torch.ones_like(param)
    optimizer = MLBFGS([param])
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="needs `capturable`=True"), torch.cuda.graph(graph):
        optimizer.step()


def test_parameters_on_two_devices_train_together_and_one_nan_skips_both():
    params = [nn.Parameter(torch.ones(4, device=device)) for device in ("cpu", "cuda")]
    optimizer = MLBFGS(params, lr=0.02, adaptive=False, update_every=2)
    for _ in range(6):
        for param in params:
            param.grad = param.detach().clone()
        optimizer.step()
    assert all((param < 1).all() for param in params)
    before = [param.detach().clone() for param in params]
    params[1].grad[0] = float("nan")
    optimizer.step()
    assert all(torch.equal(param, old) for param, old in zip(params, before, strict=True))


def test_a_gradient_scaler_on_the_gpu_gives_the_run_without_it():
    def run(scaled):
        param = nn.Parameter(torch.linspace(1, 2, 8, dtype=torch.float64, device="cuda"))
        optimizer = MLBFGS([param], lr=0.02, adaptive=False, update_every=2)
        scaler = torch.amp.GradScaler("cuda", enabled=scaled, init_scale=2.0**10)
        for _ in range(8):
            optimizer.zero_grad()
            scaler.scale(param.square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return param.detach()

    torch.testing.assert_close(run(scaled=True), run(scaled=False))


def test_a_run_moves_from_the_cpu_to_the_gpu():
    def run(optimizer, param):
        for _ in range(5):
            param.grad = param.detach().clone()
            optimizer.step()

    param = nn.Parameter(torch.linspace(1, 2, 8))
    optimizer = MLBFGS([param], lr=0.02, adaptive=False, update_every=2)
    run(optimizer, param)
    other = nn.Parameter(param.detach().cuda())
    resumed = MLBFGS([other], lr=0.02, adaptive=False, update_every=2)
    resumed.load_state_dict(optimizer.state_dict())
    run(optimizer, param)
    run(resumed, other)
    torch.testing.assert_close(other.detach().cpu(), param.detach())


@pytest.mark.parametrize("settings", [*SETTINGS, NARROW], ids=str)
def test_the_state_of_a_live_run_follows_its_model_to_the_gpu_and_back(settings):
    def run(places):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).double()
        inputs, targets = torch.randn(64, 8).double(), torch.randn(64, 3).double()
        optimizer = MLBFGS(model.parameters(), **settings)
        for place in places:
            model.to(place)
            for _ in range(8):
                optimizer.zero_grad()
                (model(inputs.to(place)) - targets.to(place)).square().mean().backward()
                optimizer.step()
            assert {entry["history"].device.type for entry in optimizer.state.values()} == {place}
        assert int(optimizer.diagnostics()[0].step) == 24
        return torch.cat([param.detach().cpu().reshape(-1) for param in model.parameters()])

    moved, there = run(["cpu", "cuda", "cpu"]), run(["cpu", "cpu", "cpu"])
    torch.testing.assert_close(moved, there, rtol=1e-6, atol=1e-8)


def test_lazily_resolved_views_train_on_the_gpu_as_on_the_cpu():
    ends = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        z = torch.randn(300, 40, dtype=torch.complex64).to(device)
        params = [
            nn.Parameter(z.mH),
            nn.Parameter(z.clone().conj().imag),
            nn.Parameter(torch._neg_view(z.real.clone())),
        ]
        optimizer = MLBFGS(params, lr=0.01, adaptive=False, update_every=3)
        for step in range(10):
            for param in params:
                param.grad = torch._neg_view(param.detach() * (-1 - 0.1 * (step % 3)))
            optimizer.step()
        ends.append([param.detach().resolve_conj().resolve_neg().cpu() for param in params])
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-3)
