"""The runs that the repository keeps, so that the page can be written anew where only some are repeated.

`MEASURED` has a file for each task, with a line for each run. Numbers have four digits. Of runs that were
only part of a search the first and the last loss are kept.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["MEASURED", "keep", "stored"]

MEASURED = Path(__file__).with_name("measured")
CURVES, NUMBERS = ("steps", "train", "test"), ("calls", "parameters", "state_bytes", "stopped")
Content = dict[str, Any]


def name_of(exponent: int, seed: int, percent: int) -> str:
    """The name of a run of a contestant on a task."""
    return f"{exponent}/{seed}/{percent}"


@cache
def stored(task: str) -> Content:
    """What is kept of a task: for each contestant ``identity``, ``date``, ``runs`` and perhaps ``times``."""
    path = MEASURED / f"{task}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def keep(folder: Path, task: str, used: Collection[tuple[str, int]]) -> None:
    """Add the runs of a folder to those that are kept of a task.

    Parameters
    ----------
    folder : Path
        The runs of all tasks.
    task : str
    used : collection of (str, int)
        Contestants and exponents of which the whole curve is kept.

    Notes
    -----
    Runs with another identity, which is that of other settings or of another version of the code, take the
    place of all that are kept of the same contestant.
    """
    known: Content = json.loads(json.dumps(stored(task)))
    for path in sorted((folder / task).glob("*/*/*.json")):
        run = json.loads(path.read_text("utf-8"))
        name = run["contestant"]
        if known.get(name, {}).get("identity") != run["identity"]:
            known[name] = {"identity": run["identity"], "date": run["date"], "runs": {}}
        place = name_of(run["exponent"], run["seed"], run["percent"])
        known[name]["runs"][place] = _short(run, whole=(name, run["exponent"]) in used)
    path = folder / task / "timing.json"
    timed = json.loads(path.read_text("utf-8")) if path.exists() else {"times": {}}
    for name, times in timed["times"].items():
        if known.get(name, {}).get("identity") == timed["identity"][name]:
            known[name]["times"] = {what: _digits(value) for what, value in times.items()}
    MEASURED.mkdir(exist_ok=True)
    (MEASURED / f"{task}.json").write_text(_text(known), encoding="utf-8")
    stored.cache_clear()


def _short(run: Content, *, whole: bool) -> Content:
    ends = slice(None) if whole or len(run["steps"]) < 3 else slice(None, None, len(run["steps"]) - 1)
    return {name: list(map(_digits, run[name][ends])) for name in CURVES} | {n: run[n] for n in NUMBERS}


def _digits(value: float | None) -> float | None:
    return None if value is None else value if isinstance(value, int) else float(f"{value:.4g}")


def _text(known: Content) -> str:
    """JSON with a line for each run."""
    parts = []
    for name, entry in sorted(known.items()):
        runs = ",\n".join(
            f"  {json.dumps(place)}: {json.dumps(run)}" for place, run in sorted(entry["runs"].items())
        )
        about = json.dumps({what: value for what, value in entry.items() if what != "runs"})[:-1]
        parts.append(f'{json.dumps(name)}: {about}, "runs": {{\n{runs}\n}}}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"
