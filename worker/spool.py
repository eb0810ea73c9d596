"""Keys and values on this device's disk: where they lie between two plans, and where copies for a neighbour lie.

Knows nothing of plans, arenas or tensors. One file holds the rows of all sessions. The inputs that are kept for later
stages (`inputs`) lie there too, as long as keys and values leave them room.

A cell is one KV-head group of one layer. Its rows lie in pages of 64 positions, keys before values; a page that a
session no longer needs is used again. What is here of a cell always begins at position 0 and has no gap: rows that
would leave one are not taken. A session whose rows can't be written or read is forgotten as a whole, for it can be
computed again; a full disk is no error here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from protocol.frames import Buffer
from protocol.ids import SessionId
from worker.kept_inputs import InputStore
from worker.page_file import PageFile

PAGE_ROWS: Final = 64
_log = logging.getLogger(__name__)


class Cell(NamedTuple):
    """One KV-head group of one layer, by their numbers in the model."""

    layer: int
    group: int


@dataclass(slots=True)
class _Held:
    """What is here of one cell of one session."""

    length: int = 0
    pages: list[int] = field(default_factory=list)


class Spool:
    """Rows of all sessions of one worker, at most `limit_bytes` of them. One thread uses it."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """The file is made in `folder` when the first row is written; a folder that can't be written to holds none."""
        self._pages = PageFile(folder, limit_bytes)
        self._row_bytes = 0
        self._sessions: dict[SessionId, dict[Cell, _Held]] = {}
        self.inputs = InputStore(self._pages)

    @property
    def num_bytes(self) -> int:
        """Bytes of the file."""
        return self._pages.num_bytes

    @property
    def sessions(self) -> frozenset[SessionId]:
        """Sessions of which some rows are here."""
        return frozenset(self._sessions)

    def shape(self, row_bytes: int) -> None:
        """Say how many bytes one key, or one value, of a cell takes; rows of another size are forgotten."""
        if row_bytes != self._row_bytes:
            self.clear()
            self._row_bytes = row_bytes
            self._pages.page_bytes = 2 * PAGE_ROWS * row_bytes

    def length(self, session: SessionId, cell: Cell) -> int:
        """Return how many positions, from the first one on, are here."""
        held = self._sessions.get(session, {}).get(cell)
        return held.length if held is not None else 0

    def write(self, session: SessionId, cell: Cell, start: int, keys: Buffer, values: Buffer) -> bool:
        """Take the rows from position `start` on, which may be here already; False when they are not kept.

        That is so for rows behind a gap, and when there is no room; then the whole session is forgotten.
        """
        if start > self.length(session, cell):
            return False
        count = len(keys) // self._row_bytes if self._row_bytes else 0
        held = self._sessions.setdefault(session, {}).setdefault(cell, _Held())
        try:
            self._reserve(held, start + count)
            for rows, page, place, buffer in self._pieces(held, start, count, keys, values):
                self._pages.write(page, place, buffer[rows])
        except OSError as error:
            _log.warning("keys and values of session %d are not kept: %s", session, error.strerror or error)
            self.forget(session)
            return False
        held.length = max(held.length, start + count)
        return True

    def read(self, session: SessionId, cell: Cell, start: int, count: int) -> tuple[bytearray, bytearray] | None:
        """Return keys and values of some rows; None when not all of them are here, or can be read."""
        if start + count > self.length(session, cell):
            return None
        held = self._sessions[session][cell]
        keys, values = (bytearray(count * self._row_bytes) for _ in range(2))
        try:
            for rows, page, place, buffer in self._pieces(held, start, count, keys, values):
                buffer[rows] = self._pages.read(page, place, rows.stop - rows.start)
        except OSError as error:
            _log.warning("keys and values of session %d can't be read again: %s", session, error.strerror or error)
            self.forget(session)
            return None
        return keys, values

    def truncate(self, session: SessionId, length: int) -> None:
        """Let go of positions from `length` on."""
        for held in self._sessions.get(session, {}).values():
            held.length = min(held.length, length)

    def forget(self, session: SessionId) -> None:
        """Let go of a session's keys and values."""
        self.forget_cells(session, lambda cell: True)

    def forget_cells(self, session: SessionId, is_over: Callable[[Cell], bool]) -> None:
        """Let go of some cells of a session."""
        cells = self._sessions.get(session, {})
        for cell in [cell for cell in cells if is_over(cell)]:
            self._pages.give_back(cells.pop(cell).pages)
        if not cells:
            self._sessions.pop(session, None)

    def keep_only(self, sessions: Collection[SessionId]) -> None:
        """Let go of all other sessions."""
        for session in self.sessions.difference(sessions):
            self.forget(session)

    def clear(self) -> None:
        """Let go of everything."""
        self.keep_only(())
        self.inputs.clear()

    def close(self) -> None:
        """Remove the file."""
        self.clear()
        self._pages.close()

    def _reserve(self, held: _Held, length: int) -> None:
        while len(held.pages) * PAGE_ROWS < length:
            if self._pages.is_full:  # inputs only save time
                self.inputs.clear()
            held.pages.append(self._pages.take())

    def _pieces(
        self, held: _Held, start: int, count: int, keys: Buffer, values: Buffer
    ) -> Iterator[tuple[slice, int, int, memoryview]]:
        """Yield for each page the bytes of the caller's buffer, the page, their place in it, and that buffer."""
        size = self._row_bytes
        both = (memoryview(keys), 0), (memoryview(values), PAGE_ROWS * size)
        position = start
        while position < start + count:
            page, row = divmod(position, PAGE_ROWS)
            number = min(PAGE_ROWS - row, start + count - position)
            first = (position - start) * size
            for buffer, place in both:
                yield slice(first, first + number * size), held.pages[page], place + row * size, buffer
            position += number
