"""Write what this version does: ``python -m tests.recorded.record``, before a change that must not show.

The tests next to this file hold every later version to it. Old checkpoints must be readable for ever, so
they are written only if there are none.
"""

from __future__ import annotations

import jax
import numpy as np

from .checkpoints import FILES, NATIVE, SAVED_AT, load, rest, save_native
from .problem import CASES, DATA, flat, follow, start
from .runs import begin, readers


def record() -> None:
    """Record trajectories and continuations, by `mlbfgs_arrays`, or if it cannot, by `mlbfgs_torch`."""
    trajectories = {}
    for case in CASES:
        run = begin(readers(case)[0], case)
        trajectories[str(case)] = follow(run, case)
        step, skipped, pairs = run.counts()
        trajectories[f"{case}: counts"] = np.asarray([step, skipped, *pairs])
    np.savez_compressed(DATA / "trajectories.npz", **trajectories)
    if (DATA / "continuations.npz").exists():
        return
    continuations = {}
    for saved in dict.fromkeys([*FILES, *NATIVE]):
        run = saved.begin(saved.kind, flat(list(start().values())))
        follow(run, saved.case, 0, SAVED_AT)
        if saved in NATIVE:
            save_native(run, saved)
            continuations[str(saved)] = rest(run.copied(), saved)
        if saved in FILES:
            run.save(saved.path("safetensors"))
            continuations[str(saved)] = rest(load(saved.readers()[0], saved), saved)
    np.savez_compressed(DATA / "continuations.npz", **continuations)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    record()
