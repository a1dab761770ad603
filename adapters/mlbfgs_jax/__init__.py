"""mL-BFGS for JAX: optax transformations."""

from .checkpoint import load_state, save_state
from .diagnostics import block_names, diagnostics
from .state import MLBFGSState
from .transform import mlbfgs, scale_by_mlbfgs

__all__ = [
    "MLBFGSState",
    "block_names",
    "diagnostics",
    "load_state",
    "mlbfgs",
    "save_state",
    "scale_by_mlbfgs",
]
