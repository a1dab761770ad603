"""mL-BFGS for JAX: optax transformations."""

from .checkpoint import load_state, save_state
from .transform import MLBFGSState, mlbfgs, scale_by_mlbfgs

__all__ = ["MLBFGSState", "load_state", "mlbfgs", "save_state", "scale_by_mlbfgs"]
