"""The text of one answer: its tokens decoded as they come, cut at the first stop string.

Knows nothing of sessions or messages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from coordinator.tokens import Found, StopFinder, TextCodec


class AnswerText:
    """Fed with tokens, gives the text that is certain: neither half a character nor a possible stop string."""

    def __init__(self, codec: TextCodec, stops: Sequence[str]) -> None:
        self._stream = codec.stream()
        self._finder = StopFinder(stops)

    def push(self, tokens: Iterable[int]) -> Found:
        """Return the text these tokens make certain, and whether a stop string ended it."""
        return self._finder.push("".join([self._stream.push(token) for token in tokens]))

    def finish(self) -> Found:
        """Return what was held back, as no more tokens come."""
        last = self._finder.push(self._stream.finish())
        return last if last.stopped else Found(last.text + self._finder.finish(), False)
