"""`mlbfgs_arrays` by its short name."""

from mlbfgs_arrays import *
from mlbfgs_arrays import __all__ as __all__
