"""mL-BFGS by short names: `mlbfgs.torch`, `mlbfgs.jax`, `mlbfgs.arrays`, `mlbfgs.scipy`.

Each is the package of the same name with an underscore (`mlbfgs_torch`, ...) and is imported when it is first
used, so that ``import mlbfgs`` imports no framework.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from types import ModuleType as _ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import arrays, core, diagnostics, jax, scipy, torch

__version__ = _version("mlbfgs")

__all__ = ["arrays", "core", "diagnostics", "jax", "scipy", "torch"]


def __getattr__(name: str) -> _ModuleType:
    if name in __all__:
        return _import_module(f".{name}", __name__)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*(name for name in globals() if name.startswith("__")), *__all__])
