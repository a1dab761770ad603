"""The core's kernels on CuPy: each a single pass over memory, written in CUDA C.

A pass that sums is a loop of many threads at equal distances; each adds up its own part of the sums, in the
order of the leaf, and a second, small sum adds the parts. No product goes through a matrix library, so that
inner products have full precision whatever that library is allowed, and a history of half precision is read
as it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlbfgs_core as core
from mlbfgs_core.kernels import Means, Metric, PairTile, Projection, square_roots

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

    def rows(self, history: Array, tile: Any, dtype: Any) -> Array:
        """The tile of a history as a matrix of 2m rows, in the history's own dtype."""
        return history[(slice(None), slice(None), *tile)].reshape((2 * history.shape[1], -1))

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

    def project(
        self,
        history: Array,
        grad: Array,
        mean_grad: Array | None,
        scatter_weight: Array,
        metric: Metric | None,
        dtype: Any,
    ) -> Projection:
        """Project a gradient on the stored rows."""
        m = history.shape[1]
        sums = self._parts(2 * m + 3, grad, dtype)
        defines: dict[str, Any] = {"ROWS": 2 * m}
        inputs = {"raw H history": history, "raw G grad": grad, **_sizes(grad, sums)}
        outputs = {"raw T sums": sums, "T last": sums[-1, ...]}
        root = None
        if metric is not None:
            root = outputs["raw T root"] = self.scratch(history, grad, dtype)
            weight = self.xp.zeros_like(metric.floor) if metric.weight is None else metric.weight
            inputs |= {"raw T moment": metric.moment, "T weight": weight, "T least": metric.floor}
            defines |= {"METRIC": 1, "INVERSE_POWER(x)": _inverse_power(metric.power / 4)}
        if mean_grad is not None:
            inputs["raw T mean"] = mean_grad
            defines["SCATTER"] = 1
        self._run("project", defines, inputs, outputs)
        total = self.xp.sum(sums, axis=1)
        return Projection(
            total[: 2 * m],
            total[2 * m, ...],
            None if metric is None else total[2 * m + 1, ...],
            None if mean_grad is None else total[2 * m + 2, ...] * scatter_weight,
            root,
        )

    def combine(
        self,
        history: Array,
        grad: Array,
        coefficients: Array,
        gamma: Array,
        metric: Metric | None,
        keep: Array,
        dtype: Any,
    ) -> tuple[Array, Array | None]:
        """``gamma g + B^T c``."""
        squares = self._parts(1, grad, dtype)
        inputs = {"raw H history": history, "raw G grad": grad, "raw T coefficients": coefficients}
        inputs |= {"T gamma": gamma, "bool keep": keep, **_sizes(grad, squares)}
        update = self._with_root(metric, inputs)
        update = self.scratch(history, grad, dtype) if update is None else update
        defines = {"ROWS": 2 * history.shape[1], **_if("METRIC", metric)}
        outputs = {"raw T update": update, "T square": squares[0, ...]}
        self._run("combine", defines, inputs, outputs)
        return update, None if metric is None else self.xp.sum(squares)

    def update_means(
        self,
        mean_params: Array,
        mean_grads: Array,
        metric: Metric | None,
        param: Array,
        grad: Array,
        weight: Array,
        keep: Array,
    ) -> tuple[Array, Array, Array | None]:
        """Averages of parameter, gradient and squared gradient."""
        inputs = {"P param": param, "G grad": grad, "T weight": weight, "bool keep": keep}
        outputs = {"T mean_p": mean_params, "T mean_g": mean_grads}
        if metric is not None:
            inputs["T moment_weight"] = metric.weight
            outputs["T moment"] = metric.moment
        self._run("update_means", _if("METRIC", metric), inputs, outputs)
        return mean_params, mean_grads, None if metric is None else metric.moment

    def pair_products(self, means: Means, metric: Metric | None, valid: Array) -> list[PairTile]:
        """Inner products of ``s`` and ``y``."""
        x = means.params
        inputs = self._pair(means, metric, valid)
        defines = _if("METRIC", metric)
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

    def write_pair(
        self,
        history: Array,
        slot: Array,
        means: Means,
        metric: Metric | None,
        valid: Array,
        inverse_norm: Array,
        damping: tuple[Array, Array],
        keep: Array,
    ) -> Array:
        """Store a pair at a slot of the ring."""
        inputs = self._pair(means, metric, valid)
        inputs |= {"T inverse_norm": inverse_norm, "T y_weight": damping[0], "T s_weight": damping[1]}
        inputs |= {"bool keep": keep, "int64 slot": slot, "int64 slots": history.shape[1]}
        inputs["int64 length"] = means.params.shape[0]
        # Only the shape of `like` is used: the loop is over the values of the leaf.
        inputs["T like"] = means.params
        self._run("write_pair", _if("METRIC", metric), inputs, {"raw H history": history})
        return history

    def rotate(self, means: Means, turn: Array, *, restart: bool) -> Means:
        """This window's averages become the previous ones."""
        names = ("T now_p", "T now_g", "T prev_p", "T prev_g")
        inputs = {"bool turn": turn, "bool restart": restart}
        self._run("rotate", {}, inputs, dict(zip(names, means, strict=True)))
        return means

    def descend(
        self,
        param: Array,
        update: Array,
        length: Array,
        buffer: Array | None,
        lr: Any,
        momentum: float,
        weight_decay: float,
        keep: Array,
        *,
        nesterov: bool,
    ) -> None:
        """Momentum, weight decay and learning rate where `keep`; writes to the parameter and the buffer.
        Moves 5 values; a parameter's value that is not finite stays as it is."""
        inputs = {"T update": update, "T length": length, "T lr": lr, "T weight_decay": weight_decay}
        inputs["bool keep"] = keep
        outputs = {"P param": param}
        if buffer is not None:
            inputs["T momentum"] = momentum
            outputs["T buffer"] = buffer
        defines = _if("MOMENTUM", buffer) | ({"NESTEROV": 1} if nesterov else {})
        self._run("descend", defines, inputs, outputs)

    def _parts(self, count: int, leaf: Array, dtype: Any) -> Array:
        """Memory for each thread's part of so many sums over a leaf."""
        threads = max(1, min(_THREADS, leaf.shape[0] // _OWN))
        return self.xp.empty((count, threads), dtype=dtype, device=self.device(leaf))

    def _pair(self, means: Means, metric: Metric | None, valid: Array) -> dict[str, Any]:
        """Inputs from which a pair is formed."""
        names = ("raw T now_p", "raw T now_g", "raw T prev_p", "raw T prev_g")
        inputs = dict(zip(names, means, strict=True))
        inputs["bool valid"] = valid
        self._with_root(metric, inputs)
        return inputs

    def _with_root(self, metric: Metric | None, inputs: dict[str, Any]) -> Array | None:
        """The metric's root, which enters the inputs; None without a metric."""
        if metric is None:
            return None
        inputs["raw T root"] = metric.inverse_root(self, (...,))
        return inputs["raw T root"]

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


def _if(word: str, given: Any) -> dict[str, int]:
    return {} if given is None else {word: 1}


def _inverse_power(exponent: float) -> str:
    """``x ** -exponent`` in C; by square roots where they suffice."""
    roots = square_roots(exponent)
    if roots is None:
        return f"pow(x, T({-exponent!r}))"
    return "(T(1) / " + "sqrt(" * roots + "x" + ")" * roots + ")"
