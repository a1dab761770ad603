"""What is needed for a part of this package only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["needed"]


@contextmanager
def needed(name: str) -> Iterator[None]:
    """While a function of this name imports what it needs, say where that comes from."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        msg = f"`mlbfgs_diagnostics.{name}` needs {package}: pip install 'mlbfgs[diagnostics]'"
        raise ModuleNotFoundError(msg, name=package) from error
