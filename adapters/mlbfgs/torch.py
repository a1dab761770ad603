"""`mlbfgs_torch` by its short name."""

from mlbfgs_torch import *
from mlbfgs_torch import __all__ as __all__
