"""Backends and hypothesis profiles shared by all tests."""

from __future__ import annotations

import os

import array_api_compat.numpy
import array_api_compat.torch
import array_api_strict
import jax
import jax.numpy
import pytest
from array_api_extra.testing import patch_lazy_xp_functions
from hypothesis import HealthCheck, Phase, settings

jax.config.update("jax_enable_x64", True)

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

BACKENDS = {
    "numpy": array_api_compat.numpy,
    "array_api_strict": array_api_strict,
    "torch": array_api_compat.torch,
    "jax": jax.numpy,
}


@pytest.fixture(params=BACKENDS)
def xp(request):
    """Each backend in turn; under JAX the functions of `mlbfgs_core` run jitted."""
    namespace = BACKENDS[request.param]
    with patch_lazy_xp_functions(request, xp=namespace):
        yield namespace
