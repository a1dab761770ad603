"""mL-BFGS for parameters held in NumPy or CuPy arrays: `MLBFGS` updates them in place."""

from .optimizer import MLBFGS

__all__ = ["MLBFGS"]
