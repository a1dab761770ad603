"""Write what the python blocks of pages print into the output blocks after them.

Run ``python3 docs/write_outputs.py docs/quickstart/*.md``. The tests check that outputs and pages agree.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from pathlib import Path

# A python block, and the output block after it if there is one.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\s*^```output\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def rewritten(page: str) -> str:
    """The page with new outputs; its blocks run in a temporary folder."""
    names: dict[str, object] = {}

    def run(found: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(found[1], names)
        if found[2] is None:
            return found[0]
        return f"```python\n{found[1]}```\n\n```output\n{printed.getvalue()}```\n"

    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            return BLOCK.sub(run, page)
        finally:
            os.chdir(home)


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        path.write_text(rewritten(path.read_text(encoding="utf-8")), encoding="utf-8")
