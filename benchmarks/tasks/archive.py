"""The runs that the repository keeps, so that the page can be written anew where only some are repeated.

`MEASURED` has a file for each task, with a line for each run. Numbers have four digits. Of runs that were
only part of a search the first and the last loss are kept.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["MEASURED", "keep", "name_of", "read", "same", "stored"]

MEASURED = Path(__file__).with_name("measured")
CURVES, NUMBERS = ("steps", "train", "test"), ("calls", "parameters", "state_bytes", "stopped")
Content = dict[str, Any]
Identity = dict[str, str]


def name_of(exponent: int, seed: int, percent: int) -> str:
    """The name of a run of a contestant on a task."""
    return f"{exponent}/{seed}/{percent}"


@cache
def stored(task: str) -> Content:
    """What is kept of a task: for each contestant ``identity``, ``runs`` and perhaps ``times``."""
    path = MEASURED / f"{task}.json"
    return read(path) if path.exists() else {}


def keep(
    folder: Path,
    task: str,
    used: Collection[tuple[str, int]],
    identities: Mapping[str, Identity],
    *,
    again: bool = False,
) -> None:
    """Add the runs of a folder to those that are kept of a task.

    Parameters
    ----------
    folder : Path
        The runs of all tasks.
    task : str
    used : collection of (str, int)
        Contestants and exponents of which the whole curve is kept.
    identities : mapping of str to dict
        What runs of each contestant depend on now. Other runs in the folder do not count.
    again : bool
        Whether runs of another version of the code are thrown away where there are newer ones.
    """
    known: Content = copy.deepcopy(stored(task))
    for name, identity in identities.items():
        for path in sorted((folder / task / name).glob("*/*.json")):
            run = read(path)
            if run["identity"] != identity:
                continue
            entry = known.setdefault(name, {"identity": identity, "runs": {}})
            if not same(entry["identity"], identity, code=again):
                entry["runs"] = {}
            entry["identity"] = identity
            place = name_of(run["exponent"], run["seed"], run["percent"])
            old = entry["runs"].get(place, {"steps": []})
            new = _short(run, whole=(name, run["exponent"]) in used)
            if len(new["steps"]) >= len(old["steps"]) or new["train"][-1] != old["train"][-1]:
                entry["runs"][place] = new
    _add_times(known, folder / task / "timing.json", identities)
    if known:
        MEASURED.mkdir(exist_ok=True)
        (MEASURED / f"{task}.json").write_text(_text(known), encoding="utf-8")
        stored.cache_clear()


def _add_times(known: Content, path: Path, identities: Mapping[str, Identity]) -> None:
    """Add times that were measured together; they take the place of all that are known."""
    if not path.exists():
        return
    timed = read(path)
    found = {
        name: {what: _digits(value) for what, value in times.items()}
        for name, times in timed["times"].items()
        if timed["identity"][name] == identities.get(name)
    }
    for entry in known.values() if found else ():
        entry.pop("times", None)
    for name, times in found.items():
        known.setdefault(name, {"identity": identities[name], "runs": {}})["times"] = times


def read(path: Path) -> Content:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        msg = f"{path} must hold JSON: {error}"
        raise ValueError(msg) from error


def same(one: Identity, other: Identity, *, code: bool) -> bool:
    """Whether two identities are equal, the version of the `code` included or not."""
    names = (one.keys() | other.keys()) - (set() if code else {"code"})
    return all(one.get(name) == other.get(name) for name in names)


def _short(run: Content, *, whole: bool) -> Content:
    ends = slice(None) if whole or len(run["steps"]) < 3 else slice(None, None, len(run["steps"]) - 1)
    curves = {name: list(map(_digits, run[name][ends])) for name in CURVES}
    return {"date": run["date"], **curves, **{name: run[name] for name in NUMBERS}}


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
