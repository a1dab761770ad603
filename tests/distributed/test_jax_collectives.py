"""What the devices of a mesh send one another, read from the compiled program: coefficients only."""

from __future__ import annotations

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mlbfgs_jax import mlbfgs
from tests.distributed.jax_hlo import branches, collectives
from tests.distributed.jax_training import (
    LAYOUTS,
    RATE,
    SHAPES,
    make_mesh,
    need_devices,
    place,
)

need_devices()


LARGE = {"bias": (512,), "hidden": (64, 512), "out": (512, 64)}
"""Leaves whose inner products are matrix products."""


def compiled_update(layout, kind=AxisType.Auto, gather=False, shapes=SHAPES, **settings):
    """The program of an update alone, in float32, for gradients that are sharded like the parameters."""
    tx, mesh = mlbfgs(RATE, **settings), make_mesh(layout, kind)
    params = {name: np.ones(shape, "float32") for name, shape in shapes.items()}
    params = place(params, mesh, layout.params)

    def update(params, state, grads):
        if gather:
            whole = NamedSharding(mesh, P())
            history = jax.lax.with_sharding_constraint(state[0].history, whole)
            state = (state[0]._replace(history=history), *state[1:])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    with jax.set_mesh(mesh):
        state = tx.init(params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
        step = jax.jit(update, donate_argnums=(0, 1), out_shardings=shardings)
        return step.lower(params, state, params).compile()


def sent(program):
    """Collective operations that always run, and those within the three decisions."""
    text = program.as_text()
    found = collectives(text)
    always = [operation for operation in found if operation.computation == "ENTRY"]
    parts = {}
    for operation in found:
        if operation.computation != "ENTRY":
            assert operation.computation in branches(text)
            parts.setdefault(operation.computation, []).append(operation)
    return always, sorted(parts.values(), key=len)


M = 5
EACH_STEP = 2 * M + 4
"""For each leaf: projections on 2m rows, two squares, the scatter, and the square of the update."""
EACH_PAIR = 2 + 3
"""For each leaf, at a check and at a refresh: two scales and three inner products."""
EACH_REFRESH = 4 * M + 3 + 2
"""The products of two new rows with 2m, with one another and with the gradient."""


@pytest.mark.parametrize(
    ("name", "kind", "shapes"),
    [("fully sharded", AxisType.Auto, LARGE), ("tensor", AxisType.Explicit, SHAPES)],
    ids=["fully sharded, large", "tensor, explicit"],
)
def test_a_step_sends_coefficients_in_two_reductions_and_gathers_nothing(name, kind, shapes):
    leaves = len(shapes)
    always, parts = sent(compiled_update(LAYOUTS[name], kind, shapes=shapes))
    everything = [*always, *(operation for part in parts for operation in part)]
    assert {operation.kind for operation in everything} == {"all-reduce"}
    by_count = {sum(operation.numbers for operation in part): part for part in parts}
    assert sorted(by_count) == [2 * leaves, leaves * EACH_PAIR, leaves * EACH_REFRESH]
    scale, pair, refresh = (by_count[count] for count in sorted(by_count))
    assert (len(always), len(scale), len(pair), len(refresh)) == (2, 1, 2, 1)
    assert sum(operation.numbers for operation in scale) == 2 * leaves  # gradients' and parameters' largest
    assert sum(operation.numbers for operation in always) == leaves * EACH_STEP
    assert sum(operation.bytes for operation in always) == 4 * leaves * EACH_STEP
    assert sum(operation.numbers for operation in pair) == leaves * EACH_PAIR
    assert sum(operation.numbers for operation in refresh) == leaves * EACH_REFRESH


def test_on_two_axes_too_nothing_is_gathered_and_a_replicated_leaf_not_even_reduced():
    layout = LAYOUTS["data and tensor"]
    always, parts = sent(compiled_update(layout))
    everything = [*always, *(operation for part in parts for operation in part)]
    assert {operation.kind for operation in everything} == {"all-reduce"}
    stages = sum(axis is not None for spec in layout.params.values() for axis in spec)  # one for each axis
    assert stages == 3
    assert sum(operation.numbers for operation in always) == stages * EACH_STEP


def test_replicated_parameters_send_nothing():
    assert collectives(compiled_update(LAYOUTS["data"]).as_text()) == []


def test_a_gathered_history_would_be_seen():
    always, _ = sent(compiled_update(LAYOUTS["fully sharded"], gather=True))
    gathered = [operation for operation in always if operation.kind == "all-gather"]
    sizes = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert sum(operation.numbers for operation in gathered) >= 2 * M * sizes


def test_matrices_gather_gradients_but_stored_pairs_only_when_bases_turn():
    """And then no more than half of a history at a time."""
    found = collectives(
        compiled_update(LAYOUTS["fully sharded"], shapes=LARGE, preconditioner="kronecker").as_text()
    )
    values = int(np.prod(LARGE["hidden"]))
    always = {operation.numbers for operation in found if operation.computation == "ENTRY"}
    assert values in always, "gradients are sent"
    assert not any(size % (M * values) == 0 for size in always)
    turning = {
        operation.computation
        for operation in found
        if operation.kind == "all-gather" and operation.numbers == M * values
    }
    assert len(turning) == 1
    assert not any(operation.numbers == 2 * M * values for operation in found)
