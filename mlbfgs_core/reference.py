"""The readable twin: NumPy, lists and dense matrices, no tricks; the oracle of the tests.

For small problems only: the inverse Hessian of a block is a dense matrix, built pair by pair.
Symbols are those of the paper (Niu et al. 2023) and of Nocedal & Wright, Numerical Optimization.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import Config

__all__ = ["Reference", "bfgs_inverse_hessian"]

Vector = npt.NDArray[np.float64]


def bfgs_inverse_hessian(pairs: Sequence[tuple[Vector, Vector]], gamma: Any, dim: int) -> Vector:
    """The dense BFGS inverse Hessian of pairs ``(s, y)``, oldest first, from ``gamma I``, or from `gamma`
    itself if it is a matrix.

    Nocedal & Wright, eq. 6.17: ``H <- (I - rho s y^T) H (I - rho y s^T) + rho s s^T``.

    Examples
    --------
    >>> bfgs_inverse_hessian([(np.asarray([1.0, 0.0]), np.asarray([4.0, 0.0]))], 1.0, 2)
    array([[0.25, 0.  ],
           [0.  , 1.  ]])
    """
    H: Vector = gamma * np.eye(dim) if np.ndim(gamma) == 0 else gamma
    for s, y in pairs:
        rho = 1 / (s @ y)
        V = np.eye(dim) - rho * np.outer(y, s)
        H = V.T @ H @ V + rho * np.outer(s, s)
    return H


class Matrices:
    """One matrix of a x b values in a block, row by row from `start` on, for the Kronecker preconditioner.

    `parts` are the lengths of the parts of its rows and of its columns; by default each is one part. The
    factors have a block for each part, as those of a sharded parameter do.
    """

    def __init__(
        self,
        start: int,
        shape: tuple[int, int],
        largest: int,
        parts: tuple[Sequence[int], Sequence[int]] | None = None,
    ) -> None:
        self.values = slice(start, start + shape[0] * shape[1])
        self.shape = shape
        own = parts or ([shape[0]], [shape[1]])
        self.sides = [side for side in (0, 1) if 1 < max(own[side]) <= largest]
        ends = [np.cumsum([0, *lengths]) for lengths in own]
        self.parts = [list(itertools.starmap(slice, itertools.pairwise(e))) for e in ends]
        self.factors: list[Any] = [np.zeros((n, n)) for n in shape]
        self.bases: list[Any] = [np.eye(n) for n in shape]

    @property
    def square(self) -> float:
        """The running squared norm of the gradient."""
        return float(np.trace(self.factors[self.sides[0]]))

    def basis(self) -> Vector:
        """The dense orthogonal matrix ``U_L x U_R``, which takes coordinates of the eigenbasis to those of
        the parameters."""
        result: Vector = np.kron(*self.bases)
        return result

    def add(self, G: Vector, beta: Any) -> None:
        """``L <- beta L + (1 - beta) G G^T``, and for the columns ``G^T G``."""
        for side in self.sides:
            X = G if side == 0 else G.T
            self.factors[side] = beta * self.factors[side] + (1 - beta) * X @ X.T

    def form(self, G: Vector) -> None:
        """Bases of eigenvectors for the first gradient, completed by the first coordinates where there is
        none."""
        for side, part in self._blocks():
            X = (G if side == 0 else G.T)[part]
            values, vectors = np.linalg.eigh(X @ X.T)
            spanned = vectors[:, values > len(values) * np.finfo(float).eps * values[-1]][:, ::-1]
            rest = np.eye(len(values)) - spanned @ spanned.T
            rest = rest[:, np.argsort(~X.any(axis=1), kind="stable")]  # what never has a gradient comes last
            basis = _gram_schmidt(np.hstack([spanned, rest]))[:, : len(values)]
            self.bases[side][part, part] = basis

    def resolved(self, turned: Vector) -> Vector:
        """The first gradient in the bases, without what is only rounding."""
        result = turned.reshape(self.shape).copy()
        for rows in self.parts[0]:
            for columns in self.parts[1]:
                own = result[rows, columns]
                own[own**2 <= np.finfo(float).eps * np.sum(own**2)] = 0.0
        return result.ravel()

    def _blocks(self) -> Iterator[tuple[int, slice]]:
        return ((side, part) for side in self.sides for part in self.parts[side] if part.stop > part.start)

    def turn(self, v: Vector) -> Vector:
        """One power iteration and QR; `v`, the mean squares in the bases, in the new order of vectors."""
        v = v.reshape(self.shape).copy()
        for side, part in self._blocks():
            L, U = self.factors[side][part, part], self.bases[side][part, part]
            values = np.maximum(np.diag(U.T @ L @ U), 0.0)
            order = np.argsort(-values, kind="stable")
            if values.max() > 0:
                U = (L @ U / values.max() + 1e-6 * U)[:, order]
            self.bases[side][part, part] = _gram_schmidt(U)
            own = part if side == 0 else (slice(None), part)
            v[own] = np.take(v[own], order, axis=side)
        return v.ravel()


def _gram_schmidt(columns: Vector) -> Vector:
    """Orthonormal columns, twice for the sake of rounding, without those that depend on others."""
    found: list[Vector] = []
    for x in columns.T:
        length = np.linalg.norm(x)
        for _ in range(2):
            for u in found:
                x = x - (u @ x) * u
        if np.linalg.norm(x) > 1e-10 * length:
            found.append(x / np.linalg.norm(x))
    return np.stack(found, axis=1)


@dataclass
class _Block:
    """What one block remembers; counts are kept for each coordinate, since gradients may be missing."""

    M_theta: Vector
    M_g: Vector
    P_theta: Vector
    P_g: Vector
    v: Vector
    seen: Vector
    """Observations so far."""
    n: Vector
    """Observations in this window."""
    n_P: Vector
    """Observations on which the previous window's averages rest."""
    pairs: list[tuple[Vector, Vector]] = field(default_factory=list, init=False)
    noise: list[list[float]] = field(default_factory=list, init=False)
    """The projections of the gradients on the `s` of each stored pair, since it was stored."""
    mean_square: Any = field(default=0.0, init=False)
    matrices: list[Matrices] = field(default_factory=list, init=False)

    @property
    def told(self) -> list[tuple[Vector, Vector]]:
        """The pairs that say something; one of zeros only takes a place."""
        return [(s, y) for s, y in self.pairs if s.any()]


