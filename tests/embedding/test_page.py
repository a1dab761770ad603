"""What the page on embedding shows runs, and is as it says."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import torch

import mlbfgs_core as core
from mlbfgs_arrays import MLBFGS
from tests.docs.test_readme import ROOT, run_blocks


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the blocks of the page leave behind."""
    folder = tmp_path_factory.mktemp("page")
    names = {"folder": folder}
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        names["count"] = run_blocks(ROOT / "docs" / "embedding.md", names)
    return names


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_python_blocks_of_the_page_run(names):
    assert names["count"] == 9
    assert all(np.all(np.abs(leaf) < 0.05) for leaf in names["x"])
    np.testing.assert_allclose(names["solution"].value, 1.0, atol=1e-3)
    assert names["loss"] < 0.05
    assert names["twin_loss"] < 0.05
    assert names["losses"][-1] < 0.2 * names["losses"][0]
    assert names["network"].optimizer.config == names["resumed"].optimizer.config


def test_a_replaced_kernel_changes_nothing(names):
    x, grad = np.ones(6), np.geomspace(0.1, 10.0, 6)
    method = core.Method(core.Config(preset="fit"))
    plain, _ = method.step(method.init([x]), [x], [grad])
    np.testing.assert_allclose(names["fast_updates"][0], plain[0], rtol=1e-14)


def test_the_end_of_a_step_on_the_page_is_that_of_the_adapters(names):
    y = np.ones(6)
    optimizer = MLBFGS({"y": y}, lr=1e-2, momentum=0.9, weight_decay=1e-2)
    for _ in range(20):
        optimizer.step({"y": names["curvature"] * y})
    np.testing.assert_allclose(names["y"], y, rtol=1e-12)


def test_a_state_that_is_stored_as_on_the_page_is_restored(names):
    state, restored = names["learned"], names["restored"]
    assert state._fields == restored._fields
    for field, value in state._asdict().items():
        np.testing.assert_equal(getattr(restored, field), value)


def test_shards_that_sum_their_coefficients_take_the_steps_of_the_whole(names):
    np.testing.assert_allclose(names["shards"].reshape(6), names["whole"], rtol=1e-10)


def test_a_file_of_an_embedded_core_is_read_by_an_adapter(names):
    params = {"a": np.zeros(2), "b": np.zeros(4)}
    MLBFGS(params, preset="fit").load_state(names["folder"] / "embedded.safetensors")
    np.testing.assert_array_equal(params["a"], names["x"][0])
