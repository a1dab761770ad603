"""Two checkouts are compared by what users call, each with its own library."""

from __future__ import annotations

import pytest

from benchmarks import against

SMALL = [(3,), (4,)]


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
def test_each_backend_is_timed(backend, monkeypatch):
    monkeypatch.setitem(against.CASES, backend, (backend, SMALL, 2))
    assert len(against.windows(against.HERE, backend)) == against.WINDOWS


def test_a_library_that_is_not_of_the_tree_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`tree` must hold the library that is imported, got "):
        against.windows(tmp_path, "NumPy, n = 1e7")


def test_table_has_the_lower_quartile_of_both_and_their_ratio(monkeypatch, tmp_path):
    monkeypatch.setattr(against, "CASES", {"a case": ("numpy", SMALL, 2)})
    monkeypatch.setattr(against, "_run", lambda tree, case: [1.0, 2.0, 9.0] if tree == tmp_path else [3.0])
    _, line = against.compare(tmp_path, 2)
    assert line.split()[2:] == ["3.000", "1.250", "2.400"]
