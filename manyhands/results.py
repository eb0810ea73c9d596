"""What a client gets back: pieces of a running stream, and the whole generation at its end.

Knows nothing of how they arrive.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import FinishReason, Leg, Timings, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New text of a stream and the tokens behind it.

    The text of all pieces is the text of the generation. A piece may have tokens and no text yet, when these tokens
    are the beginning of a character or of a stop string.
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished answer: its text, its tokens, why it ended, what it cost, and who computed it.

    `legs`: one for each plan that it was computed under, the latest 64 at most; several when workers came or went.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    legs: tuple[Leg, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second after the first one; 0 when there are fewer than two."""
        decode_s = self.timings.total_s - self.timings.first_token_s
        return (self.usage.completion_tokens - 1) / decode_s if decode_s > 0 and len(self.token_ids) > 1 else 0.0
