"""Runs benchmarks by name, all without one: `python -m benchmarks [single|star|overhead|startup|tiles] ...`."""

from __future__ import annotations

import sys
from collections.abc import Callable

from benchmarks import overhead, single, star, startup, tiles
from benchmarks.report import where

ALL: dict[str, Callable[[], None]] = {
    "single": single.main,
    "star": star.main,
    "overhead": overhead.main,
    "startup": startup.main,
    "tiles": tiles.main,
}


def main() -> None:
    """Run what was named."""
    names = sys.argv[1:] or list(ALL)
    if unknown := [name for name in names if name not in ALL]:
        sys.exit(f"no benchmark {', '.join(unknown)}; there are {', '.join(ALL)}")
    print(f"Measured on {where()}: python -m benchmarks {' '.join(names)}")
    for name in names:
        ALL[name]()


if __name__ == "__main__":
    main()
