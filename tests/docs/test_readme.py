"""The code that the README and the pages of the documentation show runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.backends("numpy", "torch", "jax")

ROOT = Path(__file__).parents[2]
BLOCK = runpy.run_path(str(ROOT / "docs" / "write_outputs.py"))["BLOCK"]


def test_python_blocks_of_the_readme_run():
    assert each_block_alone(ROOT / "README.md") == 5
    names = {}
    run_blocks(ROOT / "README.md", names)
    assert np.all(np.abs(names["x"]) < 1e-2)
    assert type(names["optimizer"]).__name__ == "MLBFGS"
    assert callable(names["tx"].update)
    np.testing.assert_allclose(names["weight"], 0.9981)  # 1 - 1.9 * 0.001: momentum looks ahead
    np.testing.assert_allclose(names["result"].x, 1.0, atol=1e-4)


def test_python_blocks_of_the_pytorch_page_run():
    torch.manual_seed(0)
    names = {}
    assert run_blocks(ROOT / "docs" / "pytorch.md", names) == 3
    assert int(names["optimizer"].diagnostics()[0].step) == 21


def test_python_blocks_of_the_jax_page_run():
    names = {}
    assert run_blocks(ROOT / "docs" / "jax.md", names) == 8
    assert names["value"] < 0.05
    assert int(names["state"][0].pairs[0]) > 0
    np.testing.assert_allclose(names["minimum"], 1.0, atol=1e-3)
    assert names["losses"].shape == (64, 50)
    assert np.all(np.isfinite(names["losses"]))


def test_python_blocks_of_the_arrays_page_run():
    names = {}
    assert run_blocks(ROOT / "docs" / "arrays.md", names) == 4
    assert int(names["optimizer"].diagnostics()[0].step) == 100
    assert int(names["optimizer"].diagnostics()[0].pairs[0]) > 0


def test_python_blocks_of_the_checkpoints_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert run_blocks(ROOT / "docs" / "checkpoints.md", names) == 4
    assert int(names["state"][0].step) == int(names["resumed"].diagnostics()[0].step) == 101
    np.testing.assert_allclose(names["params"]["weight"], names["array"], atol=1e-5)
    assert names["core"].load_state("dense.safetensors")[0].params[0].shape == (3, 8)


def test_python_blocks_of_the_scipy_page_run():
    names = {}
    assert run_blocks(ROOT / "docs" / "scipy.md", names) == 2
    np.testing.assert_allclose(names["result"].x, 1.0, atol=1e-6)
    np.testing.assert_allclose(names["fit"].x, 1.0, atol=0.15)


def test_python_blocks_of_the_diagnostics_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    assert run_blocks(ROOT / "docs" / "diagnostics.md", names) == 7
    assert names["recorder"].series("pairs")[-1, 0] > 0
    assert (tmp_path / "run.png").stat().st_size > 10_000
    assert list((tmp_path / "runs").glob("events.*"))
    assert int(names["records"][0].step) == 20


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")
def test_python_blocks_of_the_distributed_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    names = {}
    try:
        assert run_blocks(ROOT / "docs" / "distributed.md", names) == 4
    finally:
        torch.distributed.destroy_process_group()
    assert len(names["optimizer"].optim.state) == 4
    assert (tmp_path / "checkpoint" / ".metadata").exists()


def test_python_blocks_of_the_landing_page_run():
    assert each_block_alone(ROOT / "docs" / "index.md") == 4


def each_block_alone(path):
    """Run each block as if it were pasted into a new file."""
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    for code, _ in blocks:
        exec(code, {})
    return len(blocks)


def run_blocks(path, names):
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    for code, _ in blocks:
        exec(code, names)
    return len(blocks)
