"""`minimize_mlbfgs`: the core as a `method` of `scipy.optimize.minimize`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import OptimizeResult, OptimizeWarning

import mlbfgs_core as core

from .curvature import Curvature, InverseHessian
from .objective import Evaluation, Objective, Vector, under
from .options import IN_USERS_CODE, Options, read_options
from .run import Halts, descend, follow
from .textbook import Textbook, is_textbook

__all__ = ["minimize_mlbfgs"]


def minimize_mlbfgs(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    jac: Any = None,
    hess: Any = None,
    hessp: Any = None,
    bounds: Any = None,
    constraints: Any = (),
    callback: Callable[..., Any] | None = None,
    **options: Any,
) -> OptimizeResult:
    """L-BFGS for `scipy.optimize.minimize`: with line searches, or with steps of a given length under noise.

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)`` returns a number, and with ``jac=True`` also the gradient.
    x0 : (n,) array
        Real; it is not modified.
    args : tuple
        Further arguments of `fun` and `jac`.
    jac : callable, True, None or "2-point"
        The gradient, ``jac(x, *args)`` of shape (n,). None and "2-point" mean forward differences with step
        `eps`. (SciPy passes None to a callable method for every scheme of differences.)
    hess, hessp : optional
        Not used; giving them causes a warning.
    bounds, constraints : optional
        Refused.
    callback : callable, optional
        Called after each iteration as ``callback(intermediate_result=OptimizeResult(x, fun))`` if this is the
        name of its only argument, otherwise as ``callback(x)``. `StopIteration` ends the run.
    **options
        What `scipy.optimize.minimize` takes as `options`: those below, and settings of `mlbfgs_core.Config`
        by name: `history_size`, `preset`, ... The preset is "lbfgs", or "fit" with a `learning_rate`.

    Other Parameters
    ----------------
    tol : float, optional
        Used as `gtol` if that is not given.
    maxiter : int
        Largest number of iterations; by default 15000, or 1000 with a `learning_rate`.
    gtol : float
        The run ends when no component of the gradient is larger; by default 1e-5. With a `learning_rate`
        there is no such test by default.
    ftol : float
        The run ends when ``(f_k - f_{k+1}) / max(|f_k|, |f_{k+1}|, 1)`` is at most this; 0 turns this off.
    c1, c2 : float
        Constants of the strong Wolfe conditions.
    maxls : int
        Largest number of trials of one kind in a line search.
    eps : float or (n,) array
        Absolute step of the differences.
    learning_rate : float or callable, optional
        For noisy objectives: take `maxiter` steps of this length (or of its value at the iteration's number,
        from 0 on), without a line search. A non-finite gradient costs its step.
    momentum : float, optional
        Momentum of the steps with a `learning_rate`; by default that of the preset.
    disp : bool
        Print how the run ended, and warn if it failed.
    return_all : bool
        Put all iterates in the result's `allvecs`.

    Returns
    -------
    scipy.optimize.OptimizeResult
        `x`, `fun`, `jac`, `nit`, `nfev`, `njev`, `status`, `success` and `message` (see `Outcome`),
        `hess_inv`, an `InverseHessian`, and `diagnostics`, a list of one `mlbfgs_core.Diagnostics`. If a run
        with line searches fails, `x` is its last point, or the lowest that it has seen if that is lower by
        more than rounding; after steps of a given length, it is the last point at which everything was
        finite.

    Raises
    ------
    ValueError, TypeError
        For bounds or constraints, options out of range, a complex start, and functions that do not return a
        number and a gradient.

    Warns
    -----
    OptimizeWarning
        For unknown options, as in SciPy's own methods.
    RuntimeWarning
        For a Hessian, which is not used.

    Notes
    -----
    With exact values this is textbook L-BFGS: a direction from the last `history_size` pairs, then a line
    search for the strong Wolfe conditions, whose first trial is the whole direction. The search uses
    differences of values, and the gradients where values differ only by rounding, so that neither an offset
    in the objective nor the scale of the variables keeps a gradient from reaching `gtol`. If a search fails,
    the run moves to the lowest point that it has seen; if no point was lower, curvature is forgotten, and a
    second search goes along the negative gradient. Apart from the evaluations an iteration costs about 0.1
    milliseconds for small `n` (about one with settings other than those of ``preset="lbfgs"``); for large `n`
    it moves about ``14 * history_size`` values per variable. A value that is not finite counts as infinitely
    high.

    The functions run under the caller's `numpy.errstate`; our own arithmetic raises no errors or warnings.

    Under noise `x` is the last iterate. The lowest value seen would be the luckiest draw of the noise, not
    the best point; a `learning_rate` that falls makes the last iterate a good one.

    References
    ----------
    Nocedal & Wright, Numerical Optimization, 2nd ed., algorithms 3.5 and 7.5.

    Examples
    --------
    >>> from scipy.optimize import minimize, rosen, rosen_der
    >>> result = minimize(rosen, [-1.2, 1.0], jac=rosen_der, method=minimize_mlbfgs)
    >>> result.success, result.x.round(4)
    (True, array([1., 1.]))

    Under noise:

    >>> noise = np.random.default_rng(0)
    >>> def draw(x):
    ...     return x @ x, 2 * x + 0.1 * noise.normal(size=x.size)
    >>> result = minimize(
    ...     draw,
    ...     np.ones(3),
    ...     jac=True,
    ...     method=minimize_mlbfgs,
    ...     options={"learning_rate": lambda k: 0.5 / (1 + k / 10), "maxiter": 200},
    ... )
    >>> bool(result.fun < 1e-2)
    True
    """
    _check_what_is_not_used(bounds, constraints, hess, hessp)
    checked = read_options(options)
    x = _check_start(x0)
    errors = np.geterr()  # the caller's settings apply only to the caller's functions
    objective = Objective(fun, jac, args if isinstance(args, tuple) else (args,), checked.eps, errors)
    if callable(checked.learning_rate):
        checked = replace(checked, learning_rate=under(errors, checked.learning_rate))
    path = [x.copy()]
    halts = _halts(
        None if callback is None else under(errors, callback), path if checked.return_all else None
    )
    with np.errstate(all="ignore"):
        result = _run(objective, x, checked, halts)
    if checked.return_all:
        result["allvecs"] = path
    if checked.disp:
        _tell(result)
    return result


def _run(objective: Objective, x: Vector, options: Options, halts: Halts) -> OptimizeResult:
    curvature: Curvature | Textbook
    if options.learning_rate is not None:
        curvature = Curvature(options.config, x.size)
        report = follow(objective, x, curvature, options, halts)
    else:
        kind = Textbook if is_textbook(options.config) else Curvature
        curvature = kind(options.config, x.size)
        report = descend(objective, x, curvature, options, halts)
    state = curvature.state
    return OptimizeResult(
        x=report.point.x,
        fun=report.point.value,
        jac=report.point.grad,
        nit=report.iterations,
        nfev=objective.nfev,
        njev=objective.njev,
        status=report.outcome.status,
        success=report.outcome.success,
        message=report.outcome.message,
        hess_inv=InverseHessian(options.config, state),
        diagnostics=[core.diagnostics(state)],
    )


def _check_what_is_not_used(bounds: Any, constraints: Any, hess: Any, hessp: Any) -> None:
    if bounds is not None:
        msg = (
            f"`bounds` must be None, got {bounds!r}: minimize_mlbfgs takes none, "
            "method='L-BFGS-B' or 'trust-constr' does"
        )
        raise ValueError(msg)
    if constraints is not None and np.size(constraints) > 0:
        msg = (
            f"`constraints` must be empty, got {constraints!r}: minimize_mlbfgs takes none, "
            "method='trust-constr' does"
        )
        raise ValueError(msg)
    unused = {"Hessian information (hess)": hess, "Hessian-vector product information (hessp)": hessp}
    for name, given in unused.items():
        if given is not None:
            msg = f"Method minimize_mlbfgs does not use {name}."
            warnings.warn(msg, RuntimeWarning, stacklevel=IN_USERS_CODE)


def _check_start(x0: Any) -> Vector:
    if np.iscomplexobj(x0):
        msg = f"`x0` must be real, got {np.asarray(x0).dtype}: give real and imaginary parts side by side"
        raise TypeError(msg)
    x = np.array(x0, dtype=np.float64).ravel()
    if x.size == 0:
        msg = "`x0` must hold at least one number, got an empty array"
        raise ValueError(msg)
    return x


def _halts(callback: Callable[..., Any] | None, path: list[Vector] | None) -> Halts:
    """Records an iterate, and passes it to the callback in the form that its signature asks for."""
    named = callback is not None and _takes_result(callback)

    def halts(point: Evaluation) -> bool:
        if path is not None:
            path.append(point.x.copy())
        if callback is None:
            return False
        try:
            if named:
                callback(intermediate_result=OptimizeResult(x=point.x.copy(), fun=point.value))
            else:
                callback(point.x.copy())
        except StopIteration:
            return True
        return False

    return halts


def _takes_result(callback: Callable[..., Any]) -> bool:
    try:
        return set(inspect.signature(callback).parameters) == {"intermediate_result"}
    except ValueError:  # a callable in C without a signature
        return False


def _tell(result: OptimizeResult) -> None:
    """Say how a run ended, as SciPy's BFGS does."""
    if result.success:
        print(result.message)  # noqa: T201
    else:
        warnings.warn(result.message, OptimizeWarning, stacklevel=IN_USERS_CODE)
    print(f"         Current function value: {result.fun:f}")  # noqa: T201
    print(f"         Iterations: {result.nit:d}")  # noqa: T201
    print(f"         Function evaluations: {result.nfev:d}")  # noqa: T201
    print(f"         Gradient evaluations: {result.njev:d}")  # noqa: T201
