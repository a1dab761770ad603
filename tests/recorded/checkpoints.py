"""The runs that were saved halfway, and how they continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .problem import DATA, SIZE, Case, flat, follow, split
from .runs import begin, readers

__all__ = ["FILES", "NATIVE", "SAVED_AT", "Saved", "load", "load_native", "rest", "save_native"]

SAVED_AT, END, STRIDE = 16, 28, 3
"""Steps before and after the file was written, and from one recorded step to the next."""


class Saved(NamedTuple):
    """A file: which backend wrote it, and for which run."""

    kind: str
    case: Case
    dtype: str = "float64"

    def __str__(self) -> str:
        return f"{self.kind}, {self.case}, {self.dtype}"

    def path(self, suffix: str) -> Path:
        """The place of the file."""
        return DATA / f"{self}.{suffix}".replace(", ", "-").replace(" ", "_")

    def readers(self) -> list[str]:
        """The backends that read it; the continuation by the first is recorded."""
        return ["groups"] if self.kind == "groups" else readers(self.case)

    def begin(self, kind: str, values: np.ndarray) -> Any:
        """A run of these settings that begins at any values."""
        named = {name: np.asarray(array, self.dtype) for name, array in split(values).items()}
        return begin(kind, self.case, named)


FILES = [
    *(Saved(kind, Case("default", "all")) for kind in ("numpy", "torch", "jax", "groups")),
    *(Saved(kind, Case("default", "layer", "missing")) for kind in ("torch", "jax")),
    Saved("numpy", Case("power 0", "parameter")),
    Saved("numpy", Case("clip", "layer")),  # without momentum
    Saved("jax", Case("bfloat16 history", "all")),
    Saved("torch", Case("default", "all", "tiny")),
    Saved("torch", Case("default", "all"), "float32"),
]
"""Files of `save_state`, which every adapter reads."""
NATIVE = [
    *(Saved(kind, Case("default", "layer", "missing")) for kind in ("numpy", "torch", "groups")),
    *(Saved(kind, Case("power 0", "all")) for kind in ("numpy", "torch")),
    *(Saved(kind, Case("clip", "all")) for kind in ("numpy", "torch")),
]
"""Files of `state_dict`, which only the adapter that wrote it reads."""


def load(kind: str, saved: Saved) -> Any:
    """A run that continues from a neutral file, which holds the parameters, too."""
    run = saved.begin(kind, np.zeros(SIZE))
    run.load(saved.path("safetensors"))
    return run


def save_native(run: Any, saved: Saved) -> None:
    """Write the `state_dict`, as the pages on checkpoints show it."""
    if saved.kind == "numpy":
        np.savez_compressed(saved.path("npz"), **run.native())
    else:
        torch.save(run.native(), saved.path("pt"))


def load_native(saved: Saved, values: np.ndarray) -> Any:
    """A run that continues from a `state_dict` and from given parameters."""
    run = saved.begin(saved.kind, values)
    if saved.kind == "numpy":
        with np.load(saved.path("npz")) as content:
            run.load_native(dict(content))
    else:
        run.load_native(torch.load(saved.path("pt"), weights_only=True))
    return run


def rest(run: Any, saved: Saved) -> np.ndarray:
    """The parameters as they were saved, and then those of the steps that are recorded."""
    return np.stack([flat(run.values()), *follow(run, saved.case, SAVED_AT, END, STRIDE)])
