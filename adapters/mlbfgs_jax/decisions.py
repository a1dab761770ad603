"""Decisions on the device, which stay decisions under `vmap`; and constants that XLA is not told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["decide", "undisclosed"]

Array = jax.Array


@jax.custom_batching.custom_vmap
def _anyone(flag: Array) -> Array:
    return flag


@_anyone.def_vmap
def _anyone_of_batch(size: int, batched: Any, flag: Array) -> tuple[Array, bool]:
    return _anyone(jnp.any(flag)), False


def decide(predicate: Array, part: Callable[[Any], Any], operand: Any) -> Any:
    """Run a part on the device if the predicate is true, else return the operand.

    Under `vmap` the part runs for all members as soon as one asks for it; so it must leave alone what is not
    asked for. A `lax.cond` whose predicate differs between members would run it always.
    """
    return lax.cond(_anyone(predicate), part, lambda same: same, operand)


def undisclosed(numbers: Sequence[int], keep: Array) -> Sequence[Any]:
    """Integers that a compiler for CPUs does not know; unspecified where `keep` (0-d bool) is false.

    It compiles one kernel for all operations that differ in such numbers alone, in place of one for each.
    """

    def known(_: Array) -> list[Array]:
        return [jnp.asarray(number, jnp.int32) for number in numbers]

    def chosen(keep: Array) -> list[Array]:
        return lax.cond(_anyone(keep), known, lambda keep: [jnp.zeros((), jnp.int32)] * len(numbers), keep)

    return lax.platform_dependent(keep, cpu=chosen, default=known)
