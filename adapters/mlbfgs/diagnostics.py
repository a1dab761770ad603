"""`mlbfgs_diagnostics` by its short name."""

from mlbfgs_diagnostics import *
from mlbfgs_diagnostics import __all__ as __all__
