"""The text of one answer: its tokens decoded as they come, cut at the first stop string.

Knows nothing of sessions or messages. Everything depends on the tokens alone, not on how they were handed in, so an
answer that is put together again from its token log says the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from coordinator.tokens import StopFinder, TextCodec


class AnswerText:
    """Fed with tokens; `tokens` and `text` are what may be shown: neither half a character nor a possible stop string.

    Once a stop string `is_stopped` it, nothing is added any more. Without a codec there is no text.
    """

    def __init__(self, codec: TextCodec | None, stops: Sequence[str]) -> None:
        self.tokens: array[int] = array("i")
        self.text = ""
        self.is_stopped = False
        self._stream = None if codec is None else codec.stream()
        self._finder = StopFinder(stops)

    def push(self, tokens: Iterable[int]) -> None:
        """Take in the next tokens; the one that ends a stop string is the last."""
        for token in tokens:
            if self.is_stopped:
                return
            self.tokens.append(token)
            if self._stream is not None:
                self._show(self._stream.push(token))

    def finish(self) -> None:
        """Show what was held back, as no more tokens come."""
        if self._stream is None or self.is_stopped:
            return
        self._show(self._stream.finish())
        if not self.is_stopped:
            self.text += self._finder.finish()

    def _show(self, text: str) -> None:
        found = self._finder.push(text)
        self.text += found.text
        self.is_stopped = found.stopped
