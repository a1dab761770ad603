"""The core's kernels on CuPy: each a single pass over memory, written in CUDA C.

A pass that sums is a loop of many threads at equal distances; each adds up its own part of the sums, in the
order of the leaf, and a second, small sum adds the parts. No product goes through a matrix library, so that
inner products have full precision whatever that library is allowed, and a history of half precision is read
as it is stored. `R` of the diagonal preconditioner is formed within a pass; with another preconditioner the
passes are the core's, built from the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlbfgs_core as core
from mlbfgs_core.adapter import DiagonalRoot, Leaf, PairTile, Root, StepEnd, square_roots

from .cuda_source import BODIES, OWN_VALUES

__all__ = ["CupyKernels"]

Array = Any

# Values handled at a time by the operations that are not written here.
_TILE = 2**26
# Threads of a pass that sums; each should have several values of its own.
_THREADS = 2**17
_OWN = 16


class CupyKernels(core.Kernels):
    """Kernels for leaves that are flat, contiguous CuPy arrays.

    Parameters
    ----------
    xp : array namespace
        ``array_api_compat.cupy``.
    compile : callable
        ``cupy.ElementwiseKernel``.
    """

    def __init__(self, xp: Any, compile: Callable[..., Any]) -> None:
        super().__init__(xp, _TILE)
        self._compile = compile
        self._compiled: dict[Any, Any] = {}

    def times(self, rows: Array, x: Array) -> Array:
        """Inner products of rows of any dtype with a vector, accumulated in the vector's."""
        sums = self._parts(rows.shape[0], x, x.dtype)
        self._run(
            "times",
            {"ROWS": rows.shape[0]},
            {"raw H rows": rows, "raw T x": x, **_sizes(x, sums)},
            {"raw T sums": sums, "T last": sums[-1, ...]},
        )
        return self.xp.sum(sums, axis=1)

    def whiten(
        self, leaf: Leaf, grad: Array, mean: Array | None, scatter_weight: Array
    ) -> tuple[Root, list[Array]]:
        """The sums of ``z = R g``."""
        if not _is_formed(leaf.root):
            return super().whiten(leaf, grad, mean, scatter_weight)
        rows, history = _rows(leaf, grad)
        sums = self._parts(rows + 3, grad, leaf.dtype)
        defines: dict[str, Any] = {"ROWS": rows}
        inputs = {"raw H history": history, "raw G grad": grad, **_sizes(grad, sums)}
        outputs = {"raw T sums": sums, "T last": sums[-1, ...]}
        root = leaf.root
        if isinstance(root, DiagonalRoot):
            outputs["raw T kept"] = self.scratch(leaf.number, grad, leaf.dtype)
            root = root.keeping(outputs["raw T kept"])
            weight, floor = leaf.root.weight, leaf.root.floor
            inputs["T weight"] = self.xp.zeros_like(floor) if weight is None else weight
            self._with_root(leaf.root, defines, inputs)
        if mean is not None:
            inputs["raw T mean"] = mean
            defines["SCATTER"] = 1
        self._run("whiten", defines, inputs, outputs)
        total = self.xp.sum(sums, axis=1)
        result = [] if leaf.history is None else [total[:rows]]
        result += [total[rows, ...]] if root.kept is None else [total[rows, ...], total[rows + 1, ...]]
        return root, result if mean is None else [*result, total[rows + 2, ...] * scatter_weight]

    def direct(
        self, leaf: Leaf, grad: Array, weights: tuple[Array, Array], keep: Array
    ) -> tuple[Array, Array]:
        """``d = R^T (gamma z + B^T c)`` and ``|d|^2``."""
        if not _is_formed(leaf.root):
            return super().direct(leaf, grad, weights, keep)
        rows, history = _rows(leaf, grad)
        squares = self._parts(1, grad, leaf.dtype)
        kept = leaf.root.at(self, None).kept
        update = self.scratch(leaf.number, grad, leaf.dtype) if kept is None else kept
        inputs = {"raw H history": history, "raw G grad": grad, "raw T coefficients": weights[0]}
        inputs |= {"T gamma": weights[1], "bool keep": keep, **_sizes(grad, squares)}
        defines: dict[str, Any] = {"ROWS": rows}
        if kept is not None:
            inputs["raw T kept"] = kept
            defines["DIAGONAL"] = 1
        self._run("direct", defines, inputs, {"raw T update": update, "T square": squares[0, ...]})
        return update, self.xp.sum(squares)

    def average(
        self, mean: Array, value: Array, weight: Array, keep: Array, *, squared: bool = False
    ) -> Array:
        """``M += weight * (x - M)`` for a value or its square."""
        inputs = {"G value": value, "T weight": weight, "bool keep": keep}
        self._run("average", {"SQUARED": 1} if squared else {}, inputs, {"T mean": mean})
        return mean

    def next_products(self, leaf: Leaf, valid: Array) -> list[PairTile]:
        """Inner products of the next pair."""
        if not _is_formed(leaf.root):
            return super().next_products(leaf, valid)
        x, defines = leaf.means.params, dict[str, Any]()
        inputs = self._pair(leaf, valid, defines)
        scales = self._parts(2, x, x.dtype)
        outputs = {"T s_scale": scales[0, ...], "T y_scale": scales[1, ...]}
        self._run("largest", defines, {**inputs, **_sizes(x, scales)}, outputs)
        scales = self.xp.max(scales, axis=1)
        inputs |= {"T s_scale": scales[0, ...], "T y_scale": scales[1, ...]}
        sums = self._parts(3, x, x.dtype)
        outputs = {name: sums[i, ...] for i, name in enumerate(("T ss", "T sy", "T yy"))}
        self._run("pair_products", defines, {**inputs, **_sizes(x, sums)}, outputs)
        sums = self.xp.sum(sums, axis=1)
        return [PairTile(scales[0, ...], scales[1, ...], sums[0, ...], sums[1, ...], sums[2, ...])]

    def push_next(
        self,
        leaf: Leaf,
        slot: Array,
        damping: tuple[Array, ...],
        flags: tuple[Array, Array],
        grad: Array | None,
    ) -> tuple[Array, Array]:
        """Store the next pair at a slot of the ring, and form the inner products of the rows there."""
        if not _is_formed(leaf.root):
            return super().push_next(leaf, slot, damping, flags, grad)
        history, x, defines = leaf.history, leaf.means.params, dict[str, Any]()
        m = history.shape[1]
        inputs = self._pair(leaf, flags[0], defines)
        inputs |= {"T y_weight": damping[0], "T s_weight": damping[1], "T inverse_norm": damping[2]}
        inputs |= {"bool keep": flags[1], "int64 slot": slot, "int64 slots": m, "int64 length": x.shape[0]}
        # Only the shape of `like` is used: the loop is over the values of the leaf.
        inputs["T like"] = x
        self._run("write_pair", defines, inputs, {"raw H history": history})
        rows = history.reshape((2 * m, -1))
        new = self.cast(rows[self.xp.concat([slot, slot + m]), ...], leaf.dtype)
        products = [self.times(rows, new[0, ...]), self.times(rows, new[1, ...])]
        if grad is None:
            products.append(self.xp.zeros_like(products[0][:2]))
        else:
            z = leaf.root.at(self, None).white(self.cast(grad, leaf.dtype))
            products.append(self.times(new, z))
        return history, self.xp.concat(products)

    def rotate(self, now: Array, before: Array, turn: Array, *, restart: bool) -> tuple[Array, Array]:
        """This window's average becomes the previous one."""
        self._run(
            "rotate", {}, {"bool turn": turn, "bool restart": restart}, {"T now": now, "T before": before}
        )
        return now, before

    def apply(
        self, param: Array, update: Array, buffer: Array | None, end: StepEnd, keep: Array
    ) -> tuple[Array, Array | None]:
        """The end of a step."""
        inputs = {
            "T update": update,
            "T length": end.length,
            "T lr": end.lr,
            "T weight_decay": end.weight_decay,
        }
        inputs["bool keep"] = keep
        outputs = {"P param": param}
        defines = {"NESTEROV": 1} if end.nesterov else {}
        if buffer is not None:
            inputs["T momentum"] = end.momentum
            outputs["T buffer"] = buffer
            defines["MOMENTUM"] = 1
        self._run("apply", defines, inputs, outputs)
        return param, buffer

    def _parts(self, count: int, leaf: Array, dtype: Any) -> Array:
        """Memory for each thread's part of `count` sums over a leaf."""
        threads = max(1, min(_THREADS, leaf.shape[0] // _OWN))
        return self.xp.empty((count, threads), dtype=dtype, device=self.device(leaf))

    def _pair(self, leaf: Leaf, valid: Array, defines: dict[str, Any]) -> dict[str, Any]:
        """Inputs from which the next pair is formed."""
        names = ("raw T now_p", "raw T now_g", "raw T prev_p", "raw T prev_g")
        inputs = dict(zip(names, leaf.means, strict=True))
        inputs["bool valid"] = valid
        self._with_root(leaf.root, defines, inputs)
        return inputs

    def _with_root(self, root: Root, defines: dict[str, Any], inputs: dict[str, Any]) -> None:
        """Let a kernel form `R`, if it is not the identity."""
        if isinstance(root, DiagonalRoot):
            inputs |= {"raw T exp_avg_sq": root.exp_avg_sq, "T least": root.floor}
            defines |= {"DIAGONAL": 1, "ROOT(x)": _inverse_power(root.exponent)}

    def _run(
        self,
        name: str,
        defines: dict[str, Any],
        inputs: dict[str, Any],
        outputs: dict[str, Any],
    ) -> None:
        """Run a kernel on arrays and numbers, each given under its declaration."""
        key = (name, *defines.items(), *inputs, *outputs)
        if key not in self._compiled:
            words = {"OWN_VALUES": OWN_VALUES, **defines}
            self._compiled[key] = self._compile(
                ", ".join(inputs),
                ", ".join(outputs),
                BODIES[name],
                f"mlbfgs_{name}",
                preamble="\n".join(f"#define {word} {value}" for word, value in words.items()),
            )
        self._compiled[key](*inputs.values(), *outputs.values())


def _sizes(leaf: Array, parts: Array) -> dict[str, int]:
    return {"int64 length": leaf.shape[0], "int64 threads": parts.shape[1]}


def _is_formed(root: Root) -> bool:
    """Whether the kernels can form it: a diagonal, or the identity."""
    return isinstance(root, DiagonalRoot) or (root.elementwise and not root.arrays)


def _rows(leaf: Leaf, grad: Array) -> tuple[int, Array]:
    """The number of rows, and the history; if there is none, an array that is not read."""
    return (0, grad) if leaf.history is None else (2 * leaf.history.shape[1], leaf.history)


def _inverse_power(exponent: float) -> str:
    """``x ** -exponent`` in C; by square roots where they suffice."""
    roots = square_roots(exponent)
    if roots is None:
        return f"pow(x, T({-exponent!r}))"
    return "(T(1) / " + "sqrt(" * roots + "x" + ")" * roots + ")"
