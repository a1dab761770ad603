"""On a CUDA GPU: the same results as on the CPU, and no step that waits for the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlbfgs_torch import MLBFGS

SETTINGS = [{}, {"preset": "lbfgs", "lr": 0.05}, {"adaptive": False, "update_every": 3}]


@pytest.fixture(autouse=True, scope="module")
def _needs_a_gpu():
    assert torch.cuda.is_available(), "these tests need a CUDA GPU, and PyTorch sees none"


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


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_no_step_waits_for_the_gpu(settings):
    train("cuda", settings, 20, forbid_waiting=True)
