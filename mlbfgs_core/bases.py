"""The bases of a Kronecker preconditioner: formed before the first step, turned after later ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .call import Call, When, remembered, run_if
from .preconditioner import is_basis_step
from .state import State

__all__ = ["form", "turn"]

Array = Any


def form(call: Call, state: State, roots: list[Any], grads: Sequence[Array | None], when: When) -> list[Any]:
    """Roots with bases from the very first gradient; the state has them once it has accepted that."""
    if when is False or not call.preconditioner.has_matrices:
        return roots
    first = state.step == 0
    due = call.kernels.to_leaf(first)
    chosen = [
        None if root is None or grad is None or root.elementwise else root
        for root, grad in zip(roots, grads, strict=True)
    ]

    def part(old: list[Any]) -> list[Any]:
        return [
            bases if root is None else root.formed(call.kernels, grad, due, call.sums_of(leaf))
            for leaf, (root, bases, grad) in enumerate(zip(chosen, old, grads, strict=True))
        ]

    bases = run_if(when, first, part, [None if root is None else root.bases for root in chosen])
    return [
        root if own is None else own.starting(new, due)
        for root, own, new in zip(roots, chosen, bases, strict=True)
    ]


def turn(call: Call, state: State, accepted: Array, when: When, when_rows: bool | None = None) -> State:
    """New bases by a power iteration where the schedule asks for them after an accepted step, and the stored
    pairs in them, unless none is known to say anything (`when_rows` is False)."""
    if not call.preconditioner.has_matrices:
        return state
    due = accepted & is_basis_step(call.config, state.step)
    return run_if(when, due, lambda old: _turned(call, old, due, when_rows is not False), state)


def _turned(call: Call, state: State, due: Array, rows: bool) -> State:
    due, history = call.kernels.to_leaf(due), list(state.history)
    dtypes = [None if array is None else array.dtype for array in state.preconditioner["exp_avg_sq"]]
    roots = call.roots(state, dtypes)
    for leaf, root in enumerate(roots):
        if not root.elementwise:
            own = history[leaf] if history and rows else None
            roots[leaf], new = root.turned(call.kernels, own, due, call.sums_of(leaf))
            if own is not None:
                history[leaf] = new
    return state._replace(preconditioner=remembered(state, roots), history=tuple(history))
