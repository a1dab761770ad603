"""The short names: `mlbfgs.torch` is `mlbfgs_torch`, and nothing is imported before it is used."""

import importlib
import subprocess
import sys

import pytest

import mlbfgs

NAMES = ("arrays", "core", "diagnostics", "jax", "scipy", "torch")
NEEDS = {"diagnostics": ("numpy", "torch", "jax"), "jax": ("jax",), "torch": ("torch",)}


def run(code):
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=300)


def test_importing_the_namespace_imports_no_framework():
    run(
        "import sys, mlbfgs\n"
        f"assert {set(NAMES)} == {{name for name in dir(mlbfgs) if name[0] != '_'}}, dir(mlbfgs)\n"
        "assert mlbfgs.__version__\n"
        "loaded = {'numpy', 'torch', 'jax', 'optax', 'cupy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "mlbfgs.arrays.MLBFGS\n"
        "loaded = {'torch', 'jax', 'optax', 'cupy', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.backends(*NEEDS.get(name, ()))) for name in NAMES]
)
def test_short_name_has_what_the_package_has(name):
    short, package = getattr(mlbfgs, name), importlib.import_module(f"mlbfgs_{name}")
    assert short.__all__ == package.__all__
    assert all(getattr(short, own) is getattr(package, own) for own in package.__all__)
    run(f"from mlbfgs.{name} import {package.__all__[0]}")


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mlbfgs' has no attribute 'tensorflow'"):
        mlbfgs.tensorflow  # noqa: B018


def test_cupy_face_is_the_optimizer_of_arrays():
    import mlbfgs_arrays
    import mlbfgs_cupy

    assert mlbfgs_cupy.MLBFGS is mlbfgs_arrays.MLBFGS
