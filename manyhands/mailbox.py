"""Where the updates of one request wait for its caller: text and tokens merged until they are read.

Knows nothing of messages or sockets. What it holds is bounded by the answer itself: unread pieces become one piece.
"""

from __future__ import annotations

import asyncio

from manyhands.conversation import Update, WaitsFor
from manyhands.results import Generation, Piece
from protocol.errors import Cancelled, ManyhandsError


class Mailbox:
    """Updates of one request, in the event loop of its client; `waits_for` is what the coordinator said last."""

    def __init__(self) -> None:
        self.waits_for = ""
        self.end: Generation | ManyhandsError | None = None
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._changed = asyncio.Event()

    def put(self, update: Update) -> None:
        """Take an update in."""
        match update:
            case WaitsFor(phase):
                self.waits_for = phase
                return
            case Piece():
                self.waits_for = ""
                self._texts.append(update.text)
                self._token_ids += update.token_ids
            case _:
                self.end = update
        self._changed.set()

    def close(self) -> None:
        """Let go of a reader that waits: nothing more is wanted."""
        self._texts.clear()
        self._token_ids.clear()
        self._changed.set()

    async def next_piece(self) -> Piece | None:
        """Wait for text or tokens and return all that is there; None after the end. Raises the request's error."""
        await self._changed.wait()
        if self._texts or self._token_ids:
            piece = Piece(text="".join(self._texts), token_ids=tuple(self._token_ids))
            self._texts.clear()
            self._token_ids.clear()
            if self.end is None:
                self._changed.clear()
            return piece
        if isinstance(self.end, ManyhandsError):
            raise self.end
        return None

    async def result(self) -> Generation:
        """Wait for the end; raises the request's error."""
        while await self.next_piece() is not None:
            pass
        if not isinstance(self.end, Generation):
            raise Cancelled("the stream was closed before its end")
        return self.end
