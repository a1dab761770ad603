"""
A differential equation
=======================

A network learns the solution of ``u'' = f`` with ``u(0) = u(1) = 0``, from the residual at 128 points: the
loss of a physics-informed network, small enough to run in seconds. There is no noise, so ``preset="fit"`` is
worth a try. Here the default settings do better.
"""

import math

import matplotlib.pyplot as plt
import torch

from mlbfgs_torch import MLBFGS

torch.set_num_threads(1)
points = torch.linspace(0, 1, 128, dtype=torch.float64).reshape(-1, 1)
exact = torch.sin(math.pi * points) + 0.3 * torch.sin(4 * math.pi * points)
right_side = -(math.pi**2) * torch.sin(math.pi * points) - 0.3 * 16 * math.pi**2 * torch.sin(
    4 * math.pi * points
)


class Solution(torch.nn.Module):
    """One hidden layer whose output vanishes at both ends, with its second derivative written by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.slope = torch.nn.Parameter(6 * torch.randn(1, 40, dtype=torch.float64))
        self.shift = torch.nn.Parameter(3 * torch.randn(40, dtype=torch.float64))
        self.out = torch.nn.Parameter(torch.randn(40, 1, dtype=torch.float64) / 40)

    def forward(self, x):
        hidden = torch.tanh(x * self.slope + self.shift)
        bump, d_bump = x * (1 - x), 1 - 2 * x
        d_hidden = (1 - hidden**2) * self.slope
        dd_hidden = -2 * hidden * d_hidden * self.slope
        value = bump * (hidden @ self.out)
        second = 2 * d_bump * (d_hidden @ self.out) + bump * (dd_hidden @ self.out)
        second = second - 2 * hidden @ self.out
        return value, second


def train(make_optimizer, steps=1000):
    """Loss before each step, and the solution at the end."""
    model = Solution()
    optimizer = make_optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(points)[1] - right_side).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses, model(points)[0].detach()


# %%
# Each method gets three learning rates; the best one is drawn. ``preset="fit"`` is made for quadratics, whose
# curvature stays the same. The curvature of a network's loss does not, and the default steps of a fixed
# size cope with that.

best = {}
for name, make, rates in (
    ('mL-BFGS, preset="fit"', lambda p, lr: MLBFGS(p, lr=lr, preset="fit"), (0.1, 0.3, 1.0)),
    ("mL-BFGS", lambda p, lr: MLBFGS(p, lr=lr), (3e-3, 1e-2, 3e-2)),
    ("AdamW", lambda p, lr: torch.optim.AdamW(p, lr=lr), (1e-2, 3e-2, 1e-1)),
):
    runs = {lr: train(lambda params, lr=lr, make=make: make(params, lr)) for lr in rates}
    told = [f"lr {lr:g}: {losses[-1]:.1e}" for lr, (losses, _) in runs.items()]
    print(f"{name:22s}", ", ".join(told))
    best[name] = min(runs.values(), key=lambda run: run[0][-1])

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
right.plot(points, exact, "k", linewidth=4, alpha=0.25, label="exact")
for name, (losses, solution) in best.items():
    left.semilogy(losses, label=name)
    right.plot(points, solution, "--", label=name)
left.set(xlabel="step", ylabel="mean squared residual")
right.set(xlabel="x", ylabel="u")
left.legend()
right.legend()
plt.show()
