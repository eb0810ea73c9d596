"""Requests that have ended, kept for a while: for a client that lost its connection, and for one that asks twice.

Knows nothing of files; what is dropped here is dropped from the token log by who asked for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coordinator.answer_text import AnswerText
from coordinator.token_log import Outcome
from coordinator.tokens import TextCodec
from protocol.ids import RequestId, SessionId
from protocol.messages import Accepted, ErrorReport, Finished, FinishReason, Generate

KEEP_S = 600.0
MAX_KEPT = 256
MAX_TOKENS = 1 << 20  # of all of them together


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """One of them; `tokens` are those that were shown, its text is put together again when somebody wants it."""

    session: SessionId
    order: Generate
    digest: bytes
    num_prompt: int
    tokens: array[int]
    outcome: Outcome
    ended_at: float

    @property
    def is_answered(self) -> bool:
        """Whether asking the same again gets this answer, and not a new one."""
        return isinstance(self.outcome, Finished) and self.outcome.reason is not FinishReason.CANCELLED

    @property
    def accepted(self) -> Accepted:
        """What was said when it was queued."""
        return Accepted(request=self.order.request, session=self.session, prompt_tokens=self.num_prompt)

    def told(self, codec: TextCodec | None) -> tuple[AnswerText, Outcome]:
        """Return all that was shown of it, and its last word."""
        answer, outcome = whole_answer(codec, self.order, self.tokens, self.outcome), self.outcome
        if answer.is_stopped and isinstance(outcome, Finished):
            outcome = replace(outcome, reason=FinishReason.STOP)  # written before its last tokens were read
        return answer, outcome


def whole_answer(
    codec: TextCodec | None, order: Generate, tokens: Sequence[int], outcome: Outcome | None
) -> AnswerText:
    """Put an answer together from its token log; with what was held back when it came to a good end."""
    answer = AnswerText(codec, order.stop)
    answer.push(tokens)
    if outcome is not None and not isinstance(outcome, ErrorReport) and outcome.reason is not FinishReason.CANCELLED:
        answer.finish()
    return answer


class EndedRequests:
    """Those of the last ten minutes, within bounds; the oldest go first."""

    def __init__(self) -> None:
        self._kept: dict[RequestId, EndedRequest] = {}  # oldest first
        self._num_tokens = 0

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, request: RequestId) -> EndedRequest | None:
        """Return one by its name."""
        return self._kept.get(request)

    def put(self, ended: EndedRequest) -> None:
        """Keep one, instead of one of the same name; it may break the bounds until `prune`."""
        if ended.order.request in self._kept:
            self.drop(ended.order.request)
        self._kept[ended.order.request] = ended
        self._num_tokens += len(ended.tokens)

    def drop(self, request: RequestId) -> SessionId:
        """Forget one and return its session."""
        ended = self._kept.pop(request)
        self._num_tokens -= len(ended.tokens)
        return ended.session

    def prune(self, now: float) -> list[SessionId]:
        """Drop what is too old or too much; returns the sessions."""
        dropped = []
        while self._kept:
            oldest = next(iter(self._kept.values()))
            is_young = now - oldest.ended_at < KEEP_S
            if is_young and len(self._kept) <= MAX_KEPT and self._num_tokens <= MAX_TOKENS:
                break
            dropped.append(self.drop(oldest.order.request))
        return dropped
