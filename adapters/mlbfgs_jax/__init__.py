"""mL-BFGS for JAX: optax transformations."""

from .checkpoint import load_state, save_state
from .diagnostics import block_names, diagnostics
from .transform import MLBFGSState, mlbfgs, scale_by_mlbfgs

__all__ = [
    "MLBFGSState",
    "block_names",
    "diagnostics",
    "load_state",
    "mlbfgs",
    "save_state",
    "scale_by_mlbfgs",
]
