"""Changes of an optimizer's steps, made around it: from outside it looks as before.

A change is a function of a tensor's values before the step, after it, its gradient and the learning rate; it
returns the values that the tensor gets instead. mL-BFGS takes its curvature pairs from the parameters that it
sees at the next step, so that they fit the changed steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = [
    "Averaged",
    "Change",
    "Changed",
    "ScheduleFree",
    "cautious",
    "cautious_decay",
    "exponential",
    "nearest",
    "second_half",
    "stochastic",
]

Change = Callable[[Tensor, Tensor, Tensor, float], Tensor]
LEAST = 1e-3
"""Least share of the components that a cautious step is rescaled by."""
HALF = 1 << 16
"""What the bits of a float32 number count that a bfloat16 number lacks."""


class Changed:
    """An optimizer whose steps are changed.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    change : callable
        See the module's description.
    """

    def __init__(self, optimizer: Optimizer, change: Change) -> None:
        self.optimizer, self.change = optimizer, change
        self.param_groups = optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Take a step and change it."""
        own = [(p, group["lr"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [param.detach().clone() for param, _ in own]
        self.optimizer.step()
        for (param, lr), old in zip(own, before, strict=True):
            param.copy_(self.change(old, param, param.grad, lr))


def cautious(*, rescale: bool) -> Change:
    """Only the components that point against the gradient (Liang et al., arXiv:2411.16085).

    `rescale` divides by their share of all components, so that the step keeps about its size.
    """

    def change(old: Tensor, new: Tensor, gradient: Tensor, lr: float) -> Tensor:
        step = new - old
        mask = (step * gradient < 0).to(step.dtype)
        if rescale:
            mask /= mask.mean().clamp(min=LEAST)
        return old + step * mask

    return change


def cautious_decay(decay: float) -> Change:
    """Weight decay only where the step also moves a value towards zero (Chen et al., arXiv:2510.12402)."""

    def change(old: Tensor, new: Tensor, gradient: Tensor, lr: float) -> Tensor:
        inward = (new - old) * old <= 0
        return new - lr * decay * old * inward

    return change


def nearest(values: Tensor) -> Tensor:
    """The nearest bfloat16 numbers."""
    return values.bfloat16().to(values.dtype)


def stochastic(values: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two neighbouring bfloat16 numbers, so that the mean is the value; for float32 tensors."""
    bits = values.view(torch.int32)
    bits = bits + torch.randint(HALF, values.shape, dtype=torch.int32, generator=generator)
    return (bits & -HALF).view(torch.float32)


class Averaged:
    """An optimizer that also keeps a mean of a model's parameters and floating-point buffers.

    Parameters
    ----------
    model : torch.nn.Module
    optimizer : torch.optim.Optimizer
    weight : callable
        Weight of the newest values in the mean, from the number of the step, which begins at 1.
    """

    def __init__(self, model: nn.Module, optimizer: Any, weight: Callable[[int], float]) -> None:
        self.optimizer, self.weight, self.count = optimizer, weight, 0
        self.param_groups = optimizer.param_groups
        self.values = [t.detach() for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
        self.mean = [value.clone() for value in self.values]
        self.averaging = False

    def step(self) -> None:
        """Take a step and add what it led to."""
        self.optimizer.step()
        self.count += 1
        weight = self.weight(self.count)
        for mean, value in zip(self.mean, self.values, strict=True):
            mean.lerp_(value, weight)

    def eval(self) -> None:
        """Put the mean into the model."""
        if not self.averaging:
            self._swap()

    def train(self) -> None:
        """Put the values of the last step back into the model."""
        if self.averaging:
            self._swap()

    def _swap(self) -> None:
        self.averaging = not self.averaging
        for mean, value in zip(self.mean, self.values, strict=True):
            kept = value.clone()
            value.copy_(mean)
            mean.copy_(kept)


def exponential(decay: float) -> Callable[[int], float]:
    """Weights of an exponential mean, which begins as a plain one."""
    return lambda count: max(1 - decay, 1 / count)


def second_half(steps: int) -> Callable[[int], float]:
    """Weights of the plain mean over the second half of a run."""
    return lambda count: 1 / max(1, count - steps // 2)


class ScheduleFree:
    """Steps at a constant rate from points between them and their mean (Defazio et al., arXiv:2405.15682).

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Without momentum, whose place the mean takes.
    beta : float
        How near the points at which gradients are taken lie to the mean.
    """

    def __init__(self, optimizer: Optimizer, beta: float = 0.9) -> None:
        self.optimizer, self.beta, self.count = optimizer, beta, 0
        self.param_groups = optimizer.param_groups
        self.params = [param.detach() for group in self.param_groups for param in group["params"]]
        self.base = [param.clone() for param in self.params]
        self.mean = [param.clone() for param in self.params]

    def step(self) -> None:
        """Take a step, move the base by it, and the mean towards the base."""
        before = [param.clone() for param in self.params]
        self.optimizer.step()
        self.count += 1
        for param, old, base, mean in zip(self.params, before, self.base, self.mean, strict=True):
            base += param - old
            mean.lerp_(base, 1 / self.count)
        self.train()

    def eval(self) -> None:
        """Put the mean into the model."""
        for param, mean in zip(self.params, self.mean, strict=True):
            param.copy_(mean)

    def train(self) -> None:
        """Put the point between base and mean into the model."""
        for param, base, mean in zip(self.params, self.base, self.mean, strict=True):
            param.copy_(base.lerp(mean, self.beta))
