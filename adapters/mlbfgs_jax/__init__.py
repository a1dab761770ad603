"""mL-BFGS for JAX: optax transformations."""

from .transform import MLBFGSState, mlbfgs, scale_by_mlbfgs

__all__ = ["MLBFGSState", "mlbfgs", "scale_by_mlbfgs"]
