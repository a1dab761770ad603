"""mL-BFGS for SciPy: a `method` for `scipy.optimize.minimize`."""

from .curvature import InverseHessian
from .minimize import minimize_mlbfgs
from .outcome import Outcome

__all__ = ["InverseHessian", "Outcome", "minimize_mlbfgs"]
