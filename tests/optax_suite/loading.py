"""Load optax's own tests from the installed package, with this library's optimizers in place of its own."""

from __future__ import annotations

import importlib.util
import inspect
import types
import warnings
from typing import Any
from unittest import mock

import optax
from absl.testing import parameterized

from .inputs import FACTORIES, INPUTS, TRANSFORMATIONS, WRAPPED_INPUTS, lbfgs

NOT_APPLICABLE = {
    "test_explicit_dtype": "It is about the dtype options of `sgd`, `adam` and `adamw`.",
    "test_microbatch_with_explicit_sharding": "It uses no optimizer.",
    "test_plain_preconditioning": "It tests a helper of the tests.",
    "test_preconditioning_by_lbfgs_on_trees": "It calls a private function of optax.",
    "test_preconditioning_by_lbfgs_on_vectors": "It calls a private function of optax.",
}
"""Optax's tests that say nothing about an optimizer of another library, and why."""

LAYOUT = ("_src.alias_test", "_src.lbfgs_test", "_src.sharding_test", "contrib._common_test")
"""Optax's test modules. The tests of L-BFGS are in the first one up to 0.2.8, and later in their own."""


def load_all(package: str = "optax") -> dict[str, types.ModuleType]:
    """The test modules that there are."""
    names = [f"{package}.{module}" for module in LAYOUT]
    return {name: load(name) for name in names if importlib.util.find_spec(name) is not None}


def find_case(modules: dict[str, types.ModuleType], name: str) -> type:
    """The test class of a name, in whichever module it is."""
    found = [case for module in modules.values() for case in cases(module) if case.__name__ == name]
    if len(found) != 1:
        msg = f"`modules` must hold one test class {name!r}, got {len(found)} in {list(modules)}"
        raise LookupError(msg)
    return found[0]


def load(name: str) -> types.ModuleType:
    """Execute a test module of optax again, so that its tests are generated for our inputs.

    Where the tests look an optimizer up, they find ours; where they call `alias.lbfgs`, too.
    """
    module = importlib.util.module_from_spec(importlib.util.find_spec(name))
    generate, generate_named = parameterized.product, parameterized.named_parameters

    def product(*lists: Any, **grid: Any) -> Any:
        if "scale_init_precond" in grid:  # ours has no such switch: the initial matrix is always scaled
            grid["scale_init_precond"] = [True]
            # With short steps from this start the first curvature is negative. Optax and its plain
            # implementation keep such a pair and climb; ours leaves it out.
            if "problem_name" in grid:
                grid["problem_name"] = [name for name in grid["problem_name"] if name != "himmelblau"]
        return generate(*map(_ours, lists), **grid)

    def named_parameters(*cases: Any) -> Any:
        return generate_named(*map(_ours, cases))

    with (
        warnings.catch_warnings(action="ignore"),  # of what the module does when it is imported
        mock.patch.object(parameterized, "product", product),
        mock.patch.object(parameterized, "named_parameters", named_parameters),
    ):
        module.__loader__.exec_module(module)
    if hasattr(module, "alias"):
        module.alias = types.SimpleNamespace(**{**vars(optax._src.alias), **FACTORIES, "lbfgs": lbfgs})
    for case in cases(module):
        for test, generated in claims(case).items():
            if test in NOT_APPLICABLE:
                for name in generated:
                    delattr(case, name)
    return module


def cases(module: types.ModuleType) -> list[type]:
    """The test classes of a module."""
    found = [value for value in vars(module).values() if inspect.isclass(value)]
    return [value for value in found if issubclass(value, parameterized.TestCase)]


def claims(case: type) -> dict[str, list[str]]:
    """The names of a class's tests as optax wrote them, each with those generated from it."""
    found: dict[str, list[str]] = {}
    for name, value in vars(case).items():
        if name.startswith("test"):
            found.setdefault(inspect.unwrap(value).__name__, []).append(name)
    return found


def _ours(given: Any) -> Any:
    if isinstance(given, type({}.items())):
        return TRANSFORMATIONS.items()
    if isinstance(given, (list, tuple)) and all(
        isinstance(case, dict) and "opt_name" in case for case in given
    ):
        return WRAPPED_INPUTS if "wrapper_name" in given[0] else INPUTS
    return given
