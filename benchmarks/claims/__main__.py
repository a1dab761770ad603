"""Write the figures and tables of the pages on the paper's claims."""

from __future__ import annotations

import argparse
import time
from importlib import import_module

from . import style

PAGES = ("toy", "hessian", "noise", "published", "resnet", "parts")


def main() -> None:
    """Write the pages that the command line names, by default all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claims", description=__doc__)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)}; by default all")
    parser.add_argument(
        "--train", action="store_true", help="make the runs that the files of `resnet` and `parts` lack"
    )
    parser.add_argument("--time", action="store_true", help="measure the seconds of a step of `resnet`")
    arguments = parser.parse_args()
    pages = arguments.pages or PAGES
    if unknown := set(pages) - set(PAGES):
        parser.error(f"`PAGE` must be one of {', '.join(PAGES)}, got {', '.join(sorted(unknown))}")
    style.setup()
    for page in pages:
        start = time.perf_counter()
        module = import_module(f"{__package__}.{page}")
        for wanted, part in ((arguments.train, "train"), (arguments.time, "measure")):
            if wanted and hasattr(module, part):
                getattr(module, part)()
        module.write()
        print(f"{page}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
