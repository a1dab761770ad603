"""Examples are imported like a file of one's own; Keras runs on JAX unless told otherwise."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jax

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples" / "embedding"))
jax.config.update("jax_enable_x64", True)
