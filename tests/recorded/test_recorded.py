"""What the recorded version did: its trajectories, and how its checkpoints continued."""

from __future__ import annotations

import numpy as np
import pytest

from .checkpoints import FILES, NATIVE, load, load_native, rest
from .problem import CASES, DATA, Case, deviation, follow, tolerance
from .runs import begin, readers

COVERING = [
    Case("default", "layer", "missing"),
    Case("power 0", "parameter"),
    Case("power 0.3", "layer"),
    Case("clip", "layer"),
    Case("paper", "layer"),
    Case("fit", "all"),
    Case("lbfgs", "layer"),
]
"""Enough cases for backends that are slow to run or to compile."""
RUNS = [
    *((kind, case) for case in CASES for kind in readers(case) if kind != "jax"),
    *((kind, case) for case in COVERING for kind in ("strict", "tensors", "jax")),
    *(("jax", Case("default", *rest)) for rest in (("all", ""), ("all", "tiny"), ("layer", "not finite"))),
    *((kind, Case("default", "layer", "not finite")) for kind in ("strict", "tensors")),
    ("jax", Case("bfloat16 history", "all")),
]


@pytest.fixture(scope="module")
def trajectories():
    with np.load(DATA / "trajectories.npz") as content:
        return dict(content)


@pytest.fixture(scope="module")
def continuations():
    with np.load(DATA / "continuations.npz") as content:
        return dict(content)


@pytest.mark.parametrize(("kind", "case"), RUNS, ids=lambda value: str(value).replace(", ", "-"))
def test_trajectories_are_those_recorded(kind, case, trajectories, monkeypatch):
    if kind == "tensors":
        from mlbfgs_torch import units

        monkeypatch.setattr(units, "HOSTS", ())
    run = begin("torch" if kind == "tensors" else kind, case)
    actual = follow(run, case)
    assert deviation(actual, trajectories[str(case)]) <= tolerance(case)
    step, skipped, pairs = run.counts()
    assert [step, skipped, *pairs] == trajectories[f"{case}: counts"].tolist()


def test_all_that_is_recorded_is_compared(trajectories, continuations):
    assert set(trajectories) == {f"{case}{part}" for case in CASES for part in ("", ": counts")}
    assert set(continuations) == {str(saved) for saved in (*FILES, *NATIVE)}


READERS = [(reader, saved) for saved in FILES for reader in saved.readers()]


@pytest.mark.parametrize(("reader", "saved"), READERS, ids=lambda value: str(value).replace(", ", "-"))
def test_a_file_of_the_recorded_version_goes_on_as_it_did(reader, saved, continuations):
    actual, expected = rest(load(reader, saved), saved), continuations[str(saved)]
    np.testing.assert_array_equal(actual[0], expected[0])
    assert deviation(actual, expected) <= tolerance(saved.case, saved.dtype)


@pytest.mark.parametrize("saved", NATIVE, ids=lambda value: str(value).replace(", ", "-"))
def test_a_state_dict_of_the_recorded_version_goes_on_as_it_did(saved, continuations):
    expected = continuations[str(saved)]
    actual = rest(load_native(saved, expected[0]), saved)
    np.testing.assert_array_equal(actual[0], expected[0])
    assert deviation(actual, expected) <= tolerance(saved.case, saved.dtype)
