"""A loss that is not finite costs its step, never the run; the optimizers people use today lose the run."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.faults import FAULTS, RUNS, remaining

OURS = [name for name in RUNS if name.startswith("mlbfgs")]
LBFGS = ["torch LBFGS", "  with search", "optax.lbfgs"]
BAD = [fault for fault in FAULTS if "NaN" in fault or "infinite" in fault]


@pytest.mark.parametrize("fault", BAD)
def test_a_run_survives_what_ends_those_of_other_lbfgs(fault):
    for name in OURS:  # a tenth of the steps is lost where a loss is NaN at every tenth
        assert remaining(RUNS[name], fault) < (1e-5 if "every" in fault else 1e-6), name
    for name in LBFGS:
        assert np.isnan(remaining(RUNS[name], fault)), name


def test_without_a_fault_all_of_them_reach_the_minimum():
    for name in (*OURS, *LBFGS):
        assert remaining(RUNS[name], "no fault") < 1e-6, name
