"""Train what the committed results lack, and write the tables of docs/generalisation.md.

``run`` makes both; ``run variations`` or ``run treatments`` only one kind of run; ``report`` only the tables.
Fashion-MNIST takes part where the environment variable FASHION_MNIST names its file.
"""

from __future__ import annotations

import argparse

import torch

from . import images, tables, treatments, variations
from .store import Store

PARTS = {"variations": variations.run_all, "treatments": treatments.run_all}


def main() -> None:
    """Make runs, then tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.generalisation",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=("run", "report"), default="run")
    parser.add_argument("parts", nargs="*", metavar="|".join(PARTS), help="default: all")
    parsed = parser.parse_args()
    if unknown := set(parsed.parts) - PARTS.keys():
        parser.error(f"parts must be among {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    if parsed.command == "run":
        torch.set_num_threads(1)
        if "fashion" not in images.available():
            print(images.MISSING)
        for part in parsed.parts or PARTS:
            PARTS[part](Store())
    tables.write(Store())


if __name__ == "__main__":
    main()
