"""The script that times the Kronecker preconditioner beside SOAP."""

from __future__ import annotations

import pytest

from benchmarks import matrix_cost


@pytest.mark.parametrize("history", [0, 5])
@pytest.mark.parametrize("shape", [(30, 70), (8, 4, 3, 3), (5000, 20)])
def test_products_are_those_that_the_settings_page_counts(shape, history):
    """`6 a b (a + b)` operations in a step, and for pairs `4 a b (a + b) history_size / 10` more."""
    found = matrix_cost.products([shape, (7,)], history)
    a, b = shape[0], shape[1] if len(shape) == 2 else 36
    sides = sum(side for side in (a, b) if side <= matrix_cost.LARGEST)
    of_weight = [(m, k, n, count) for m, k, n, count in found if not m == k == n]
    operations = sum(2 * m * k * n * count for m, k, n, count in of_weight)
    assert operations == pytest.approx((6 + 4 * history / 10) * a * b * sides)


def test_every_contestant_is_timed_and_weighed(monkeypatch):
    monkeypatch.setattr(matrix_cost, "shapes_of", lambda model: [(6, 5), (6,)])
    found = matrix_cost.measure("tiny", 1, "cpu")
    assert set(matrix_cost.contestants()) <= set(found)
    assert all(cost.seconds > 0 for cost in found.values())
    assert found[matrix_cost.OURS[0]].speak
    factors = 4 * (6**2 + 5**2)
    assert found["AdamW"].size == pytest.approx(8, abs=1)
    values = 36
    assert 2 * factors / values < found["Kronecker, m = 0"].size < found["Kronecker, m = 5"].size
