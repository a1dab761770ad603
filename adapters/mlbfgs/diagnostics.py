"""`mlbfgs_diagnostics` by its short name."""

from typing import Any

import mlbfgs_diagnostics
from mlbfgs_diagnostics import __all__ as __all__


def __getattr__(name: str) -> Any:  # what needs other packages is imported when it is used
    return getattr(mlbfgs_diagnostics, name)
