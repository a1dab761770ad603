"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

README = Path(__file__).parents[2] / "README.md"


def test_python_blocks_of_the_readme_run():
    names = {"torch": torch, "model": torch.nn.Linear(2, 1)}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    assert np.all(np.abs(names["x"]) < 1e-2)
    assert type(names["optimizer"]).__name__ == "MLBFGS"
