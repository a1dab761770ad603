"""Each documented parameter says its default, which stands in the signature."""

from __future__ import annotations

import inspect
import re
from typing import Any

from sphinx.application import Sphinx

_LINE = re.compile(r"^(\w+(?:, \w+)*) : (.+)$")


def add_defaults(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Append the default to the type of a parameter, ``name : type``, in a numpydoc docstring."""
    if what not in ("class", "function", "method") or "Parameters" not in lines:
        return
    try:
        parameters = inspect.signature(obj).parameters
    except (TypeError, ValueError):
        return
    first = lines.index("Parameters") + 2
    for number, line in enumerate(lines[first:], first):
        if number + 1 < len(lines) and set(lines[number + 1]) == {"-"}:
            break  # the next section
        found = _LINE.match(line)
        if found is None or re.search(", (optional|default)", found[2]):
            continue
        own = [parameters[own].default for own in found[1].split(", ") if own in parameters]
        if own and all(value is not inspect.Parameter.empty and value == own[0] for value in own):
            lines[number] = f"{line}, default {own[0]!r}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Run before napoleon, which turns the sections into lists."""
    app.connect("autodoc-process-docstring", add_defaults, priority=100)
    return {"parallel_read_safe": True}
