"""The core's kernels on a CUDA GPU, each a single pass over memory, written in Triton.

PyTorch's builds for CUDA bring Triton. Programs walk over a leaf in blocks at equal distances; each adds up
its own part of the sums, and a second, small sum adds the parts, always in the same order. The number of
programs does not depend on the GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlbfgs_core.kernels import Means, Metric, PairTile, Projection, square_roots

from .kernels import TorchKernels

__all__ = ["FusedKernels"]

# Values of a leaf in a block, and programs of a pass that sums.
_BLOCK = 2048
_PROGRAMS = 1024
_OPTIONS = {"num_warps": 8}
# Stored rows, over which loops are unrolled, at most.
_ROWS = 64


@triton.jit
def _inverse_power(x, ROOTS: tl.constexpr, EXPONENT: tl.constexpr):
    """``x ** -EXPONENT``, by square roots where they suffice."""
    if ROOTS is None:
        power = tl.exp2(-EXPONENT * tl.log2(x))
    else:
        for _ in tl.static_range(ROOTS):
            x = tl.sqrt(x)
        power = 1.0 / x
    return power


@triton.jit
def _rounded(x, DTYPE: tl.constexpr):
    """`x` in a dtype: there is no conversion from float64 to the shortest."""
    if DTYPE.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _project(
    history, stride, grad, mean, moment, weight, floor, root, sums, n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, METRIC: tl.constexpr, WEIGHTED: tl.constexpr,
    SCATTER: tl.constexpr, ROOTS: tl.constexpr, EXPONENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = sums.dtype.element_ty
    number = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), T)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        own = k < n
        g = tl.load(grad + k, own, 0.0).to(T)
        scaled = g
        total += tl.where(number == ROWS, tl.sum(g * g), 0.0)
        if METRIC:
            v = tl.load(moment + k, own, 0.0)
            if WEIGHTED:
                v += tl.load(weight) * (g * g - v)
            q = _inverse_power(v + tl.load(floor), ROOTS, EXPONENT)
            tl.store(root + k, q, own)
            scaled = g * q
            total += tl.where(number == ROWS + 1, tl.sum(scaled * scaled), 0.0)
        if SCATTER:
            off = g - tl.load(mean + k, own, 0.0)
            if METRIC:
                off *= q
            total += tl.where(number == ROWS + 2, tl.sum(off * off), 0.0)
        for row in tl.static_range(ROWS):
            h = tl.load(history + tl.full((), row, tl.int64) * stride + k, own, 0.0).to(T)
            total += tl.where(number == row, tl.sum(h * scaled), 0.0)
        start += tl.num_programs(0) * BLOCK
    tl.store(sums + number * tl.num_programs(0) + tl.program_id(0), total, number < ROWS + 3)


@triton.jit
def _combine(
    history, stride, grad, coefficients, gamma, root, keep, update, sums, n,
    ROWS: tl.constexpr, METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = sums.dtype.element_ty
    total = tl.zeros((1,), T)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        own = k < n
        g = tl.load(grad + k, own, 0.0).to(T)
        if METRIC:
            q = tl.load(root + k, own, 0.0)
            g *= q
        d = tl.zeros((BLOCK,), T)
        for row in tl.static_range(ROWS):
            h = tl.load(history + tl.full((), row, tl.int64) * stride + k, own, 0.0).to(T)
            d += tl.load(coefficients + row) * h
        d += tl.load(gamma) * g
        if METRIC:
            d *= q
        d = tl.where(own & tl.load(keep), d, 0.0)
        tl.store(update + k, d, own)
        total += tl.sum(d * d)
        start += tl.num_programs(0) * BLOCK
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit
def _pair(now_p, now_g, prev_p, prev_g, root, valid, k, own, METRIC: tl.constexpr):
    """A block of ``s`` and ``y``."""
    own &= tl.load(valid)
    s = tl.load(now_p + k, own, 0.0) - tl.load(prev_p + k, own, 0.0)
    y = tl.load(now_g + k, own, 0.0) - tl.load(prev_g + k, own, 0.0)
    if METRIC:
        q = tl.load(root + k, own, 1.0)
        s = s / q
        y = y * q
    return s, y


@triton.jit
def _largest(now_p, now_g, prev_p, prev_g, root, valid, most, n, METRIC: tl.constexpr, BLOCK: tl.constexpr):
    T = most.dtype.element_ty
    s_most, y_most = tl.zeros((1,), T), tl.zeros((1,), T)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        s, y = _pair(now_p, now_g, prev_p, prev_g, root, valid, k, k < n, METRIC)
        s_most = tl.maximum(s_most, tl.max(tl.abs(s)))
        y_most = tl.maximum(y_most, tl.max(tl.abs(y)))
        start += tl.num_programs(0) * BLOCK
    place = most + tl.program_id(0) + tl.arange(0, 1)
    tl.store(place, s_most)
    tl.store(place + tl.num_programs(0), y_most)


@triton.jit
def _pair_products(
    now_p, now_g, prev_p, prev_g, root, valid, scales, sums, n,
    METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = sums.dtype.element_ty
    s_scale, y_scale = tl.load(scales), tl.load(scales + 1)
    s_scale = tl.where(s_scale > 0, s_scale, 1.0)
    y_scale = tl.where(y_scale > 0, y_scale, 1.0)
    ss, sy, yy = tl.zeros((1,), T), tl.zeros((1,), T), tl.zeros((1,), T)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        s, y = _pair(now_p, now_g, prev_p, prev_g, root, valid, k, k < n, METRIC)
        s = s / s_scale
        y = y / y_scale
        ss += tl.sum(s * s)
        sy += tl.sum(s * y)
        yy += tl.sum(y * y)
        start += tl.num_programs(0) * BLOCK
    place = sums + tl.program_id(0) + tl.arange(0, 1)
    tl.store(place, ss)
    tl.store(place + tl.num_programs(0), sy)
    tl.store(place + 2 * tl.num_programs(0), yy)


@triton.jit
def _write_pair(
    history, stride, slots, slot, now_p, now_g, prev_p, prev_g, root, valid,
    norm, y_weight, s_weight, keep, n,
    METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (k < n) & tl.load(keep)
    s, y = _pair(now_p, now_g, prev_p, prev_g, root, valid, k, own, METRIC)
    s *= tl.load(norm)
    y = tl.load(y_weight) * (y * tl.load(norm)) + tl.load(s_weight) * s
    H = history.dtype.element_ty
    place = tl.load(slot).to(tl.int64)
    tl.store(history + place * stride + k, _rounded(s, H), own)
    tl.store(history + (slots + place) * stride + k, _rounded(y, H), own)


@triton.jit
def _gram(
    history, stride, slots, slot, grad, root, sums, n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GRAD: tl.constexpr, METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = sums.dtype.element_ty
    number = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), T)
    place = tl.load(slot).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        own = k < n
        s = tl.load(history + place * stride + k, own, 0.0).to(T)
        y = tl.load(history + (slots + place) * stride + k, own, 0.0).to(T)
        for row in tl.static_range(ROWS):
            h = tl.load(history + tl.full((), row, tl.int64) * stride + k, own, 0.0).to(T)
            total += tl.where(number == row, tl.sum(h * s), 0.0)
            total += tl.where(number == ROWS + row, tl.sum(h * y), 0.0)
        if GRAD:
            g = tl.load(grad + k, own, 0.0).to(T)
            if METRIC:
                g *= tl.load(root + k, own, 0.0)
            total += tl.where(number == 2 * ROWS, tl.sum(s * g), 0.0)
            total += tl.where(number == 2 * ROWS + 1, tl.sum(y * g), 0.0)
        start += tl.num_programs(0) * BLOCK
    tl.store(sums + number * tl.num_programs(0) + tl.program_id(0), total, number < 2 * ROWS + 2)


@triton.jit
def _update_means(
    mean_p, mean_g, moment, param, grad, weight, moment_weight, keep, n,
    METRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = mean_p.dtype.element_ty
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (k < n) & tl.load(keep)
    p, g = tl.load(param + k, own, 0.0).to(T), tl.load(grad + k, own, 0.0).to(T)
    p = tl.where(_finite(p), p, 0.0)
    old = tl.load(mean_p + k, own, 0.0)
    tl.store(mean_p + k, old + tl.load(weight) * (p - old), own)
    old = tl.load(mean_g + k, own, 0.0)
    tl.store(mean_g + k, old + tl.load(weight) * (g - old), own)
    if METRIC:
        old = tl.load(moment + k, own, 0.0)
        tl.store(moment + k, old + tl.load(moment_weight) * (g * g - old), own)


@triton.jit
def _rotate(now_p, now_g, prev_p, prev_g, turn, n, RESTART: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (k < n) & tl.load(turn)
    p, g = tl.load(now_p + k, own), tl.load(now_g + k, own)
    tl.store(prev_p + k, p, own)
    tl.store(prev_g + k, g, own)
    if RESTART:
        tl.store(now_p + k, tl.zeros_like(p), own)
        tl.store(now_g + k, tl.zeros_like(g), own)


@triton.jit
def _descend(
    param, update, length, buffer, lr, momentum, weight_decay, keep, n,
    MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = update.dtype.element_ty
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (k < n) & tl.load(keep)
    rate = tl.load(lr)
    change = tl.load(length) * tl.load(update + k, own, 0.0)
    if MOMENTUM:
        carried = tl.load(momentum) * tl.load(buffer + k, own, 0.0) + change
        tl.store(buffer + k, carried, own)
        if NESTEROV:
            change += tl.load(momentum) * carried
        else:
            change = carried
    value = tl.load(param + k, own, 0.0).to(T)
    value = value * (1.0 - rate * tl.load(weight_decay)) - rate * change
    tl.store(param + k, _rounded(value, param.dtype.element_ty), own)


class FusedKernels(TorchKernels):
    """Kernels for leaves that are flat, contiguous tensors on a CUDA GPU.

    Histories of many rows, whose loops Triton would unroll, are left to PyTorch's operations.

    Parameters
    ----------
    device : torch.device
    """

    @classmethod
    def check(cls, device: torch.device) -> None:
        """Compile and run the shortest of them, and raise whatever Triton does where it can't."""
        four = Means(*torch.zeros(4, 1, device=device))
        cls(device).rotate(four, torch.ones((), dtype=torch.bool, device=device), restart=True)

    def _root(self, metric: Metric | None) -> Tensor | None:
        """The metric's ``q ** -0.5``; None without a metric."""
        return None if metric is None else metric.inverse_root(self, (...,))

    def project(
        self,
        history: Tensor,
        grad: Tensor,
        mean_grad: Tensor | None,
        scatter_weight: Tensor,
        metric: Metric | None,
        dtype: torch.dtype,
    ) -> Projection:
        """Project a gradient on the stored rows, in one pass."""
        if not _flat(history, grad) or 2 * history.shape[1] > _ROWS:
            return super().project(history, grad, mean_grad, scatter_weight, metric, dtype)
        rows = 2 * history.shape[1]
        root = None if metric is None else self.scratch(history, grad, dtype)
        sums = _parts(rows + 3, grad, dtype)
        weight = None if metric is None else metric.weight
        exponent = 1.0 if metric is None else metric.power / 4
        _launch(
            _project,
            sums.shape[1],
            history,
            history.stride(1),
            grad,
            mean_grad,
            None if metric is None else metric.moment,
            weight,
            None if metric is None else metric.floor,
            root,
            sums,
            grad.shape[0],
            ROWS=rows,
            WIDTH=triton.next_power_of_2(rows + 3),
            METRIC=metric is not None,
            WEIGHTED=weight is not None,
            SCATTER=mean_grad is not None,
            ROOTS=square_roots(exponent),
            EXPONENT=exponent,
        )
        total = sums.sum(1)
        return Projection(
            total[:rows],
            total[rows],
            None if metric is None else total[rows + 1],
            None if mean_grad is None else total[rows + 2] * scatter_weight,
            root,
        )

    def combine(
        self,
        history: Tensor,
        grad: Tensor,
        coefficients: Tensor,
        gamma: Tensor,
        metric: Metric | None,
        keep: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None]:
        """``gamma g + B^T c``, in one pass."""
        if not _flat(history, grad) or 2 * history.shape[1] > _ROWS:
            return super().combine(history, grad, coefficients, gamma, metric, keep, dtype)
        root = self._root(metric)
        update = self.scratch(history, grad, dtype) if root is None else root
        squares = _parts(1, grad, dtype)
        _launch(
            _combine,
            squares.shape[1],
            history,
            history.stride(1),
            grad,
            coefficients,
            gamma,
            root,
            keep,
            update,
            squares,
            grad.shape[0],
            ROWS=2 * history.shape[1],
            METRIC=metric is not None,
        )
        return update, None if metric is None else squares.sum()

    def update_means(
        self,
        mean_params: Tensor,
        mean_grads: Tensor,
        metric: Metric | None,
        param: Tensor,
        grad: Tensor,
        weight: Tensor,
        keep: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Averages of parameter, gradient and squared gradient, in one pass."""
        if not _flat(param, grad):
            return super().update_means(mean_params, mean_grads, metric, param, grad, weight, keep)
        moment = None if metric is None else metric.moment
        _launch(
            _update_means,
            _blocks(param),
            mean_params,
            mean_grads,
            moment,
            param,
            grad,
            weight,
            None if metric is None else metric.weight,
            keep,
            param.shape[0],
            METRIC=metric is not None,
        )
        return mean_params, mean_grads, moment

    def pair_products(self, means: Means, metric: Metric | None, valid: Tensor) -> list[PairTile]:
        """Inner products of ``s`` and ``y``, in two passes."""
        x = means.params
        if not _flat(*means):
            return super().pair_products(means, metric, valid)
        given = (*means, self._root(metric), valid)
        most, sums = _parts(2, x, x.dtype), _parts(3, x, x.dtype)
        uses_metric = metric is not None
        _launch(_largest, most.shape[1], *given, most, x.shape[0], METRIC=uses_metric)
        scales = most.amax(1)
        _launch(_pair_products, sums.shape[1], *given, scales, sums, x.shape[0], METRIC=uses_metric)
        return [PairTile(*scales, *sums.sum(1))]

    def write_pair(
        self,
        history: Tensor,
        slot: Tensor,
        means: Means,
        metric: Metric | None,
        valid: Tensor,
        inverse_norm: Tensor,
        damping: tuple[Tensor, Tensor],
        keep: Tensor,
    ) -> Tensor:
        """Store a pair at a slot of the ring, in one pass."""
        if not _flat(history, *means):
            return super().write_pair(history, slot, means, metric, valid, inverse_norm, damping, keep)
        _launch(
            _write_pair,
            _blocks(means.params),
            history,
            history.stride(1),
            history.shape[1],
            slot,
            *means,
            self._root(metric),
            valid,
            inverse_norm,
            *damping,
            keep,
            means.params.shape[0],
            METRIC=metric is not None,
        )
        return history

    def gram(
        self, history: Tensor, slot: Tensor, grad: Tensor | None, metric: Metric | None, dtype: torch.dtype
    ) -> Tensor:
        """Inner products of the two rows at a slot, in one pass."""
        rows, leaf = 2 * history.shape[1], history[0, 0]
        if not _flat(history, leaf if grad is None else grad) or rows > _ROWS:
            return super().gram(history, slot, grad, metric, dtype)
        sums = _parts(2 * rows + 2, leaf, dtype)
        _launch(
            _gram,
            sums.shape[1],
            history,
            history.stride(1),
            history.shape[1],
            slot,
            grad,
            self._root(metric),
            sums,
            leaf.shape[0],
            ROWS=rows,
            WIDTH=triton.next_power_of_2(2 * rows + 2),
            GRAD=grad is not None,
            METRIC=metric is not None,
        )
        return sums.sum(1)

    def rotate(self, means: Means, turn: Tensor, *, restart: bool) -> Means:
        """This window's averages become the previous ones, in one pass."""
        if not _flat(*means):
            return super().rotate(means, turn, restart=restart)
        x = means.params
        _launch(_rotate, _blocks(x), *means, turn, x.shape[0], RESTART=restart)
        return means

    def descend(
        self,
        param: Tensor,
        update: Tensor,
        length: Tensor,
        buffer: Tensor | None,
        lr: float | Tensor,
        momentum: float,
        weight_decay: float,
        keep: Tensor,
        *,
        nesterov: bool,
    ) -> None:
        """Momentum, weight decay and learning rate, in one pass."""
        if not _flat(param, update):
            super().descend(
                param, update, length, buffer, lr, momentum, weight_decay, keep, nesterov=nesterov
            )
            return
        _launch(
            _descend,
            _blocks(param),
            param,
            update,
            length.to(update.dtype),
            buffer,
            *(_number(x, update) for x in (lr, momentum, weight_decay)),
            keep,
            param.shape[0],
            MOMENTUM=buffer is not None,
            NESTEROV=nesterov,
        )


def _flat(*arrays: Tensor) -> bool:
    """Whether the kernels above can work on them."""
    return arrays[0].numel() > 0 and all(array.is_contiguous() for array in arrays)


def _launch(kernel: Any, programs: int, first: Tensor, *rest: Any, **constants: Any) -> None:
    with torch.cuda.device_of(first):  # where Triton launches it
        kernel[(programs,)](first, *rest, **constants, BLOCK=_BLOCK, **_OPTIONS)


def _blocks(leaf: Tensor) -> int:
    return triton.cdiv(leaf.shape[0], _BLOCK)


def _parts(count: int, leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for each program's part of so many sums over a leaf."""
    return leaf.new_empty((count, min(_PROGRAMS, _blocks(leaf))), dtype=dtype)


def _number(value: float | Tensor, like: Tensor) -> Tensor:
    """A number on the device, in full precision: Triton would take it as float32. Only one that lies
    elsewhere is read."""
    if isinstance(value, Tensor) and value.device == like.device:
        return value.to(like.dtype)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)
