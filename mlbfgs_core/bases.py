"""The bases of a Kronecker preconditioner: formed after the first step, turned after later ones."""

from __future__ import annotations

from typing import Any

from .call import Call, When, remembered, run_if
from .preconditioner import is_basis_step
from .state import State

__all__ = ["renew"]

Array = Any


def renew(call: Call, state: State, accepted: Array, when_formed: When, when_turned: When) -> State:
    """New bases where the schedule asks for them after an accepted step, and the stored pairs in them."""
    if not call.preconditioner.has_matrices:
        return state
    first = accepted & (state.step == 1)
    state = run_if(when_formed, first, lambda old: _formed(call, old, first), state)
    later = accepted & is_basis_step(call.config, state.step)
    return run_if(when_turned, later, lambda old: _turned(call, old, later), state)


def _roots(call: Call, state: State) -> list[Any]:
    return call.roots(
        state, [None if array is None else array.dtype for array in state.preconditioner["exp_avg_sq"]]
    )


def _formed(call: Call, state: State, due: Array) -> State:
    """Bases of eigenvectors; there are no pairs yet."""
    due = call.kernels.to_leaf(due)
    roots = [root if root.elementwise else root.formed(call.kernels, due) for root in _roots(call, state)]
    return state._replace(preconditioner=remembered(state, roots))


def _turned(call: Call, state: State, due: Array) -> State:
    """Bases after a power iteration."""
    due, roots, history = call.kernels.to_leaf(due), _roots(call, state), list(state.history)
    for leaf, root in enumerate(roots):
        if not root.elementwise:
            roots[leaf], rows = root.turned(call.kernels, history[leaf] if history else None, due)
            if history:
                history[leaf] = rows
    return state._replace(preconditioner=remembered(state, roots), history=tuple(history))
