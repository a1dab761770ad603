"""How a run can end: the status and the message of its result, and whether it counts as success."""

from __future__ import annotations

import enum

__all__ = ["Outcome"]


class Outcome(enum.Enum):
    """Why a run ended, and what to try if it did not succeed.

    The statuses are those of SciPy's BFGS (0 success, 1 iterations, 2 precision, 3 not finite) and, for a
    callback, that of every SciPy method (99).

    Examples
    --------
    >>> Outcome.GRADIENT_SMALL.success, Outcome.SEARCH_FAILED.status
    (True, 2)
    """

    GRADIENT_SMALL = 0, "The largest component of the gradient is at most `gtol`."
    DECREASE_SMALL = 0, "The relative decrease of the objective is at most `ftol`."
    STEPS_TAKEN = 0, "All `maxiter` steps of the given `learning_rate` were taken."
    ITERATIONS_USED = 1, "`maxiter` iterations were not enough: try more, or scale the variables alike."
    SEARCH_FAILED = (
        2,
        "No progress: no lower point was found along the direction or the negative gradient, or for many "
        "iterations neither the objective nor its gradient fell by more than rounding: check the gradient "
        "with `scipy.optimize.check_grad`; if it is right, try a larger `gtol`, or scale the variables "
        "alike.",
    )
    START_NOT_FINITE = (
        3,
        "The objective, its gradient or the gradient's square is not finite at `x0`: start where they are.",
    )
    END_NOT_FINITE = (
        3,
        "The objective or its gradient was not finite at the last step; `x` is the last point where both "
        "were finite: try a smaller `learning_rate`.",
    )
    CALLBACK_STOPPED = 99, "`callback` raised `StopIteration`."

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.message = message

    @property
    def success(self) -> bool:
        """Whether the run did what it was asked to do."""
        return self.status == 0
