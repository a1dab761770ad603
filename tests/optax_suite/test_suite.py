"""Optax's own tests of optimizers, of L-BFGS and of sharding, run over `mlbfgs_jax`."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import jax
import pytest

from .inputs import lbfgs
from .loading import NOT_APPLICABLE, cases, claims, find_case, load_all

MODULES = load_all()
AliasTest = find_case(MODULES, "AliasTest")
LBFGSTest = find_case(MODULES, "LBFGSTest")
ShardingTest = find_case(MODULES, "ShardingTest")
ContribTest = find_case(MODULES, "ContribTest")
# Of scikit-learn's own options, and of optax's line searches where a start is of NumPy's float64.
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning:sklearn", "ignore:Explicitly requested dtype float64"
)
PAGE = Path(__file__).parents[2] / "docs" / "jax.md"


@pytest.fixture(autouse=True)
def comparable_version(monkeypatch):
    """Optax's tests compare versions of JAX as strings, and would skip themselves on 0.10."""
    major, minor = map(int, jax.__version__.split(".")[:2])
    if (major, minor) >= (0, 10):
        monkeypatch.setattr(jax, "__version__", "0.9")


def test_every_test_of_optax_is_run_or_listed_as_not_applicable():
    collected = {AliasTest, LBFGSTest, ShardingTest, ContribTest}
    missing = set()
    for name, module in MODULES.items():
        assert set(cases(module)) <= collected
        with warnings.catch_warnings(action="ignore"):
            original = importlib.import_module(name)
        theirs = {test for case in cases(original) for test in claims(case)}
        missing |= theirs - {test for case in cases(module) for test in claims(case)}
    assert missing == set(NOT_APPLICABLE)


def test_the_page_lists_what_does_not_apply_and_why():
    rows = re.findall(r"^\| `(test_\w+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == NOT_APPLICABLE


@pytest.mark.parametrize("module", ["alias_test", "lbfgs_test"])
def test_optaxs_tests_of_lbfgs_are_found_in_either_module_and_call_ours(module, tmp_path, monkeypatch):
    package = f"optax_with_{module}"
    folder = tmp_path / package / "_src"
    folder.mkdir(parents=True)
    head = "from absl.testing import parameterized\nfrom optax._src import alias\n"
    body = "class {}(parameterized.TestCase):\n    def test_it(self):\n        return alias.lbfgs\n"
    (folder / "alias_test.py").write_text(head + body.format("AliasTest"))
    with (folder / f"{module}.py").open("a") as file:
        file.write(head + body.format("LBFGSTest"))
    (tmp_path / package / "contrib").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    modules = load_all(package)
    assert set(modules) == {f"{package}._src.alias_test", f"{package}._src.{module}"}
    case = find_case(modules, "LBFGSTest")
    assert case("test_it").test_it() is lbfgs
    with pytest.raises(LookupError, match="one test class 'ShardingTest', got 0"):
        find_case(modules, "ShardingTest")
