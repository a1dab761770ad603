"""mL-BFGS for CuPy arrays: the optimizer of `mlbfgs_arrays`, which serves NumPy too."""

from mlbfgs_arrays import MLBFGS

__all__ = ["MLBFGS"]
