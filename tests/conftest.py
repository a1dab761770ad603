"""Backends and hypothesis profiles shared by all tests."""

from __future__ import annotations

import argparse
import os
import re
from importlib import import_module
from importlib.metadata import version

import pytest
from array_api_extra.testing import patch_lazy_xp_functions
from hypothesis import HealthCheck, Phase, settings

# Triton reads it when it is first imported: its kernels run on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The `xp` fixture hands the same namespace to every example of a test, so its scope is no hazard.
# Examples are seeds of generators, which shrinking makes no simpler.
_common = {
    "phases": [Phase.explicit, Phase.generate],
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
}
settings.register_profile("default", max_examples=5, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=200, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

NAMESPACES = {
    "numpy": "array_api_compat.numpy",
    "array_api_strict": "array_api_strict",
    "torch": "array_api_compat.torch",
    "jax": "jax.numpy",
}
BACKENDS = {}
"""The namespaces that `--backends` names; no other is imported."""
DOCTESTS = {
    "mlbfgs_arrays": {"numpy"},
    "mlbfgs_core": {"numpy"},
    "mlbfgs_diagnostics": {"numpy", "torch", "jax"},
    "mlbfgs_jax": {"jax"},
    "mlbfgs_scipy": {"numpy"},
    "mlbfgs_torch": {"torch"},
}
"""The backends that the examples in a package's docstrings need."""
MARK_OF_MODULE = re.compile(r"^pytestmark = pytest\.mark\.backends\((.*)\)$", re.MULTILINE)


def _backends(text):
    names = text.split(",")
    if unknown := [name for name in names if name not in NAMESPACES]:
        msg = f"must be names of {', '.join(NAMESPACES)}, got {', '.join(map(repr, unknown))}"
        raise argparse.ArgumentTypeError(msg)
    return names


def pytest_addoption(parser):
    parser.addoption(
        "--backends",
        type=_backends,
        default=list(NAMESPACES),
        metavar="NAME,...",
        help=f"import and test these backends only, and deselect the other tests: {','.join(NAMESPACES)}",
    )


def pytest_configure(config):
    for name in config.getoption("backends"):
        try:
            BACKENDS[name] = import_module(NAMESPACES[name])
        except ModuleNotFoundError as error:
            msg = f"`--backends` must name what is installed, got {name}: {error}"
            raise pytest.UsageError(msg) from error
    if "jax" in BACKENDS:
        import_module("jax").config.update("jax_enable_x64", True)


def pytest_report_header():
    return "backends: " + ", ".join(f"{name} {version(name)}" for name in BACKENDS)


class Absent(pytest.File):
    """A test module that is not imported, because a backend that it needs may not be installed."""

    def collect(self):
        pytest.skip(f"{self.path.name} needs {', '.join(sorted(_needs_of_module(self.path)))}")


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path, parent):
    collectors = yield
    absent = file_path.suffix == ".py" and not _needs_of_module(file_path) <= BACKENDS.keys()
    return [Absent.from_parent(parent, path=file_path)] if absent else collectors


def _needs_of_module(path):
    """The backends that a module's mark names; it is read from the text, since an import could fail."""
    found = MARK_OF_MODULE.search(path.read_text(encoding="utf-8"))
    return set(re.findall(r"\w+", found[1])) if found else set()


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config, items):
    for item in items:
        if any(_backend(item) in mark.args for mark in item.iter_markers("slow_on")):
            item.add_marker("slow")
    groups = {True: [], False: []}
    for item in items:
        groups[_needs(item) <= BACKENDS.keys()].append(item)
    # While `xp` is JAX, the core is jitted for the whole module: tests that do not ask for it come before.
    places = {path: place for place, path in enumerate(dict.fromkeys(item.path for item in groups[True]))}
    items[:] = sorted(groups[True], key=lambda item: (places[item.path], _backend(item) is not None))
    config.hook.pytest_deselected(items=groups[False])


def _needs(item):
    """The backends of a test: those of its marks, the one of its `xp`, or those of a doctest's package."""
    marked = {name for mark in item.iter_markers("backends") for name in mark.args}
    return marked | ({_backend(item)} - {None}) | DOCTESTS.get(item.path.parent.name, set())


def _backend(item):
    """The name of a test's `xp`."""
    return item.callspec.params.get("xp") if hasattr(item, "callspec") else None


@pytest.fixture(scope="module", params=NAMESPACES)
def xp(request):
    """Each backend in turn; under JAX the functions of `mlbfgs_core` run jitted, once traced for a module."""
    namespace = BACKENDS[request.param]
    with patch_lazy_xp_functions(request, xp=namespace):
        yield namespace
