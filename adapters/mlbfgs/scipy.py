"""`mlbfgs_scipy` by its short name."""

from mlbfgs_scipy import *
from mlbfgs_scipy import __all__ as __all__
