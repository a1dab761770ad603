"""mL-BFGS by short names: `mlbfgs.torch`, `mlbfgs.jax`, `mlbfgs.arrays`, `mlbfgs.scipy`.

Each is the package of the same name with an underscore (`mlbfgs_torch`, ...) and is imported when it is first
used, so that ``import mlbfgs`` imports no framework.
"""

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

__version__ = version("mlbfgs")

__all__ = ["arrays", "core", "diagnostics", "jax", "scipy", "torch"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f".{name}", __name__)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
