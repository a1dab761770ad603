"""The Python blocks of every page run and print what the page shows; new pages are found by themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import re

import jax
import numpy as np
import pytest

import mlbfgs_core
import mlbfgs_jax
from tests.docs.test_readme import BLOCK, ROOT

pytestmark = pytest.mark.backends("numpy", "torch", "jax")

DOCS = ROOT / "docs"
NOT_PAGES = ("_build", "_generated", "auto_gallery")
# Pages whose blocks leave behind what a test of their own looks at.
RUN_BY = {
    **dict.fromkeys(
        (
            "arrays.md",
            "checkpoints.md",
            "diagnostics.md",
            "distributed.md",
            "jax.md",
            "pytorch.md",
            "scipy.md",
        ),
        "tests/docs/test_readme.py",
    ),
    "embedding.md": "tests/embedding/test_page.py",
}
NUMBER = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")
PACKAGES = tuple(f"mlbfgs_{name}" for name in ("core", "arrays", "diagnostics", "jax", "scipy", "torch"))


def pages():
    found = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
    found = {name: path for name, path in found.items() if name.split("/")[0] not in NOT_PAGES}
    return {name: path.read_text(encoding="utf-8") for name, path in found.items()}


@pytest.mark.parametrize("name", [name for name in pages() if name not in RUN_BY])
def test_python_blocks_run_and_print_what_the_page_shows(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.enable_x64(False):  # as a reader has it
        run(pages()[name])


def run(page):
    names = {}
    for code, shown in BLOCK.findall(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if shown:
            assert_alike(printed.getvalue(), shown)


@pytest.mark.parametrize("name", RUN_BY)
def test_page_with_a_test_of_its_own_is_run_there(name):
    assert "```python" in pages()[name]
    assert f'"{name}"' in (ROOT / RUN_BY[name]).read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_each_public_name_is_on_its_page_of_the_api(package):
    page = pages()[f"api/{package.removeprefix('mlbfgs_')}.md"]
    shown = re.findall(r"^\.\. auto\w+:: (\w+)", page, re.MULTILINE)
    assert sorted(shown) == sorted(importlib.import_module(package).__all__)


def test_signature_of_mlbfgs_is_on_its_page():
    settings = {field.name for field in dataclasses.fields(mlbfgs_core.Config)}
    shown = re.search(
        r"^\.\. autofunction:: mlbfgs\((.*), \*\*settings\)$", pages()["api/jax.md"], re.MULTILINE
    )
    names = [part.partition("=")[0] for part in shown[1].split(", ") if part != "*"]
    assert names == [name for name in inspect.signature(mlbfgs_jax.mlbfgs).parameters if name not in settings]


def test_each_setting_is_in_the_table_of_settings():
    rows = set(re.findall(r"^\| `(\w+)`", pages()["settings.md"], re.MULTILINE))
    assert {field.name for field in dataclasses.fields(mlbfgs_core.Config)} <= rows


def assert_alike(printed, shown):
    """The same words and integers, and decimals within a half: training amplifies a machine's rounding."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    np.testing.assert_allclose(*numbers, rtol=0.5)
