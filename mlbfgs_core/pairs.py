"""Curvature pairs: their inner products, shrinkage, damping and the floors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .call import Call, stack
from .config import Config
from .kernels import PairTile
from .noise import row_noise, window_noise
from .preconditioner import Root
from .scales import pair_scale
from .state import State, dtype_name

__all__ = [
    "Damping",
    "PairProducts",
    "common_scale",
    "damp",
    "joint_norm",
    "paper_tau",
    "products",
    "scatter",
    "valid",
]

Array = Any


class PairProducts(NamedTuple):
    """Per block (B,): inner products of ``s / s_scale`` and ``y / y_scale``, whitened.

    The scales are about the largest magnitudes in `s` and `y`, so that pairs of any representable
    size have products that neither overflow nor vanish.
    """

    s_scale: Array
    y_scale: Array
    ss: Array
    sy: Array
    yy: Array
    mean_square: Array
    """What the mean gradient adds to the sum of squares in this window, with `Config.sums_squares`."""

    def s_norm(self, xp: Any) -> Array:
        """``|s|``."""
        return self.s_scale * xp.sqrt(self.ss)

    def y_norm(self, xp: Any) -> Array:
        """``|y|``."""
        return self.y_scale * xp.sqrt(self.yy)


class Damping(NamedTuple):
    """How a pair is stored: ``y <- weight y + along s``; every field is (B,)."""

    weight: Array
    along: Array
    tau: Array
    """Weight of the shrunk `y` in the paper's damping."""
    delta: Array
    """What the floors added to the curvature."""
    mu: Array
    """``s.y / s.s`` before damping."""
    usable: Array
    """bool: whether the damped pair carries positive, finite curvature."""
    inverse_norm: Array
    """``1 / |s|``, times `pair_scale`, by which both members are multiplied; 0 for a pair that says nothing,
    which takes its place in the ring and leaves `H` alone."""


def valid(call: Call, state: State, leaf: int) -> Array:
    """Bool: whether a leaf has been observed in this window and in the previous one."""
    observed = (state.leaf_window > 0) & (state.leaf_prev_window > 0)
    return call.kernels.to_leaf(call.kernels.of_leaf(observed, leaf))


def products(call: Call, state: State, roots: Sequence[Root]) -> PairProducts:
    """Inner products of each block's next pair; reads 4 values per parameter (and those of the
    preconditioner), reduces twice."""
    xp, convert = call.xp, call.kernels.to_coefficients
    gathered = []
    squares: list[Array | None] = [None] * len(state.mean_params)
    for block in call.blocks:
        tiles: list[PairTile] = []
        for number in block:
            leaf = call.leaf(state, number, state.mean_params[number].dtype, roots[number])
            tiles += [
                PairTile(tile.s_scale, tile.y_scale, *(call.shared(x, number) for x in tile[2:]))
                for tile in call.kernels.next_products(leaf, valid(call, state, number))
            ]
            if call.config.sums_squares:
                count = call.scalar(call.kernels.of_leaf(state.leaf_window, number), leaf.dtype)
                squares[number] = call.kernels.mean_square(leaf, count)
        columns = [[convert(x, call.dtype) for x in column] for column in zip(*tiles, strict=True)]
        if len(tiles) == 1:
            gathered.append([column[0] for column in columns])
            continue
        parts = [stack(column, xp) for column in columns]
        gathered.append(_add_scaled(*parts, s_total=xp.max(parts[0]), y_total=xp.max(parts[1]), xp=xp))
    local = [stack(column, xp) for column in zip(*gathered, strict=True)]
    local.append(call.block_sums(squares) if call.config.sums_squares else xp.zeros_like(local[0]))
    if call.is_whole:
        return PairProducts(*local)
    scales = call.reduce(xp.stack(local[:2], axis=1))
    *local, square = (x[:, None] for x in local)
    shard = _add_scaled(*local, s_total=scales[:, :1], y_total=scales[:, 1:], xp=xp)
    sums = [*shard[2:], square[:, 0]] if call.config.sums_squares else shard[2:]
    sums = call.reduce(xp.stack(sums, axis=1))
    square = sums[:, 3] if call.config.sums_squares else xp.zeros_like(sums[:, 0])
    return PairProducts(scales[:, 0], scales[:, 1], sums[:, 0], sums[:, 1], sums[:, 2], square)


def scatter(call: Call, state: State, pair: PairProducts) -> Array:
    """0-d: the scatter of the gradient about its mean in this window, when a pair is at hand."""
    if not call.config.sums_squares:
        return state.scatter
    rest = state.scatter - call.xp.sum(pair.mean_square)
    return call.xp.maximum(rest, call.xp.zeros_like(rest))