class Reference:
    """mL-BFGS on flat float64 vectors, one per block, step by step.

    Parameters
    ----------
    config : Config
    sizes : sequence of int
        Dimension of each block.
    matrices : sequence of (int, int, (int, int)), optional
        Block, first coordinate and shape of each matrix (and its parts, see `Matrices`), for
        ``preconditioner="kronecker"``, which runs here in the symmetric root ``U V^(-p/4) U^T``: pairs need
        not be turned with the basis then.
    """

    def __init__(
        self,
        config: Config,
        sizes: Sequence[int],
        matrices: Sequence[tuple[Any, ...]] = (),
    ) -> None:
        self.config = config
        self.blocks: list[_Block] = []
        for block, size in enumerate(sizes):
            self.extend(block, size)
        for block, start, shape, *parts in matrices:
            matrix = Matrices(start, shape, config.max_preconditioner_dim, *parts)
            self.blocks[block].matrices.append(matrix)
        self.steps = self.skipped = self.n = self.n_P = 0
        self.r = self.r_P = 0.0
        self.pending = self.diverges = self.is_first = False
        self.length = 0.0

    def extend(self, block: int, count: int) -> None:
        """Add coordinates that have not been observed yet to a block, or to a new block after the last."""
        if block == len(self.blocks):
            self.blocks.append(_Block(*(np.zeros(0) for _ in range(8))))
        own, zeros = self.blocks[block], np.zeros(count)
        for name in ("M_theta", "M_g", "P_theta", "P_g", "v", "seen", "n", "n_P"):
            setattr(own, name, np.concatenate([getattr(own, name), zeros]))
        own.pairs = [(np.concatenate([s, zeros]), np.concatenate([y, zeros])) for s, y in own.pairs]

    def step(
        self,
        thetas: Sequence[Vector],
        grads: Sequence[Vector],
        present: Sequence[npt.NDArray[np.bool_]] | None = None,
    ) -> list[Vector]:
        """The directions of one step, to be subtracted; zeros for a non-finite gradient.

        `present` tells for each coordinate whether there is a gradient; one without does not move.
        """
        cfg = self.config
        here = [np.ones(len(g), dtype=bool) for g in grads] if present is None else present
        grads = [np.where(own, g, 0.0) for own, g in zip(here, grads, strict=True)]
        thetas = [np.where(np.isfinite(theta), theta, 0.0) for theta in thetas]
        if not all(np.isfinite(g).all() for g in grads):
            self.skipped += 1
            return [np.zeros_like(g) for g in grads]
        self.steps += 1
        self.n += 1
        self.is_first = self.steps == 1
        for block, theta, g, own in zip(self.blocks, thetas, grads, here, strict=True):
            self._observe(block, theta, g, own)
        due = cfg.takes_pairs and (self.n >= cfg.update_every or self.pending)
        usual = sum(len(g) * block.mean_square for block, g in zip(self.blocks, grads, strict=True))
        self.diverges = cfg.step_length == "clip" and 0 < 6.0 * usual < sum(float(g @ g) for g in grads)
        self.pending = self.pending or (cfg.adaptive and self.diverges)
        if cfg.is_adaptive and self.n_P == 0:
            due = due or self.n >= cfg.check_every
        if cfg.is_adaptive and self.n_P > 0 and self.n % cfg.check_every == 0:
            self.pending = self.pending or self._stands_out()
        if due:
            self._refresh()
        directions = self._directions(thetas, grads, here)
        for block, g in zip(self.blocks, grads, strict=True):
            decay = cfg.preconditioner_beta
            block.mean_square += (1 - decay) / (1 - decay**self.steps) * (g @ g / len(g) - block.mean_square)
            if self.steps in (2, 4, 7) or (self.steps > 1 and self.steps % cfg.precondition_frequency == 0):
                for matrix in block.matrices:
                    block.v[matrix.values] = matrix.turn(block.v[matrix.values])
        self.is_first = False
        return directions

    def dense_root(self, block: _Block, *, resolved: bool = False) -> Vector:
        """The dense `R` of a block's preconditioner; it takes `g` to ``R g``, and `s` to ``R^-T s``.

        If `resolved`, that of the first step leaves out the coordinates in which there is only rounding.
        """
        if self.config.preconditioner == "none":
            return np.eye(len(block.v))
        floor: Any = 1e-16 * block.mean_square + np.finfo(np.float64).smallest_normal
        floor = np.full(len(block.v), floor)
        U = np.eye(len(block.v))
        for matrix in block.matrices:
            own = matrix.values
            U[own, own] = matrix.basis()
            floor[own] += (64 * np.finfo(np.float64).eps) ** 2 * matrix.square
        scale = (block.v + floor) ** (-self.config.preconditioner_power / 4)
        if resolved and self.is_first:
            scale = np.where(block.v > 0, scale, 0.0)
        root: Vector = (U * scale) @ U.T
        return root

    def inverse_hessian(self, block: _Block) -> Vector:
        """The dense `H` of a block, in the coordinates of its preconditioner."""
        n = len(block.v)
        s, y = block.told[-1]
        return bfgs_inverse_hessian(block.told, s @ y / (y @ y), n)

    def _observe(self, block: _Block, theta: Vector, g: Vector, present: npt.NDArray[np.bool_]) -> None:
        cfg = self.config
        decay = cfg.preconditioner_beta
        block.seen, block.n = block.seen + present, block.n + present
        steps, n = np.maximum(block.seen, 1), np.maximum(block.n, 1)
        w_v = np.where(present, (1 - decay) / (1 - decay**steps), 0.0)
        w = 1 / n if cfg.beta is None else np.where(steps == 1, 1.0, 1 - cfg.beta)
        w = np.where(present, w, 0.0)
        squares = g**2
        for matrix in block.matrices:
            if self.steps == 1:
                matrix.form(g[matrix.values].reshape(matrix.shape))
            turned = matrix.basis().T @ g[matrix.values]
            if self.steps == 1:
                turned = matrix.resolved(turned)
            squares[matrix.values] = turned**2
        block.v = block.v + w_v * (squares - block.v)
        R = self.dense_root(block, resolved=True)
        off = R @ np.where(present, np.sqrt(1 - w) * (g - block.M_g), 0.0)
        self.r += float(np.sum((R @ g) ** 2)) if cfg.sums_squares else float(off @ off)
        for matrix in block.matrices:
            if present[matrix.values].any():
                matrix.add(g[matrix.values].reshape(matrix.shape), cfg.factor_beta)
        for (s, _), seen in zip(block.pairs, block.noise, strict=True):
            seen.append(float(s @ R @ g))
        block.M_theta = block.M_theta + w * (theta - block.M_theta)
        block.M_g = block.M_g + w * (g - block.M_g)

    def _pair(self, block: _Block) -> tuple[Vector, Vector]:
        known = (block.n > 0) & (block.n_P > 0)
        R = self.dense_root(block)
        s = np.where(known, block.M_theta - block.P_theta, 0.0)
        y = np.where(known, block.M_g - block.P_g, 0.0)
        return np.asarray(np.linalg.solve(R.T, s), dtype=np.float64), R @ y

    def _scatter(self) -> float:
        """The scatter of gradients about their mean in this window."""
        if not self.config.sums_squares:
            return self.r
        means = (np.sum((self.dense_root(b) @ (np.sqrt(b.n) * b.M_g)) ** 2) for b in self.blocks)
        return max(0.0, self.r - float(sum(means)))

    def _spread(self) -> tuple[float, float]:
        """Variance of ``M_g - P_g`` in units of one gradient's, and degrees of freedom of `r`."""
        if self.config.beta is None:
            return 1 / self.n + 1 / max(self.n_P, 1), max(self.n + self.n_P - 2, 1)
        beta = self.config.beta
        first = self.steps - self.n  # observations before this window
        limit = (1 - beta) / (1 + beta)
        prev = limit + (1 - limit) * beta ** (2 * max(first - 1, 0))
        spread = (1 - beta**self.n) ** 2 * prev + limit * (1 - beta ** (2 * self.n))
        seen = self.n + max(self.n_P, 1) - (first <= max(self.n_P, 1))
        return spread, max(seen * 2 * beta / (1 + beta), 1)

    def _row_noise(self, block: _Block) -> float | None:
        """Mean over the stored pairs of the running variance along `s`."""
        known = []
        for seen in (own for own, (s, _) in zip(block.noise, block.pairs, strict=True) if s.any()):
            v = 0.0
            for i in range(2, len(seen)):
                sample = (seen[i] - 2 * seen[i - 1] + seen[i - 2]) ** 2 / 6
                v += max(1 / (i - 1), 0.1) * (sample - v)
            if len(seen) >= 4:
                known.append(v)
        return float(np.mean(known)) if known else None

    def _stands_out(self) -> bool:
        cfg, (nu, freedom) = self.config, self._spread()
        pairs = [self._pair(block) for block in self.blocks]
        y_square = sum(y @ y for _, y in pairs)
        if not y_square > cfg.signal_to_noise * nu * (self.r_P + self._scatter()) / freedom:
            return False
        noise = [self._row_noise(block) for block in self.blocks]
        if all(v is None for v in noise):
            return True
        variance = nu * sum((s @ s) * (v or 0.0) for (s, _), v in zip(pairs, noise, strict=True))
        return bool(sum(s @ y for s, y in pairs) > cfg.noise_floor * np.sqrt(variance))

    def _refresh(self) -> None:
        cfg, (nu, freedom) = self.config, self._spread()
        self.r = self._scatter()
        part: Any = 1.0
        if cfg.adaptive and (observed := sum(y @ y for _, y in map(self._pair, self.blocks))) > 0:
            noise: Any = nu * (self.r_P + self.r) / freedom / observed
            if cfg.shrinks:
                part = max(0.0, 1 - noise, cfg.shrinkage * min(1.0, noise - 1.5))
        for block in self.blocks:
            s, y = self._pair(block)
            norm = np.linalg.norm(s)
            if self.n_P > 0 and norm > 0:
                s, y = s / norm, y / norm
                mu = float(s @ y)
                y = mu * s + part * (y - mu * s)
                tau = self._tau(mu)
                y_hat = tau * y + (1 - tau) * s
                least: Any = cfg.min_cosine * np.linalg.norm(y_hat)
                if cfg.uses_noise:
                    least = max(least, cfg.noise_floor * np.sqrt(nu * (self._row_noise(block) or 0.0)) / norm)
                y_hat = y_hat + max(0.0, least - s @ y_hat) * s
                if s @ y_hat > np.finfo(np.float64).eps * np.linalg.norm(y_hat):
                    says = not cfg.shrinks or (part > 0 and mu > 0)
                    block.pairs.append((s, y_hat) if says else (0 * s, 0 * y_hat))
                    block.noise.append([])
                    del block.pairs[: -cfg.history_size], block.noise[: -cfg.history_size]
            turned = block.n > 0
            block.P_theta = np.where(turned, block.M_theta, block.P_theta)
            block.P_g = np.where(turned, block.M_g, block.P_g)
            block.n_P, block.n = np.where(turned, block.n, block.n_P), np.zeros_like(block.n)
            if cfg.beta is None:
                block.M_theta = np.where(turned, 0.0, block.M_theta)
                block.M_g = np.where(turned, 0.0, block.M_g)
        self.n_P, self.n = self.n, 0
        self.r_P, self.r = self.r, 0.0
        self.pending = False

    def _tau(self, mu: float) -> float:
        if self.config.damping is None:
            return 1.0
        sigma_L, sigma_H, tau_0 = self.config.damping
        if mu <= sigma_L:
            return min((1 - sigma_L) / (1 - mu), tau_0)
        if mu >= sigma_H:
            return min((sigma_H - 1) / (mu - 1), tau_0)
        return tau_0

    def _directions(
        self,
        thetas: Sequence[Vector],
        grads: Sequence[Vector],
        present: Sequence[npt.NDArray[np.bool_]],
    ) -> list[Vector]:
        cfg = self.config
        with_pairs = [block for block in self.blocks if block.told]
        directions = []
        for block, g, own in zip(self.blocks, grads, present, strict=True):
            R = self.dense_root(block, resolved=True)
            z: Any = R @ g
            if block.told:
                z = self.inverse_hessian(block) @ z
            elif with_pairs:
                gammas = [s @ y / (y @ y) for s, y in (block.told[-1] for block in with_pairs)]
                z = float(np.mean(gammas)) * z
            directions.append(np.where(own, R.T @ z, 0.0))
        norm = float(np.sqrt(sum(d @ d for d in directions)))
        if cfg.step_length == "none" or norm == 0:
            cap = cfg.caps_first_step and not with_pairs
            return [d / max(norm, 1.0) for d in directions] if cap else directions
        if cfg.step_length == "unit":
            return [d / norm for d in directions]
        if cfg.step_length == "rms":
            return [d * (np.sqrt(sum(np.sum(own) for own in present)) / norm) for d in directions]
        if not with_pairs and cfg.takes_pairs:
            theta, dim = np.concatenate(thetas)[np.concatenate(present)], sum(len(g) for g in grads)
            part = min(0.01 * 1.5 ** (self.steps - 1), 0.3)
            length = part * (np.linalg.norm(theta) or 0.01 * np.sqrt(dim))
            return [d * (length / norm) for d in directions]
        running = (self.length or norm) * (0.5 if self.diverges else 1.0)
        length = min(norm, cfg.clip_factor * running)
        self.length = running + (length - running) / cfg.update_every
        return [d * (length / norm) for d in directions]
