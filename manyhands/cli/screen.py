"""What is written where: answers to standard output, everything else to standard error; colour only on a terminal.

Knows nothing of clusters.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Self, TextIO

from rich import box
from rich.console import Console
from rich.status import Status as Spinner
from rich.table import Table

WIDE = 1000


def console(stream: TextIO | None = None) -> Console:
    """Return a console for notes (standard error by default): plain when it is no terminal or NO_COLOR is set."""
    out = stream if stream is not None else sys.stderr
    width = None if out.isatty() else WIDE  # a pipe has no width: nothing may be cut there
    return Console(file=out, highlight=False, soft_wrap=True, emoji=False, markup=False, width=width)


class WaitNote:
    """A note on standard error about what is waited for: a spinner on a terminal, else a line now and then
    (at most one in `line_every_s` seconds).
    """

    def __init__(self, out: Console | None = None, line_every_s: float = 2.0) -> None:
        self._console = out if out is not None else console()
        self._line_every_s = line_every_s
        self._next_line = -math.inf
        self._spinner: Spinner | None = None

    def say(self, text: str) -> None:
        """Show the text; an empty one takes the note away."""
        if self._console.is_terminal:
            self._spin(text)
        elif text and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + self._line_every_s
            self._console.print(text)

    def line(self, text: str) -> None:
        """Write a line that stays."""
        self._console.print(text)

    def _spin(self, text: str) -> None:
        if not text:
            if self._spinner is not None:
                self._spinner.stop()
                self._spinner = None
        elif self._spinner is None:
            self._spinner = self._console.status(text)
            self._spinner.start()
        else:
            self._spinner.update(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._spin("")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table without lines but one under its headings; numbers, which begin with a digit, to the right."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, heading in enumerate(headings):
        cells = [row[number] for row in rows]
        numeric = bool(cells) and all(cell[:1].isdigit() for cell in cells)
        made.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def bytes_text(num_bytes: float) -> str:
    """Return a size for people: 9.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 100 else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def count_text(number: float) -> str:
    """Return a large number for people: 4.7M."""
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.0f}{unit}" if not unit or number >= 100 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}B"
