"""An optimizer's diagnostics as a table, as the figure of a recorded run, and as scalars for TensorBoard.

`table` needs Rich and `figure` needs matplotlib, which ``mlbfgs[diagnostics]`` installs; all else needs
neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .recorder import Reading, Recorder
from .rules import advice, remarks
from .scalars import log_scalars

if TYPE_CHECKING:
    from .figures import figure
    from .tables import table

__all__ = ["Reading", "Recorder", "advice", "figure", "log_scalars", "remarks", "table"]

_LATER = {"figure": ".figures", "table": ".tables"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    try:
        return getattr(import_module(_LATER[name], __name__), name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        msg = f"`{__name__}.{name}` needs {package}: pip install 'mlbfgs[diagnostics]'"
        raise ModuleNotFoundError(msg, name=package) from error


def __dir__() -> list[str]:
    return __all__
