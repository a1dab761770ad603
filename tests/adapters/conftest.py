"""What several tests of an adapter run with."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["numpy", "tensors"])
def coefficients(request, monkeypatch):
    """What a step of PyTorch computes its coefficients with: on a CPU NumPy, elsewhere tensors."""
    from mlbfgs_torch import units  # the tests of the other adapters run without PyTorch

    if request.param == "tensors":
        monkeypatch.setattr(units, "HOSTS", ())
    return request.param
