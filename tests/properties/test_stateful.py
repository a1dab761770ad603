"""Whatever a user does to a run, in whatever order, it still agrees with the readable twin.

Each machine drives an adapter through random sequences of steps, faults and changes, and holds parameters,
counts and pairs against `mlbfgs_core.reference` with momentum and weight decay done by hand.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import mlbfgs_core as core
from mlbfgs_core import adapter
from mlbfgs_core.reference import Reference
from tests.drivers import DRIVERS
from tests.helpers import spd

pytestmark = pytest.mark.backends("numpy", "torch", "jax")

SHAPES = {"a.weight": (3, 2), "a.bias": (2,), "b.scale": ()}
ADDED = {"c.late": (2,)}
SETTINGS = {
    "default": {"check_every": 1, "update_every": 5, "history_size": 3},
    "fit": {"preset": "fit", "update_every": 4, "history_size": 3},
    "ema": {"beta": 0.8, "adaptive": False, "update_every": 3, "history_size": 3},
}
CHANGES = {
    "lr": [0.0, 0.01, 0.1, 0.5],
    "momentum": [0.5, 0.9],
    "weight_decay": [0.0, 0.1],
    "min_cosine": [0.2, 0.4],
    "shrinkage": [0.0, 0.5, 1.0],
    "signal_to_noise": [1.0, 4.0],
    "noise_floor": [1.0, 4.0],
    "update_every": [3, 6],
    "clip_factor": [1.0, 2.0],
}
POISONS = st.sampled_from([np.nan, np.inf, -np.inf])


class Oracle:
    """The reference with momentum and decoupled weight decay, on named parameters."""

    def __init__(self, named, blocks, config, nesterov):
        self.x = {name: array.copy() for name, array in named.items()}
        self.momenta = {name: np.zeros_like(array) for name, array in named.items()}
        self.blocks, self.config, self.nesterov = blocks, config, nesterov
        self.numbers = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
        self.parts = core.partition(list(named), blocks)
        self.reference = Reference(config, [sum(named_size(named, i) for i in part) for part in self.parts])

    def add(self, name, array):
        self.x[name], self.momenta[name] = array.copy(), np.zeros_like(array)
        self.parts = core.partition(list(self.x), self.blocks)
        last = len(self.x) - 1
        (block,) = (number for number, part in enumerate(self.parts) if last in part)
        self.reference.extend(block, array.size)

    def set(self, name, value):
        if name in self.numbers:
            self.numbers[name] = value
            return
        old = {field: getattr(self.config, field) for field in adapter.SETTINGS}
        self.config = self.reference.config = core.Config(**{**old, name: value})

    def step(self, grads):
        names, values = list(self.x), list(self.x.values())
        given = [np.zeros(x.shape) if g is None else g for x, g in zip(values, grads, strict=True)]
        present = [np.full(x.shape, g is not None) for x, g in zip(values, grads, strict=True)]

        def flat(arrays):
            return [np.concatenate([np.ravel(arrays[i]) for i in part]) for part in self.parts]

        before = self.reference.skipped
        directions = self.reference.step(flat(values), flat(given), flat(present))
        if self.reference.skipped > before:
            return
        rate, momentum, decay = (self.numbers[name] for name in ("lr", "momentum", "weight_decay"))
        for part, direction in zip(self.parts, directions, strict=True):
            edges = np.cumsum([self.x[names[i]].size for i in part])[:-1]
            for i, d in zip(part, np.split(direction, edges), strict=True):
                name = names[i]
                if grads[i] is None:
                    continue
                d = d.reshape(self.x[name].shape)
                self.momenta[name] = momentum * self.momenta[name] + d
                change = d + momentum * self.momenta[name] if self.nesterov else self.momenta[name]
                self.x[name] = self.x[name] * (1 - rate * decay) - rate * change

    def counts(self):
        kept = sum(len(block.pairs) for block in self.reference.blocks)
        return self.reference.steps, self.reference.skipped, kept


def named_size(named, index):
    return list(named.values())[index].size


class Machine(RuleBasedStateMachine):
    """An adapter next to the oracle."""

    kind = ""
    settings_names = tuple(SETTINGS)
    nesterov_or_not = (True, False)
    may_miss = tuple(SHAPES)
    changes = tuple(CHANGES)

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    @initialize(seed=st.integers(0, 2**32 - 1), data=st.data())
    def begin(self, seed, data):
        self.rng = np.random.default_rng(seed)
        self.blocks = data.draw(st.sampled_from(["all", "layer"]))
        self.own = SETTINGS[data.draw(st.sampled_from(self.settings_names))]
        named = {name: np.asarray(self.rng.normal(size=shape)) for name, shape in SHAPES.items()}
        self.curvature = spd(self.rng, 11)
        self.nesterov = data.draw(st.sampled_from(self.nesterov_or_not))
        self.oracle = Oracle(named, self.blocks, core.Config(**self.own), self.nesterov)
        self.driver = self.fresh(named)

    def fresh(self, named):
        numbers = {"lr": 0.1, "momentum": 0.9, "nesterov": self.nesterov}
        return DRIVERS[self.kind](named, blocks=self.blocks, **numbers, **self.own)

    def gradients(self, missing=()):
        flat = np.concatenate([np.ravel(x) for x in self.oracle.x.values()])
        flat = np.where(np.isfinite(flat), flat, 0.0)
        flat = self.curvature[: flat.size, : flat.size] @ flat + 0.05 * self.rng.normal(size=flat.size)
        edges = np.cumsum([x.size for x in self.oracle.x.values()])[:-1]
        return [
            None if name in missing else np.asarray(part.reshape(x.shape))
            for (name, x), part in zip(self.oracle.x.items(), np.split(flat, edges), strict=True)
        ]

    def both_step(self, grads):
        self.driver.step(grads)
        self.oracle.step(grads)
        self.agree()

    def agree(self):
        for value, (name, expected) in zip(self.driver.values(), self.oracle.x.items(), strict=True):
            finite = np.isfinite(expected)  # optax's decay makes a NaN of an infinity
            np.testing.assert_array_equal(np.isfinite(value), finite, err_msg=name)
            np.testing.assert_allclose(value[finite], expected[finite], rtol=1e-6, atol=1e-7, err_msg=name)
        steps, skipped, pairs = self.driver.counts()
        kept = sum(min(count, self.oracle.config.history_size) for count in pairs)
        assert (steps, skipped, kept) == self.oracle.counts()

    @rule(count=st.integers(1, 8))
    def steps(self, count):
        for _ in range(count):
            self.both_step(self.gradients())

    @rule(data=st.data())
    def a_step_with_missing_gradients(self, data):
        names = st.sets(st.sampled_from(self.may_miss), min_size=1, max_size=min(2, len(self.may_miss)))
        self.both_step(self.gradients(data.draw(names)))

    @rule(poison=POISONS, data=st.data())
    def a_step_with_a_gradient_that_is_not_finite(self, poison, data):
        grads = self.gradients()
        grad = data.draw(st.sampled_from(range(len(grads))))
        grads[grad].flat[data.draw(st.integers(0, grads[grad].size - 1))] = poison
        before = self.driver.values()
        self.both_step(grads)
        for a, b in zip(self.driver.values(), before, strict=True):
            np.testing.assert_array_equal(a, b)

    @rule(value=st.one_of(POISONS, st.just(0.3)))
    def a_parameter_is_overwritten(self, value):
        self.driver.put("a.weight", 4, value)
        self.oracle.x["a.weight"].flat[4] = value

    @rule(data=st.data())
    def a_number_changes(self, data):
        name = data.draw(st.sampled_from(self.changes))
        value = data.draw(st.sampled_from(CHANGES[name]))
        self.driver.set(name, value)
        self.oracle.set(name, value)

    @rule()
    def saved_and_loaded_in_a_new_process(self):
        path = Path(self.folder.name) / "run.safetensors"
        self.driver.save(path)
        self.driver = self.resumed(lambda driver: driver.load(path))

    @rule()
    def saved_and_loaded_by_the_framework_s_own_means(self):
        state, values = self.driver.native(), self.driver.values()
        self.driver = self.resumed(lambda driver: driver.load_native(state), values)

    def resumed(self, load, values=None):
        """A new optimizer, its parameters set by the user or by the file, with the same hyperparameters."""
        start = [np.full_like(x, 7.0) for x in self.oracle.x.values()] if values is None else values
        old = dict(zip(self.oracle.x, start, strict=True))
        driver = self.fresh({name: old[name] for name in SHAPES})
        for name in old.keys() - SHAPES.keys():
            driver.add(name, old[name])
        load(driver)
        for name in self.changes:
            value = self.oracle.numbers.get(name, getattr(self.oracle.config, name, None))
            driver.set(name, value)
        return driver

    @rule()
    def copied_while_the_original_goes_on(self):
        original, self.driver = self.driver, self.driver.copied()
        for _ in range(2):
            original.step([x * 0 + 1.0 for x in self.oracle.x.values()])
        self.agree()


class TorchMachine(Machine):
    """A parameter group may join during a run."""

    kind = "torch"

    @precondition(lambda self: len(self.oracle.x) == len(SHAPES))
    @rule()
    def a_group_is_added(self):
        for name, shape in ADDED.items():
            array = np.asarray(self.rng.normal(size=shape))
            self.driver.add(name, array)
            self.oracle.add(name, array)


class ArrayMachine(Machine):
    """NumPy arrays."""

    kind = "numpy"


class JaxMachine(Machine):
    """Fewer kinds of steps, since each is compiled."""

    kind = "jax"
    settings_names = ("default",)
    nesterov_or_not = (True,)
    may_miss = ("a.bias",)


@pytest.mark.filterwarnings("ignore:MLBFGS has refused the last:UserWarning")
@pytest.mark.parametrize("machine", [TorchMachine, ArrayMachine, JaxMachine], ids=lambda m: m.kind)
def test_any_sequence_of_steps_faults_and_changes_stays_with_the_reference(machine):
    examples = settings().max_examples * (1 if machine is JaxMachine else 4)
    phases = [*settings().phases, Phase.shrink]
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=25, phases=phases)
    )
