"""What outlives a coordinator of the world: its sessions with their logs, its term, and the last plan's seats.

Knows nothing of the core's ways. Clients ask here what became of their requests.
"""

from __future__ import annotations

import copy
from array import array
from dataclasses import dataclass, field
from functools import cached_property

from coordinator.events import Effect, SeatsChanged, SessionEnded, SessionFailed, TokensCommitted
from coordinator.seating import Seats
from coordinator.session import Session
from protocol.batches import Sampling
from protocol.ids import SessionId
from world.model import expected_answer


@dataclass
class Request:
    """One request, as a client sees it. `setbacks`: plans that ended while a step computed it, since its last token."""

    prompt: list[int]
    max_tokens: int
    stop_tokens: frozenset[int]
    arrived_at: float = 0.0
    answer: list[int] = field(default_factory=list)
    end: SessionEnded | SessionFailed | None = None
    setbacks: int = 0

    @cached_property
    def whole(self) -> list[int]:
        """What a single machine would answer."""
        return expected_answer(self.prompt, self.max_tokens, self.stop_tokens)


class Journal:
    """One state folder."""

    def __init__(self) -> None:
        self.requests: dict[SessionId, Request] = {}
        self.term = 0
        self.seats: Seats = ()

    def copied(self) -> Journal:
        """Return a copy, as somebody has who starts a second coordinator from a backup."""
        return copy.deepcopy(self)

    def begin_term(self) -> int:
        self.term += 1
        return self.term

    def write(self, effects: list[Effect]) -> None:
        """Keep what an event led to, before anybody is told."""
        for effect in effects:
            match effect:
                case TokensCommitted():
                    self.requests[effect.session].answer += effect.tokens
                case SessionEnded() | SessionFailed():
                    self.requests[effect.session].end = effect
                case SeatsChanged():
                    self.seats = effect.seats
                case _:
                    pass

    def saved(self, clock_offset_s: float) -> list[Session]:
        """Return the sessions that are not over, with times on the clock of who asks."""
        return [
            Session(
                session=number,
                tokens=array("i", one.prompt + one.answer),
                num_prompt=len(one.prompt),
                max_tokens=one.max_tokens,
                sampling=Sampling(),
                stop_tokens=one.stop_tokens,
                arrived_at=one.arrived_at + clock_offset_s,
            )
            for number, one in self.requests.items()
            if one.end is None
        ]
