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
PACKAGES = (
    *(f"mlbfgs_{name}" for name in ("core", "arrays", "diagnostics", "jax", "scipy", "torch")),
    "mlbfgs_core.adapter",
)


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
    page = pages()[f"api/{package.rpartition('.')[2].removeprefix('mlbfgs_')}.md"]
    shown = re.findall(r"^\.\. (?:auto\w+|py:data):: (\w+)", page, re.MULTILINE)
    assert sorted(shown) == sorted(importlib.import_module(package).__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_signatures_on_a_page_of_the_api_are_those_of_the_code(package):
    """A signature that is written down on a page would hide the defaults of settings."""
    page = pages()[f"api/{package.rpartition('.')[2].removeprefix('mlbfgs_')}.md"]
    assert not re.findall(r"^\.\. auto\w+:: .*\(.*$", page, re.MULTILINE)


def factories():
    """What takes settings, by name."""
    found = {
        f"{package}.{name}": getattr(importlib.import_module(package), name)
        for package in PACKAGES
        for name in importlib.import_module(package).__all__
        if name.lower() in ("mlbfgs", "scale_by_mlbfgs", "config")
    }
    assert len(found) == 5
    return found


@pytest.mark.parametrize("function", factories().values(), ids=factories())
def test_each_setting_and_its_default_is_in_the_signature(function):
    shown, defaults = (inspect.signature(own).parameters for own in (function, mlbfgs_core.Config))
    for field in dataclasses.fields(mlbfgs_core.Config):
        default = defaults[field.name].default
        assert repr(shown[field.name].default) == repr(default)
        # What depends on the preconditioner is None in signatures.
        assert default is None or repr(default) == repr(getattr(mlbfgs_core.Config(), field.name))
    assert shown["preset"].default is None or repr(shown["preset"].default) == "None"
    assert not any(own.kind is inspect.Parameter.VAR_KEYWORD for own in shown.values())


def rows_of_theory():
    """Names in code, and their files with what is in them, of the table from symbols to code."""
    table = re.search(r"^\| symbol .*?(?=\n\n)", pages()["theory.md"], re.MULTILINE | re.DOTALL)[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines()[2:]]
    return {row[1].strip(): [re.findall("`([^`]+)`", cell) for cell in row[-2:]] for row in rows}


@pytest.mark.parametrize("row", rows_of_theory().values(), ids=rows_of_theory())
def test_names_in_the_table_of_symbols_are_in_the_files_that_it_names(row):
    names, places = row
    files = [place for place in places if place.endswith(".py")]
    modules = [importlib.import_module("mlbfgs_core." + file[:-3].replace("/", ".")) for file in files]
    for place in places:
        if place not in files:
            assert any(_holds(module, place.split(".")) for module in modules), place
    if files:
        sources = [path.read_text(encoding="utf-8") for path in (ROOT / "mlbfgs_core").rglob("*.py")]
        for name in (name for name in names if name != "momentum_buffer"):  # the adapters' name
            assert any(re.search(rf"\b{name}\b", source) for source in sources), name


def _holds(owner, names):
    return hasattr(owner, names[0]) and (not names[1:] or _holds(getattr(owner, names[0]), names[1:]))


def test_each_setting_is_in_the_table_of_settings():
    rows = set(re.findall(r"^\| `(\w+)`", pages()["settings.md"], re.MULTILINE))
    assert {field.name for field in dataclasses.fields(mlbfgs_core.Config)} <= rows


def assert_alike(printed, shown):
    """The same words and integers, and decimals within a half: training amplifies a machine's rounding."""
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    np.testing.assert_allclose(*numbers, rtol=0.5)
