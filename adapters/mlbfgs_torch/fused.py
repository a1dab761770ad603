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

from mlbfgs_core.adapter import DiagonalRoot, Leaf, PairTile, Root, StepEnd, square_roots

from .kernels import TorchKernels

__all__ = ["FusedKernels"]

# Values of a leaf in a block, and programs of a pass that sums.
_BLOCK = 2048
_PROGRAMS = 1024
_OPTIONS = {"num_warps": 8}
# The most stored rows, over which loops are unrolled.
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
    """`x` in a dtype, by way of float32: there is no conversion from float64 to half precision."""
    if DTYPE.primitive_bitwidth < 32:
        x = x.to(tl.float32)
    return x.to(DTYPE)


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _whiten(
    history, stride, grad, mean, exp_avg_sq, weight, floor, kept, sums, n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DIAGONAL: tl.constexpr, WEIGHTED: tl.constexpr,
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
        z = g
        total += tl.where(number == ROWS, tl.sum(g * g), 0.0)
        if DIAGONAL:
            v = tl.load(exp_avg_sq + k, own, 0.0)
            if WEIGHTED:
                v += tl.load(weight) * (g * g - v)
            q = _inverse_power(v + tl.load(floor), ROOTS, EXPONENT)
            z = g * q
            tl.store(kept + k, q, own)
            total += tl.where(number == ROWS + 1, tl.sum(z * z), 0.0)
        if SCATTER:
            off = g - tl.load(mean + k, own, 0.0)
            if DIAGONAL:
                off *= q
            total += tl.where(number == ROWS + 2, tl.sum(off * off), 0.0)
        for row in tl.static_range(ROWS):
            h = tl.load(history + tl.full((), row, tl.int64) * stride + k, own, 0.0).to(T)
            total += tl.where(number == row, tl.sum(h * z), 0.0)
        start += tl.num_programs(0) * BLOCK
    tl.store(sums + number * tl.num_programs(0) + tl.program_id(0), total, number < ROWS + 3)


@triton.jit
def _direct(
    history, stride, grad, coefficients, gamma, kept, keep, update, sums, n,
    ROWS: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = sums.dtype.element_ty
    total = tl.zeros((1,), T)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        own = k < n
        z = tl.load(grad + k, own, 0.0).to(T)
        if DIAGONAL:
            q = tl.load(kept + k, own, 0.0)
            z *= q
        d = tl.zeros((BLOCK,), T)
        for row in tl.static_range(ROWS):
            h = tl.load(history + tl.full((), row, tl.int64) * stride + k, own, 0.0).to(T)
            d += tl.load(coefficients + row) * h
        d += tl.load(gamma) * z
        if DIAGONAL:
            d *= q
        d = tl.where(own & tl.load(keep), d, 0.0)
        tl.store(update + k, d, own)
        total += tl.sum(d * d)
        start += tl.num_programs(0) * BLOCK
    tl.store(sums + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit
def _pair(
    now_p, now_g, prev_p, prev_g, diagonal, valid, k, own, DIAGONAL: tl.constexpr,
):  # fmt: skip
    """A block of the next pair, whitened."""
    there = own & tl.load(valid)
    s = tl.load(now_p + k, there, 0.0) - tl.load(prev_p + k, there, 0.0)
    y = tl.load(now_g + k, there, 0.0) - tl.load(prev_g + k, there, 0.0)
    if DIAGONAL:
        q = tl.load(diagonal + k, own, 1.0)
        s = s / q
        y = y * q
    return s, y


@triton.jit
def _largest(
    now_p, now_g, prev_p, prev_g, diagonal, valid, most, n,
    DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = most.dtype.element_ty
    s_most, y_most = tl.zeros((1,), T), tl.zeros((1,), T)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        s, y = _pair(now_p, now_g, prev_p, prev_g, diagonal, valid, k, k < n, DIAGONAL)
        s_most = tl.maximum(s_most, tl.max(tl.abs(s)))
        y_most = tl.maximum(y_most, tl.max(tl.abs(y)))
        start += tl.num_programs(0) * BLOCK
    place = most + tl.program_id(0) + tl.arange(0, 1)
    tl.store(place, s_most)
    tl.store(place + tl.num_programs(0), y_most)


@triton.jit
def _pair_products(
    now_p, now_g, prev_p, prev_g, diagonal, valid, scales, sums, n,
    DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = sums.dtype.element_ty
    s_scale, y_scale = tl.load(scales), tl.load(scales + 1)
    s_scale = tl.where(s_scale > 0, s_scale, 1.0)
    y_scale = tl.where(y_scale > 0, y_scale, 1.0)
    ss, sy, yy = tl.zeros((1,), T), tl.zeros((1,), T), tl.zeros((1,), T)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    while start < n:
        k = start + tl.arange(0, BLOCK)
        s, y = _pair(now_p, now_g, prev_p, prev_g, diagonal, valid, k, k < n, DIAGONAL)
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
    now_p, now_g, prev_p, prev_g, diagonal, valid,
    history, stride, slots, slot, norm, y_weight, s_weight, keep, n,
    DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (k < n) & tl.load(keep)
    s, y = _pair(now_p, now_g, prev_p, prev_g, diagonal, valid, k, own, DIAGONAL)
    s *= tl.load(norm)
    y = tl.load(y_weight) * (y * tl.load(norm)) + tl.load(s_weight) * s
    H = history.dtype.element_ty
    place = tl.load(slot).to(tl.int64)
    tl.store(history + place * stride + k, _rounded(s, H), own)
    tl.store(history + (slots + place) * stride + k, _rounded(y, H), own)


@triton.jit
def _gram(
    history, stride, slots, slot, grad, diagonal, sums, n,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GRAD: tl.constexpr, DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
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
            z = tl.load(grad + k, own, 0.0).to(T)
            if DIAGONAL:
                z *= tl.load(diagonal + k, own, 0.0)
            total += tl.where(number == 2 * ROWS, tl.sum(s * z), 0.0)
            total += tl.where(number == 2 * ROWS + 1, tl.sum(y * z), 0.0)
        start += tl.num_programs(0) * BLOCK
    tl.store(sums + number * tl.num_programs(0) + tl.program_id(0), total, number < 2 * ROWS + 2)


@triton.jit
def _average(mean, value, weight, keep, n, SQUARED: tl.constexpr, BLOCK: tl.constexpr):
    T = mean.dtype.element_ty
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (k < n) & tl.load(keep)
    x = tl.load(value + k, own, 0.0).to(T)
    x = tl.where(_finite(x), x, 0.0)
    if SQUARED:
        x = x * x
    old = tl.load(mean + k, own, 0.0)
    tl.store(mean + k, old + tl.load(weight) * (x - old), own)


@triton.jit
def _rotate(now, before, turn, n, RESTART: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = (k < n) & tl.load(turn)
    x = tl.load(now + k, own)
    tl.store(before + k, x, own)
    if RESTART:
        tl.store(now + k, tl.zeros_like(x), own)


@triton.jit
def _apply(
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

    A pass over a leaf whose root is diagonal or the identity is a single kernel. Histories of many rows,
    whose loops Triton would unroll, are left to PyTorch's operations.

    Parameters
    ----------
    device : torch.device
    """

    @classmethod
    def check(cls, device: torch.device) -> None:
        """Compile and run the shortest kernel, and raise what Triton raises if it cannot."""
        now, before = torch.zeros(2, 1, device=device)
        cls(device).rotate(now, before, torch.ones((), dtype=torch.bool, device=device), restart=True)

    def whiten(
        self, leaf: Leaf, grad: Tensor, mean: Tensor | None, scatter_weight: Tensor
    ) -> tuple[Root, list[Tensor]]:
        """The sums of ``z = R g``, in one pass."""
        if leaf.history is None or not _is_fused(leaf, leaf.history, grad):
            return super().whiten(leaf, grad, mean, scatter_weight)
        rows, root = 2 * leaf.history.shape[1], _diagonal(leaf.root)
        kept = None if root is None else self.scratch(leaf.number, grad, leaf.dtype)
        sums = _parts(rows + 3, grad, leaf.dtype)
        weight, exponent = (None, 1.0) if root is None else (root.weight, root.exponent)
        _launch(
            _whiten,
            sums.shape[1],
            leaf.history,
            leaf.history.stride(1),
            grad,
            mean,
            None if root is None else root.exp_avg_sq,
            weight,
            None if root is None else root.floor,
            kept,
            sums,
            grad.shape[0],
            ROWS=rows,
            WIDTH=triton.next_power_of_2(rows + 3),
            WEIGHTED=weight is not None,
            SCATTER=mean is not None,
            DIAGONAL=root is not None,
            ROOTS=square_roots(exponent),
            EXPONENT=exponent,
        )
        total = sums.sum(1)
        parts = [total[:rows], total[rows]]
        parts += [] if root is None else [total[rows + 1]]
        parts += [] if mean is None else [total[rows + 2] * scatter_weight]
        return leaf.root if root is None else root.keeping(kept), parts

    def direct(
        self, leaf: Leaf, grad: Tensor, weights: tuple[Tensor, Tensor], keep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``d = R^T (gamma z + B^T c)`` and its square, in one pass."""
        if leaf.history is None or not _is_fused(leaf, leaf.history, grad):
            return super().direct(leaf, grad, weights, keep)
        diagonal = self._diagonal_of(leaf)
        update = self.scratch(leaf.number, grad, leaf.dtype) if diagonal is None else diagonal
        squares = _parts(1, grad, leaf.dtype)
        _launch(
            _direct,
            squares.shape[1],
            leaf.history,
            leaf.history.stride(1),
            grad,
            *weights,
            diagonal,
            keep,
            update,
            squares,
            grad.shape[0],
            ROWS=2 * leaf.history.shape[1],
            DIAGONAL=diagonal is not None,
        )
        return update, squares.sum()

    def _diagonal_of(self, leaf: Leaf) -> Tensor | None:
        """The diagonal that a root has kept, or forms again; None for the identity."""
        return None if _diagonal(leaf.root) is None else leaf.root.at(self, None).kept

    def next_products(self, leaf: Leaf, valid: Tensor) -> list[PairTile]:
        """Inner products of the next pair, in two passes."""
        x = leaf.means.params
        if not _is_fused(leaf, *leaf.means):
            return super().next_products(leaf, valid)
        diagonal = self._diagonal_of(leaf)
        given, is_diagonal = (*leaf.means, diagonal, valid), diagonal is not None
        most, sums = _parts(2, x, x.dtype), _parts(3, x, x.dtype)
        _launch(_largest, most.shape[1], *given, most, x.shape[0], DIAGONAL=is_diagonal)
        scales = most.amax(1)
        _launch(_pair_products, sums.shape[1], *given, scales, sums, x.shape[0], DIAGONAL=is_diagonal)
        return [PairTile(*scales, *sums.sum(1))]

    def push_next(
        self,
        leaf: Leaf,
        slot: Tensor,
        damping: tuple[Tensor, ...],
        flags: tuple[Tensor, Tensor],
        grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Store the next pair at a slot of the ring, and form its inner products, in a pass each."""
        history, like = leaf.history, leaf.means.params
        if not _is_fused(leaf, history, like if grad is None else grad, *leaf.means):
            return super().push_next(leaf, slot, damping, flags, grad)
        diagonal = self._diagonal_of(leaf)
        slots, rows = history.shape[1], 2 * history.shape[1]
        place = history, history.stride(1), slots, slot
        y_weight, s_weight, norm = damping
        _launch(
            _write_pair,
            _blocks(like),
            *leaf.means,
            diagonal,
            flags[0],
            *place,
            norm,
            y_weight,
            s_weight,
            flags[1],
            like.shape[0],
            DIAGONAL=diagonal is not None,
        )
        sums = _parts(2 * rows + 2, like, like.dtype)
        _launch(
            _gram,
            sums.shape[1],
            *place,
            grad,
            diagonal,
            sums,
            like.shape[0],
            ROWS=rows,
            WIDTH=triton.next_power_of_2(2 * rows + 2),
            GRAD=grad is not None,
            DIAGONAL=diagonal is not None,
        )
        return history, sums.sum(1)

    def average(
        self, mean: Tensor, value: Tensor, weight: Tensor, keep: Tensor, *, squared: bool = False
    ) -> Tensor:
        """A running mean of a value or of its square, in one pass."""
        if not _flat(mean, value):
            return super().average(mean, value, weight, keep, squared=squared)
        _launch(_average, _blocks(mean), mean, value, weight, keep, mean.shape[0], SQUARED=squared)
        return mean

    def rotate(self, now: Tensor, before: Tensor, turn: Tensor, *, restart: bool) -> tuple[Tensor, Tensor]:
        """An average becomes the previous one, in one pass."""
        if not _flat(now, before):
            return super().rotate(now, before, turn, restart=restart)
        _launch(_rotate, _blocks(now), now, before, turn, now.shape[0], RESTART=restart)
        return now, before

    def apply(
        self, param: Tensor, update: Tensor, buffer: Tensor | None, end: StepEnd, keep: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Momentum, weight decay and learning rate, in one pass."""
        if not _flat(param, update):
            return super().apply(param, update, buffer, end, keep)
        _launch(
            _apply,
            _blocks(param),
            param,
            update,
            end.length.to(update.dtype),
            buffer,
            *(_number(x, update) for x in (end.lr, end.momentum, end.weight_decay)),
            keep,
            param.shape[0],
            MOMENTUM=buffer is not None,
            NESTEROV=end.nesterov,
        )
        return param, buffer


def _diagonal(root: Root) -> DiagonalRoot | None:
    """A root that is diagonal; None for the identity."""
    return root if isinstance(root, DiagonalRoot) else None


def _is_fused(leaf: Leaf, *arrays: Tensor) -> bool:
    """Whether the kernels above can form the root of a leaf and work on these arrays."""
    known = isinstance(leaf.root, DiagonalRoot) or not leaf.root.arrays
    return known and 2 * leaf.history.shape[1] <= _ROWS and _flat(*arrays)


def _flat(*arrays: Tensor) -> bool:
    """Whether the kernels above can work on them."""
    return arrays[0].numel() > 0 and all(array.is_contiguous() for array in arrays)


def _launch(kernel: Any, programs: int, first: Tensor, *rest: Any, **constants: Any) -> None:
    with torch.cuda.device_of(first):  # where Triton launches it
        kernel[(programs,)](first, *rest, **constants, BLOCK=_BLOCK, **_OPTIONS)


def _blocks(leaf: Tensor) -> int:
    return triton.cdiv(leaf.shape[0], _BLOCK)


def _parts(count: int, leaf: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for each program's part of `count` sums over a leaf."""
    return leaf.new_empty((count, min(_PROGRAMS, _blocks(leaf))), dtype=dtype)


def _number(value: float | Tensor, like: Tensor) -> Tensor:
    """A number on the device, in full precision: Triton would take it as float32. Only one that lies
    elsewhere is read."""
    if isinstance(value, Tensor) and value.device == like.device:
        return value.to(like.dtype)
    return torch.full((), float(value), dtype=like.dtype, device=like.device)
