"""The collective operations of a compiled program, read from its text."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

KINDS = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


class Collective(NamedTuple):
    """One operation, with all that it combines."""

    kind: str
    computation: str
    numbers: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Collective operations of the optimized HLO, in `compiled.as_text()`; sizes are those of results."""
    found, computation = [], ""
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}"):
            computation = "ENTRY" if line.startswith("ENTRY") else line.split()[0]
        operation = re.search(rf" = (.*?) ({KINDS})(?:-start)?\(", line)
        if operation:
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", operation[1])
            sizes = [(kind, math.prod(int(n) for n in dims.split(",") if n)) for kind, dims in shapes]
            size = sum(count * BYTES[kind] for kind, count in sizes)
            found.append(Collective(operation[2], computation, sum(count for _, count in sizes), size))
    return found


def branches(text: str) -> set[str]:
    """Names of the computations between which conditionals choose."""
    found = set()
    for line in text.splitlines():
        if " conditional(" in line:
            found |= set(re.findall(r"(?:true|false)_computation=(%[\w.-]+)", line))
            for names in re.findall(r"branch_computations={(.*?)}", line):
                found |= set(names.split(", "))
    return found
