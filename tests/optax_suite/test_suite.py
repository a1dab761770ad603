"""Optax's own tests of optimizers, of L-BFGS and of sharding, run over `mlbfgs_jax`."""

from __future__ import annotations

import importlib
import re
import warnings
from pathlib import Path

import jax
import pytest

from .loading import NOT_APPLICABLE, cases, claims, load

MODULES = {
    name: load(name)
    for name in ("optax._src.alias_test", "optax._src.sharding_test", "optax.contrib._common_test")
}
AliasTest = MODULES["optax._src.alias_test"].AliasTest
LBFGSTest = MODULES["optax._src.alias_test"].LBFGSTest
ShardingTest = MODULES["optax._src.sharding_test"].ShardingTest
ContribTest = MODULES["optax.contrib._common_test"].ContribTest
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
