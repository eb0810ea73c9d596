"""The inputs of later stages, kept by who computed them: with these a later layer can be computed again without those
before it.

Knows nothing of plans or tensors. What enters layer n of a session lies under (session, n), in the bytes in which it
went over the wire, whatever stages there are; so it outlives a plan whose borders move. It always begins at position 0
and has no gap. Each row is written through to the disk at once, so no memory grows with it. Nothing here is an error:
what can't be written or read is forgotten, and then all layers are computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from protocol.frames import Buffer
from protocol.ids import SessionId
from protocol.plans import Plan
from worker.page_file import PageFile

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Rows:
    """The rows of one session before one layer, one after the other over its pages."""

    length: int = 0
    pages: list[int] = field(default_factory=list)


class InputStore:
    """Rows of all sessions of one worker, in the pages of a spool. One thread uses it."""

    def __init__(self, pages: PageFile) -> None:
        self._pages = pages
        self._row_bytes = 0
        self._kind: object = None
        self._sessions: dict[SessionId, dict[int, _Rows]] = {}

    @property
    def sessions(self) -> frozenset[SessionId]:
        """Sessions of which some rows are here."""
        return frozenset(self._sessions)

    def turn_to(self, plan: Plan) -> None:
        """Take rows of this plan's model and wire from now on; others are forgotten."""
        kind = plan.model, plan.wire
        if kind != self._kind:
            self.clear()
            self._kind, self._row_bytes = kind, plan.model.hidden * plan.wire.num_bytes

    def lengths(self, session: SessionId) -> dict[int, int]:
        """Return how many positions, from the first one on, are here, by layer."""
        return {layer: rows.length for layer, rows in self._sessions.get(session, {}).items() if rows.length}

    def keep(self, session: SessionId, layer: int, start: int, data: Buffer) -> None:
        """Keep what enters a layer from position `start` on, which may be here already, unless there is a gap."""
        found = self._sessions.get(session, {}).get(layer)
        if start > (found.length if found is not None else 0) or not self._pages.page_bytes:
            return
        rows = found or self._sessions.setdefault(session, {}).setdefault(layer, _Rows())
        view, first = memoryview(data).cast("B"), start * self._row_bytes
        try:
            while len(rows.pages) * self._pages.page_bytes < first + len(view):
                rows.pages.append(self._pages.take())
            for part, page, place in self._pieces(rows, first, len(view)):
                self._pages.write(page, place, view[part])
        except OSError as error:
            _log.info("inputs of layer %d of session %d are not kept: %s", layer, session, error.strerror or error)
            self._drop(session, layer)
            return
        rows.length = max(rows.length, (first + len(view)) // self._row_bytes)

    def read(self, session: SessionId, layer: int, start: int, count: int) -> bytes | None:
        """Return what enters a layer at some positions; None when not all of it is here, or can be read."""
        rows = self._sessions.get(session, {}).get(layer)
        if rows is None or start + count > rows.length:
            return None
        first, length = start * self._row_bytes, count * self._row_bytes
        try:
            pieces = self._pieces(rows, first, length)
            return b"".join(self._pages.read(page, place, part.stop - part.start) for part, page, place in pieces)
        except OSError as error:
            _log.warning("inputs of session %d can't be read again: %s", session, error.strerror or error)
            self.forget(session)
            return None

    def truncate(self, session: SessionId, length: int) -> None:
        """Let go of positions from `length` on."""
        for rows in self._sessions.get(session, {}).values():
            rows.length = min(rows.length, length)

    def forget(self, session: SessionId) -> None:
        """Let go of a session."""
        for layer in list(self._sessions.get(session, {})):
            self._drop(session, layer)

    def keep_only(self, sessions: Collection[SessionId]) -> None:
        """Let go of all other sessions."""
        for session in self.sessions.difference(sessions):
            self.forget(session)

    def clear(self) -> None:
        """Let go of everything."""
        self.keep_only(())

    def _drop(self, session: SessionId, layer: int) -> None:
        layers = self._sessions[session]
        self._pages.give_back(layers.pop(layer).pages)
        if not layers:
            del self._sessions[session]

    def _pieces(self, rows: _Rows, first: int, length: int) -> Iterator[tuple[slice, int, int]]:
        """Yield for each page the part of `length` bytes that lies there, the page, and the place in it."""
        at, size = 0, self._pages.page_bytes
        while at < length:
            number, place = divmod(first + at, size)
            end = min(length, at + size - place)
            yield slice(at, end), rows.pages[number], place
            at = end
