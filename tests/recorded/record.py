"""Write what this version does: ``python -m tests.recorded.record``, before a change that must not show.

The tests next to this file hold every later version to it. Old checkpoints must be readable for ever, so
they are written only if there are none. After a change that must show, such as one of the rule for pairs, it
is run again: trajectories and continuations are then those of today's rule.
"""

from __future__ import annotations

import jax
import numpy as np

from .checkpoints import FILES, NATIVE, SAVED_AT, load, load_native, rest, save_native
from .problem import CASES, DATA, flat, follow, start
from .runs import begin, readers


def record() -> None:
    """Record trajectories and continuations, by `mlbfgs_arrays`, or if it cannot, by `mlbfgs_torch`."""
    old = dict(np.load(DATA / "continuations.npz")) if (DATA / "continuations.npz").exists() else {}
    trajectories = {}
    for case in CASES:
        run = begin(readers(case)[0], case)
        trajectories[str(case)] = follow(run, case)
        step, skipped, pairs = run.counts()
        trajectories[f"{case}: counts"] = np.asarray([step, skipped, *pairs])
    np.savez_compressed(DATA / "trajectories.npz", **trajectories)
    continuations = {}
    for saved in dict.fromkeys([*FILES, *NATIVE]):
        values = flat(list(start().values()))
        if not any(DATA.glob(f"{saved.path('*').name}")):
            run = saved.begin(saved.kind, values)
            follow(run, saved.case, 0, SAVED_AT)
            values = flat(run.values())
            if saved in NATIVE:
                save_native(run, saved)
            if saved in FILES:
                run.save(saved.path("safetensors"))
        if saved in FILES:
            run = load(saved.readers()[0], saved)
        else:
            run = load_native(saved, old[str(saved)][0] if str(saved) in old else values)
        continuations[str(saved)] = rest(run, saved)
    np.savez_compressed(DATA / "continuations.npz", **continuations)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    record()
