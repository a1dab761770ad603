"""A small network, its data, meshes on which it can be spread, and runs of training on them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SETTINGS = {"history_size": 4, "update_every": 8}
RATE = 0.003
SHAPES = {"bias": (16,), "hidden": (8, 16), "out": (16, 8)}
BATCH = 16


class Layout(NamedTuple):
    """A mesh, and how parameters and batches lie on it."""

    axes: dict[str, int]
    params: dict[str, P]
    batch: P


LAYOUTS = {
    "data": Layout({"data": 8}, {"bias": P(), "hidden": P(), "out": P()}, P("data")),
    "fully sharded": Layout(
        {"data": 8}, {"bias": P("data"), "hidden": P("data"), "out": P("data")}, P("data")
    ),
    "tensor": Layout({"model": 8}, {"bias": P("model"), "hidden": P(None, "model"), "out": P("model")}, P()),
    "data and tensor": Layout(
        {"data": 2, "model": 4}, {"bias": P(), "hidden": P("data", "model"), "out": P("model")}, P("data")
    ),
}


def need_devices(count: int = 8) -> None:
    """Raise unless there are this many devices."""
    if jax.device_count() < count:
        flag = f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        msg = f"these tests need {count} devices, got {jax.device_count()}; set {flag}"
        raise RuntimeError(msg)


def make_mesh(layout: Layout, kind: AxisType, devices: Any = None) -> Mesh:
    names = tuple(layout.axes)
    return jax.make_mesh(tuple(layout.axes.values()), names, (kind,) * len(names), devices=devices)


def make_params(dtype: Any = "float64") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: (rng.normal(size=shape) / 3).astype(dtype) for name, shape in SHAPES.items()}


@functools.cache
def make_batch(step: int, dtype: Any = "float64") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1 + step)
    x = rng.normal(size=(BATCH, 8))
    return x.astype(dtype), np.sin(x + np.roll(x, 1, axis=1)).astype(dtype)


def loss(params: Any, batch: Any) -> jax.Array:
    x, y = batch
    hidden = jnp.tanh(x @ params["hidden"] + params["bias"])
    return jnp.mean((hidden @ params["out"] - y) ** 2)


def place(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Copies of arrays on a mesh, each process placing its own part; `specs` may be one for all."""

    def one(leaf: Any, spec: P) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(
            leaf.shape, NamedSharding(mesh, spec), lambda index: jnp.array(leaf[index])
        )

    specs = jax.tree.map(lambda _: specs, tree) if isinstance(specs, P) else specs
    return jax.tree.map(one, tree, specs)


def stepper(tx: optax.GradientTransformation, specs: Any = None) -> Any:
    """One step, for `jax.jit`; with `specs` for a mesh of explicit axes."""
    gradient = jax.grad(loss)
    if specs is not None:
        gradient = jax.sharding.auto_axes(gradient, out_sharding=specs)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return step


class Run:
    """Training on one device; the start of a run on several."""

    def __init__(self, tx: Any, dtype: Any = "float64", step: Any = None) -> None:
        self.tx, self.dtype, self.context = tx, dtype, contextlib.nullcontext
        self.step = jax.jit(step or stepper(tx), donate_argnums=(0, 1))

    def placed_params(self, params: Any) -> Any:
        return jax.tree.map(jnp.array, params)

    def placed_batch(self, batch: Any) -> Any:
        return batch

    def start(self) -> tuple[Any, Any]:
        params = self.placed_params(make_params(self.dtype))
        with self.context():
            return params, self.tx.init(params)

    def train(self, params: Any, state: Any, first: int, last: int) -> Any:
        """Yield parameters and state after each step from `first` on; the arguments are donated."""
        for number in range(first, last):
            params, state = self.take(params, state, make_batch(number, self.dtype))
            yield params, state

    def take(self, params: Any, state: Any, batch: Any) -> Any:
        """One step."""
        with self.context():
            return self.step(params, state, self.placed_batch(batch))


class MeshRun(Run):
    """Training under `jit` on a mesh."""

    def __init__(
        self, tx: Any, layout: Layout, kind: AxisType = AxisType.Auto, dtype: Any = "float64",
        devices: Any = None,
    ) -> None:  # fmt: skip
        explicit = kind is AxisType.Explicit
        super().__init__(tx, dtype, stepper(tx, layout.params if explicit else None))
        self.layout, self.mesh = layout, make_mesh(layout, kind, devices)
        if explicit:
            self.context = functools.partial(jax.set_mesh, self.mesh)
        else:  # else XLA may choose to shard what is replicated
            shardings = jax.tree.map(lambda leaf: leaf.sharding, self.start())
            self.step = jax.jit(stepper(tx), donate_argnums=(0, 1), out_shardings=shardings)

    def placed_params(self, params: Any) -> Any:
        return place(params, self.mesh, self.layout.params)

    def placed_batch(self, batch: Any) -> Any:
        return place(batch, self.mesh, self.layout.batch)


def after(run: Run, steps: int) -> tuple[Any, Any]:
    """Parameters and state after this many steps from the start."""
    *_, last = run.train(*run.start(), 0, steps)
    return last


def deviation(actual: Any, expected: Any) -> float:
    """The largest difference, relative to the largest magnitude."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    largest = max(np.max(np.abs(np.asarray(b))) for _, b in pairs)
    return float(max(np.max(np.abs(np.asarray(a) - np.asarray(b))) for a, b in pairs) / largest)


def assert_same(actual: Any, expected: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_skipped(actual: Any, before: Any) -> None:
    """Parameters and state are those from before the step, except the fields that say it was skipped."""
    (params, (own, *others)), (old_params, (old, *old_others)) = actual, before
    assert not own.accepted
    assert not own.due
    assert int(own.skipped) == int(old.skipped) + 1
    told = own._replace(skipped=old.skipped, accepted=old.accepted, due=old.due)
    assert_same((params, told, others), (old_params, old, old_others))
