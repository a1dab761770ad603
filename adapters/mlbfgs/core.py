"""`mlbfgs_core` by its short name."""

from mlbfgs_core import *
from mlbfgs_core import __all__ as __all__
