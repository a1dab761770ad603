"""The published recipe with what else the authors' code does, each part to be chosen.

Without any part it is ``MLBFGS(preset="paper", decoupled_weight_decay=False)``. Flat vectors and the two-loop
recursion keep it short: it is for experiments, not for use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import mlbfgs_core as core

__all__ = ["Authors"]

RECIPE = core.Config(preset="paper")
BETA, PERIOD, HISTORY = RECIPE.beta, RECIPE.update_every, RECIPE.history_size
LOW, HIGH, MOST = RECIPE.damping or (0.0, 0.0, 0.0)


@dataclass
class _Block:
    """What a block of parameters remembers."""

    params: list[Tensor]
    means: list[Tensor] = field(default_factory=list)
    """The averages of the parameters and of the gradient."""
    before: list[Tensor] = field(default_factory=list)
    """The same at the last refresh."""
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def observe(self, values: Sequence[Tensor]) -> None:
        """Average parameters and gradient; both averages start at their first value."""
        if not self.means:
            self.means = [value.clone() for value in values]
        for mean, value in zip(self.means, values, strict=True):
            mean.lerp_(value, 1 - (BETA or 0.0))

    def refresh(self, second: float) -> None:
        """Take a pair; with `second`, smooth both its members with those of the pair before."""
        if self.before:
            s, y = (mean - old for mean, old in zip(self.means, self.before, strict=True))
            if self.pairs:
                s, y = (new.lerp(old, second) for new, old in zip((s, y), self.pairs[-1], strict=True))
            mu = float(s @ y / (s @ s))
            tau = MOST
            if mu <= LOW:
                tau = min((1 - LOW) / (1 - mu), MOST)
            elif mu >= HIGH:
                tau = min((HIGH - 1) / (mu - 1), MOST)
            self.pairs = [*self.pairs, (s, tau * y + (1 - tau) * s)][-HISTORY:]
        self.before = [mean.clone() for mean in self.means]

    def direction(self, gradient: Tensor) -> Tensor:
        """The inverse Hessian times the gradient: the two-loop recursion."""
        d, weights = gradient.clone(), []
        for s, y in reversed(self.pairs):
            weights.append((s @ d) / (s @ y))
            d.sub_(weights[-1] * y)
        if self.pairs:
            s, y = self.pairs[-1]
            d.mul_((s @ y) / (y @ y))
        for (s, y), weight in zip(self.pairs, reversed(weights), strict=True):
            d.add_((weight - (y @ d) / (s @ y)) * s)
        return d


class Authors(Optimizer):
    """The published recipe, and the parts of the authors' code that the preset leaves out.

    Parameters
    ----------
    blocks : sequence of sequences of tensors
        Parameters with curvature pairs of their own.
    left_out : sequence of tensors
        Parameters without curvature. Their gradient is divided by the norm of the blocks' direction, as in
        the authors' code, which is SGD with a learning rate that this norm changes.
    lr, weight_decay : float
    second : float
        How much of the pair before goes into a new one; 0.9 in the authors' script.
    sgd_first : bool
        Whether steps before the first pair are SGD's, without a length.

    References
    ----------
    `yuehniu/mL-BFGS <https://github.com/yuehniu/mL-BFGS>`_, opt/slimblock.py, commit 7aef5be. Difference: the
    averages are the paper's, and weight decay is part of the gradient everywhere.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Tensor]],
        left_out: Sequence[Tensor] = (),
        *,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        second: float = 0.0,
        sgd_first: bool = False,
    ) -> None:
        params = [*(param for block in blocks for param in block), *left_out]
        super().__init__(params, {"lr": lr, "momentum": 0.9, "weight_decay": weight_decay})
        self.blocks, self.left_out = [_Block(list(block)) for block in blocks], list(left_out)
        self.second, self.sgd_first, self.steps = second, sgd_first, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step; the gradients must be there."""
        group, self.steps = self.param_groups[0], self.steps + 1
        directions: list[Tensor] = []
        for block in self.blocks:
            theta = torch.cat([param.flatten() for param in block.params])
            gradient = torch.cat([_gradient(param).flatten() for param in block.params])
            gradient.add_(theta, alpha=group["weight_decay"])
            block.observe((theta, gradient))
            if self.steps % PERIOD == 0:
                block.refresh(self.second)
            directions.append(block.direction(gradient))
        norm = torch.sqrt(sum((d @ d for d in directions), torch.zeros(())))
        if self.sgd_first and not any(block.pairs for block in self.blocks):
            norm = torch.ones(())
        for block, d in zip(self.blocks, directions, strict=True):
            for param, part in zip(block.params, d.split([p.numel() for p in block.params]), strict=True):
                self._move(param, part.view_as(param) / norm)
        for param in self.left_out:
            self._move(param, _gradient(param).add(param, alpha=group["weight_decay"]) / norm)

    def _move(self, param: Tensor, direction: Tensor) -> None:
        """Heavy-ball momentum."""
        group, state = self.param_groups[0], self.state[param]
        buffer = state.setdefault("momentum_buffer", torch.zeros_like(param))
        buffer.mul_(group["momentum"]).add_(direction)
        param.sub_(buffer, alpha=group["lr"])


def _gradient(param: Tensor) -> Tensor:
    if param.grad is None:
        msg = "every parameter must have a gradient, got None"
        raise ValueError(msg)
    return param.grad
