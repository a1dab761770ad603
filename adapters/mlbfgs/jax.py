"""`mlbfgs_jax` by its short name."""

from mlbfgs_jax import *
from mlbfgs_jax import __all__ as __all__
