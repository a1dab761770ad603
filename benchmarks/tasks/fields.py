"""Differential equations for physics-informed networks (Raissi, Perdikaris, Karniadakis 2019)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn

__all__ = ["BURGERS", "POISSON", "Equation"]


class Points(NamedTuple):
    """Coordinates (N, 2) inside the domain and on its border."""

    inside: Tensor
    border: Tensor


def _slopes(values: Tensor, points: Tensor) -> Tensor:
    """Derivatives of each value in its own point."""
    return torch.autograd.grad(values.sum(), points, create_graph=True)[0]


class Equation(ABC):
    """An equation on a rectangle."""

    @abstractmethod
    def points(self, generator: Generator, many: int) -> Points:
        """Random points, `many` times as many as a step takes."""

    @abstractmethod
    def residual(self, model: nn.Module, points: Points) -> Tensor:
        """Mean squared violation of the equation and of the conditions at the border."""

    @abstractmethod
    def error(self, model: nn.Module) -> Tensor:
        """Relative L2 distance from the solution."""


class _Poisson(Equation):
    """``u_xx + u_yy = -2 pi^2 sin(pi x) sin(pi y)`` on the unit square, zero on its border."""

    def points(self, generator: Generator, many: int) -> Points:
        inside = torch.rand(256 * many, 2, generator=generator)
        border = torch.rand(64 * many, 2, generator=generator)
        sides = torch.arange(len(border)) % 4
        rows = torch.arange(len(border))
        border[rows, sides // 2] = (sides % 2).to(border.dtype)
        return Points(inside, border)

    def solution(self, points: Tensor) -> Tensor:
        return torch.sin(math.pi * points).prod(dim=1)

    def residual(self, model: nn.Module, points: Points) -> Tensor:
        inside = points.inside.detach().requires_grad_()
        slopes = _slopes(model(inside), inside)
        laplacian = sum(_slopes(slopes[:, axis], inside)[:, axis] for axis in range(2))
        violation = laplacian + 2 * math.pi**2 * self.solution(inside)
        return violation.square().mean() + 100 * model(points.border).square().mean()

    def error(self, model: nn.Module) -> Tensor:
        axis = torch.linspace(0, 1, 41)
        grid = torch.cartesian_prod(axis, axis)
        exact = self.solution(grid)
        return torch.linalg.vector_norm(model(grid)[:, 0] - exact) / torch.linalg.vector_norm(exact)


class _Burgers(Equation):
    """``u_t + u u_x = nu u_xx`` for x in [-1, 1] and t in [0, 1], from ``-sin(pi x)``, zero at the ends."""

    viscosity = 0.05

    def points(self, generator: Generator, many: int) -> Points:
        inside = torch.rand(256 * many, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor(
            [1.0, 0.0]
        )
        border = torch.rand(96 * many, 2, generator=generator) * torch.tensor([2.0, 1.0]) - torch.tensor(
            [1.0, 0.0]
        )
        third = len(border) // 3
        border[:third, 1] = 0.0
        border[third : 2 * third, 0] = -1.0
        border[2 * third :, 0] = 1.0
        return Points(inside, border)

    def residual(self, model: nn.Module, points: Points) -> Tensor:
        inside = points.inside.detach().requires_grad_()
        u = model(inside)[:, 0]
        slopes = _slopes(u, inside)
        bend = _slopes(slopes[:, 0], inside)[:, 0]
        violation = slopes[:, 1] + u * slopes[:, 0] - self.viscosity * bend
        x, t = points.border.unbind(dim=1)
        given = torch.where(t == 0, -torch.sin(math.pi * x), 0.0)
        return violation.square().mean() + 10 * (model(points.border)[:, 0] - given).square().mean()

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """A grid and the solution there: the formula of Cole and Hopf by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite.hermgauss(100)
        x, t = (
            axis.ravel()
            for axis in np.meshgrid(np.linspace(-1, 1, 41), np.linspace(0.05, 1, 20), indexing="ij")
        )
        shifted = x[:, None] - np.sqrt(4 * self.viscosity * t)[:, None] * nodes
        kernel = weights * np.exp(-np.cos(np.pi * shifted) / (2 * np.pi * self.viscosity))
        u = -(kernel * np.sin(np.pi * shifted)).sum(axis=1) / kernel.sum(axis=1)
        grid = torch.as_tensor(np.stack([x, t], axis=1), dtype=torch.float32)
        return grid, torch.as_tensor(u, dtype=torch.float32)

    def error(self, model: nn.Module) -> Tensor:
        grid, exact = self._table
        return torch.linalg.vector_norm(model(grid)[:, 0] - exact) / torch.linalg.vector_norm(exact)


POISSON = _Poisson()
BURGERS = _Burgers()
