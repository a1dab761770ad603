"""Parameters as real arrays: complex ones as pairs, and half precision widened; and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mlbfgs_core.adapter import accumulation_dtype, dtype_name

__all__ = ["COMPLEX", "as_real", "from_real", "kind", "paired", "widened"]

COMPLEX = {"complex64": "float32", "complex128": "float64"}
"""The dtype of the parts of each complex one."""


def as_real(leaf: Any) -> Any:
    """A leaf as an array of JAX (unless it is abstract), a complex one as pairs of reals."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        dtype = COMPLEX.get(dtype_name(leaf))
        return leaf if dtype is None else jax.ShapeDtypeStruct((*leaf.shape, 2), dtype)
    leaf = jnp.asarray(leaf)
    return leaf if dtype_name(leaf) not in COMPLEX else jnp.stack([jnp.real(leaf), jnp.imag(leaf)], axis=-1)


def from_real(values: Any, leaf: Any) -> Any:
    """The inverse of `as_real`, in the dtype of a leaf."""
    return paired(values, leaf).astype(leaf.dtype)


def paired(values: Any, leaf: Any) -> Any:
    """Pairs of reals as complex values where a leaf is complex."""
    if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return values
    return lax.complex(values[..., 0], values[..., 1])


def kind(leaf: Any) -> str:
    """Dtype and shape in words."""
    return f"{dtype_name(leaf)} of shape {tuple(leaf.shape)}"


def widened(tree: Any) -> Any:
    """Leaves of half precision in float32."""

    def wide(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype") or dtype_name(leaf) not in ("float16", "bfloat16"):
            return leaf
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, accumulation_dtype(leaf))
        return jnp.astype(leaf, accumulation_dtype(leaf))

    return jax.tree.map(wide, tree)