def damp(call: Call, state: State, pair: PairProducts) -> Damping:
    """How each block's pair is freed of noise and damped.

    References
    ----------
    Niu et al. 2023, the two-sided damping of `y` (`paper_tau`). Difference from the paper: the shrinkage
    ``y <- mu s + f (y - mu s)`` with `f` from `_part_kept`, as James and Stein (1961) shrink a noisy vector
    to a better known one; pairs without curvature or of noise alone say nothing; and then the cosine floor
    ``delta = max(0, c_min |y| - s.y/|s|, k sigma_mu |s| - s.y/|s|) / |s|``, which knows no absolute scale.
    """
    config, xp = call.config, call.xp
    s_norm = pair.s_norm(xp)
    positive = s_norm > 0
    safe_norm = xp.where(positive, s_norm, 1.0)
    ratio = pair.y_scale / xp.where(pair.s_scale > 0, pair.s_scale, 1.0)
    mu = pair.sy / xp.where(pair.ss > 0, pair.ss, 1.0) * ratio
    length = pair.y_norm(xp) / safe_norm  # of y, in units of |s|; `mu` is its part along s
    unit = state.grad_scale  # of a curvature, since gradients are multiplied by it
    part = xp.ones_like(mu)
    inert = xp.zeros_like(positive)
    if config.shrinks or config.uses_noise:
        spread, y_noise = window_noise(call, state)
    if config.shrinks:
        y_norm = joint_norm(pair.yy, *common_scale(pair.y_scale, xp), xp)
        noise = (y_noise / xp.where(y_norm > 0, y_norm, 1.0)) ** 2
        cosine = xp.minimum(xp.abs(mu) / xp.where(length > 0, length, 1.0), xp.ones_like(mu))
        cleans = xp.ones_like(noise) * config.shrinkage < 1.0  # which is known only now if it is traced
        part = part * xp.where(cleans, _part_kept(config, noise, xp), 1.0)
        inert = cleans & ((part == 0) | (mu <= 0))
        length = length * xp.sqrt(cosine**2 + part**2 * (1.0 - cosine**2))
    tau, base, base_length = xp.ones_like(mu), mu, length
    if config.damping is not None:
        tau = paper_tau(config, mu / unit, xp)
        base = tau * mu + (1.0 - tau) * unit
        base_length = _length_of_sum(tau * length, tau * mu, (1.0 - tau) * unit, xp)
    least = config.min_cosine * base_length
    if config.uses_noise:
        noise, _ = row_noise(call, state)
        least = xp.maximum(least, config.noise_floor * xp.sqrt(spread * noise) / safe_norm)
    delta = xp.maximum(least - base, xp.zeros_like(base))
    curvature = base + delta
    final_length = xp.maximum(_length_of_sum(base_length, base, delta, xp), curvature)
    usable = positive & xp.isfinite(final_length) & (final_length > 0)
    usable = usable & (curvature > xp.finfo(call.dtype).eps * final_length)
    along = (1.0 - part) * tau * mu + (1.0 - tau) * unit + delta
    scale = pair_scale(call, final_length, dtype_name(state.history[0]))
    inverse_norm = xp.where(inert, 0.0, scale / safe_norm)
    return Damping(part * tau, along, tau, delta / unit, mu / unit, usable, inverse_norm)


def _part_kept(config: Config, noise: Array, xp: Any) -> Array:
    """What is kept of `y` across `s`, from the noise expected in it in units of ``|y|^2``; 0 if it is noise.

    Independent noise gives at most 1, and up to about 1.4 where gradients of neighbouring steps repel each
    other. Near 1 the pair is noise, and says nothing. Where far more noise is expected than is there, the
    scatter of the gradients was no noise but their motion, and `y` is curvature that is not known well: up to
    `shrinkage` of it is kept.
    """
    beyond = xp.minimum(xp.maximum(noise - 1.5, xp.zeros_like(noise)), xp.ones_like(noise))
    return xp.maximum(xp.maximum(1.0 - noise, config.shrinkage * beyond), xp.zeros_like(noise))


def _length_of_sum(length: Array, along: Array, added: Array, xp: Any) -> Array:
    """Length of ``y + added s`` for a unit vector `s`, if `y` has this length and this part along `s`."""
    top = xp.maximum(length, added)
    top = xp.where(top > 0, top, 1.0)
    square = (length / top) ** 2 + 2.0 * (along / top) * (added / top) + (added / top) ** 2
    return top * xp.sqrt(xp.maximum(square, xp.zeros_like(square)))


def paper_tau(config: Config, mu: Array, xp: Any) -> Array:
    """Weight of `y` in the paper's damping, which keeps the curvature in ``[sigma_L, sigma_H]``.

    References
    ----------
    Niu et al. 2023: ``tau = min((1 - sigma_L) / (1 - mu), tau_0)`` where ``mu <= sigma_L``,
    ``min((sigma_H - 1) / (mu - 1), tau_0)`` where ``mu >= sigma_H``, else ``tau_0``.
    """
    if config.damping is None:
        return xp.ones_like(mu)
    sigma_low, sigma_high, tau_0 = config.damping
    low, high = mu <= sigma_low, mu >= sigma_high
    binding = xp.where(
        low,
        (1.0 - sigma_low) / xp.where(low, 1.0 - mu, 1.0),
        (sigma_high - 1.0) / xp.where(high, mu - 1.0, 1.0),
    )
    limit = xp.ones_like(mu) * tau_0
    return xp.where(low | high, xp.minimum(binding, limit), limit)


def common_scale(scales: Array, xp: Any) -> tuple[Array, Array]:
    """The largest of the blocks' scales, 0-d; and each scale in units of it."""
    top = xp.max(scales)
    return top, scales / xp.where(top > 0, top, 1.0)


def joint_norm(squares: Array, top: Array, parts: Array, xp: Any) -> Array:
    """0-d: the norm over all blocks, from scaled squares of each and what `common_scale` gives."""
    return top * xp.sqrt(xp.sum(squares * parts**2))


def _add_scaled(
    s_scale: Array,
    y_scale: Array,
    ss: Array,
    sy: Array,
    yy: Array,
    *,
    s_total: Array,
    y_total: Array,
    xp: Any,
) -> list[Array]:
    """Sum products over the last axis, after converting them from their own scales to common ones."""
    s_part = s_scale / xp.where(s_total > 0, s_total, 1.0)
    y_part = y_scale / xp.where(y_total > 0, y_total, 1.0)
    return [
        s_total,
        y_total,
        xp.sum(ss * s_part**2, axis=-1),
        xp.sum(sy * s_part * y_part, axis=-1),
        xp.sum(yy * y_part**2, axis=-1),
    ]
