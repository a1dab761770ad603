"""Fixtures that several tests of an adapter share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["numpy", "tensors"])
def coefficients(request, monkeypatch):
    """What a PyTorch step computes its coefficients with: NumPy on a CPU, tensors elsewhere."""
    from mlbfgs_torch import units  # the tests of the other adapters run without PyTorch

    if request.param == "tensors":
        monkeypatch.setattr(units, "HOSTS", ())
    return request.param
