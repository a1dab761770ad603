"""Differential equations for physics-informed networks (Raissi, Perdikaris, Karniadakis 2019)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Generator, Tensor, nn

__all__ = ["ALLEN_CAHN", "BURGERS", "CONVECTION", "POISSON", "Equation"]


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
    def table(self) -> tuple[Tensor, Tensor]:
        """Points (N, 2), and the solution there (N,)."""

    def error(self, model: nn.Module) -> Tensor:
        """Relative L2 distance from the solution."""
        dtype = next(model.parameters()).dtype
        points, exact = (values.to(dtype) for values in self.table())
        return torch.linalg.vector_norm(model(points)[:, 0] - exact) / torch.linalg.vector_norm(exact)


class _Evolution(Equation):
    """An equation for x in an interval and t in [0, 1]."""

    interval: tuple[float, float]

    def points(self, generator: Generator, many: int) -> Points:
        inside, border = (self._anywhere(n * many, generator) for n in (256, 96))
        third = len(border) // 3
        border[:third, 1] = 0.0
        border[third : 2 * third, 0] = self.interval[0]
        border[2 * third :, 0] = self.interval[1]
        return Points(inside, border)

    def _anywhere(self, rows: int, generator: Generator) -> Tensor:
        low, high = self.interval
        scale, start = torch.tensor([high - low, 1.0]), torch.tensor([low, 0.0])
        return torch.rand(rows, 2, generator=generator) * scale + start


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

    def table(self) -> tuple[Tensor, Tensor]:
        axis = torch.linspace(0, 1, 41)
        grid = torch.cartesian_prod(axis, axis)
        return grid, self.solution(grid)


class _Burgers(_Evolution):
    """``u_t + u u_x = nu u_xx`` for x in [-1, 1] and t in [0, 1], from ``-sin(pi x)``, zero at the ends."""

    interval = (-1.0, 1.0)
    viscosity = 0.05

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

    def table(self) -> tuple[Tensor, Tensor]:
        return self._table


class _Periodic(_Evolution):
    """An equation whose solution has the same values at both ends of the interval."""

    @abstractmethod
    def start(self, x: Tensor) -> Tensor:
        """The solution at t = 0."""

    @abstractmethod
    def violation(self, u: Tensor, inside: Tensor) -> Tensor:
        """By how much the equation is missed, for values ``u`` of the points ``inside``."""

    def residual(self, model: nn.Module, points: Points) -> Tensor:
        inside = points.inside.detach().requires_grad_()
        violation = self.violation(model(inside)[:, 0], inside)
        first, left, _ = points.border.chunk(3)
        right = left.clone()
        right[:, 0] = self.interval[1]
        started = model(first)[:, 0] - self.start(first[:, 0])
        ends = [self.closed(model, side.detach().requires_grad_()) for side in (left, right)]
        return violation.square().mean() + 10 * (
            started.square().mean() + sum((a - b).square().mean() for a, b in zip(*ends, strict=True))
        )

    def closed(self, model: nn.Module, side: Tensor) -> tuple[Tensor, ...]:
        """What has to be the same at both ends: the values, and for an equation of second order slopes."""
        return (model(side)[:, 0],)


class _Convection(_Periodic):
    """``u_t + 30 u_x = 0`` for x in [0, 2 pi], from ``sin(x)`` (Krishnapriyan et al. 2021)."""

    interval = (0.0, 2 * math.pi)
    speed = 30.0

    def start(self, x: Tensor) -> Tensor:
        return torch.sin(x)

    def violation(self, u: Tensor, inside: Tensor) -> Tensor:
        slopes = _slopes(u, inside)
        return slopes[:, 1] + self.speed * slopes[:, 0]

    def table(self) -> tuple[Tensor, Tensor]:
        grid = torch.cartesian_prod(torch.linspace(*self.interval, 41), torch.linspace(0, 1, 41))
        return grid, self.start(grid[:, 0] - self.speed * grid[:, 1])


class _AllenCahn(_Periodic):
    """``u_t = 1e-4 u_xx + 5 (u - u^3)`` for x in [-1, 1], from ``x^2 cos(pi x)`` (Raissi et al. 2019)."""

    interval = (-1.0, 1.0)
    diffusion = 1e-4

    def start(self, x: Tensor) -> Tensor:
        return x.square() * torch.cos(math.pi * x)

    def violation(self, u: Tensor, inside: Tensor) -> Tensor:
        slopes = _slopes(u, inside)
        bend = _slopes(slopes[:, 0], inside)[:, 0]
        return slopes[:, 1] - self.diffusion * bend - 5 * (u - u**3)

    def closed(self, model: nn.Module, side: Tensor) -> tuple[Tensor, ...]:
        u = model(side)[:, 0]
        return u, _slopes(u, side)[:, 0]

    @cached_property
    def _table(self) -> tuple[Tensor, Tensor]:
        """A grid and the solution there: Fourier modes in x, Runge and Kutta's method in t."""
        x, times = np.linspace(-1, 1, 256, endpoint=False), np.linspace(0, 1, 21)
        waves = -self.diffusion * (np.pi * np.fft.rfftfreq(256, 1 / 256)) ** 2

        def change(_: float, u: np.ndarray) -> np.ndarray:
            return np.fft.irfft(waves * np.fft.rfft(u)) + 5 * (u - u**3)

        found = solve_ivp(change, (0, 1), x**2 * np.cos(np.pi * x), t_eval=times, rtol=1e-8, atol=1e-10)
        grid = np.stack(np.meshgrid(x, times, indexing="ij"), axis=-1)[::4].reshape(-1, 2)
        exact = found.y[::4].ravel()
        return torch.as_tensor(grid, dtype=torch.float32), torch.as_tensor(exact, dtype=torch.float32)

    def table(self) -> tuple[Tensor, Tensor]:
        return self._table


POISSON = _Poisson()
BURGERS = _Burgers()
CONVECTION = _Convection()
ALLEN_CAHN = _AllenCahn()
