"""One request's life: its token log, how much of it the workers have computed, and its times.

Knows nothing of queues, plans or other sessions.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from coordinator.events import RequestArrived, token_ids
from coordinator.memory import KvRoom
from coordinator.replays import Replay
from protocol.batches import Sampling, SessionRows
from protocol.errors import ManyhandsError, PeerLost, PromptTooLong, RequestInvalid
from protocol.ids import SessionId
from protocol.messages import Leg, Timings, Usage
from protocol.specs import NO_LAYERS, ModelSpec, Span

MAX_LEGS = 64
LOSS_WEIGHT = 1  # a lost worker may be anybody's fault
ERROR_WEIGHT = 3  # an error in computing is likely to come again with the same session
MAX_SETBACKS = 12


@dataclass(slots=True, kw_only=True)
class Session:
    """`tokens` is the whole log, prompt and answer; of it the workers hold keys and values of the first `computed`.

    The log is all that is needed to compute the session again from its beginning, by setting `computed` to 0.
    `reached` is the most that ever was: what workers have put away of it stays true, as the log only grows.
    `replay`: what is computed again of it under this plan, and how. `is_known`: workers of this epoch may hold
    something of it; `opened_in`: the epoch in which the head was told of it.
    `setbacks` weighs the epochs that ended while a step computed it, since its last new token.
    """

    session: SessionId
    tokens: array[int]
    num_prompt: int
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    arrived_at: float
    at: int = 0  # where in the workers' KV arenas it lies
    computed: int = 0
    reached: int = 0
    replay: Replay | None = None
    last_step: int = field(default=-1)
    is_in_flight: bool = False
    started_at: float | None = None
    first_token_at: float | None = None
    is_known: bool = False
    opened_in: int = 0
    setbacks: int = 0
    legs: list[Leg] = field(default_factory=list)

    @property
    def capacity(self) -> int:
        """Positions of keys and values it may take."""
        return self.num_prompt + self.max_tokens

    @property
    def num_answer(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens of the log that the workers have not computed; 1 while it decodes."""
        return len(self.tokens) - self.computed

    @property
    def layers(self) -> Span:
        """The layers that its next rows are computed through; empty: all."""
        replay = self.replay
        return replay.layers if replay is not None and self.computed < replay.until else NO_LAYERS

    def next_rows(self, most: int) -> SessionRows:
        """Return the next rows to compute, at most `most`; the last row of the log is sampled.

        What is computed again is cut as it was the first time, the answer row by row: arithmetic that rounds coarsely
        would make other tokens of other last bits.
        """
        is_answer = self.computed >= self.num_prompt
        end = self.replay.until if self.replay is not None and len(self.layers) else len(self.tokens)
        end = end if is_answer else min(end, self.num_prompt)
        count = min(most, end - self.computed)
        return SessionRows(
            session=self.session,
            start=self.computed,
            count=count,
            capacity=self.capacity,
            sample=self.computed + count == len(self.tokens),
            at=self.at,
            alone=is_answer and count > 1,
        )

    def advance_to(self, position: int) -> None:
        """Count the positions before this one as computed."""
        self.computed = position
        self.reached = max(self.reached, position)

    @property
    def phase(self) -> str:
        """What it does while it runs, in a few words."""
        if self.num_pending == 1:
            return "answering"
        what = "reading the prompt" if self.first_token_at is None else "computing again what was lost"
        return f"{what}: {self.computed} of {len(self.tokens)} tokens"

    def require_room(self, room: KvRoom) -> None:
        """Raise PromptTooLong when not even all the room there is could hold it."""
        if self.capacity > room.positions:
            raise PromptTooLong(
                f"{self.num_prompt} prompt tokens and max_tokens {self.max_tokens} need {self.capacity} positions, but "
                f"{room.text}",
                remedy=f"shorten the prompt, lower max_tokens, or {room.remedy}",
                node=room.worker or "",
            )

    def is_given_up_after(self, error: ManyhandsError) -> bool:
        """Count the end of an epoch, and say whether this session was under way too often when one ended."""
        self.setbacks += self.is_in_flight * (LOSS_WEIGHT if isinstance(error, PeerLost) else ERROR_WEIGHT)
        return self.setbacks >= MAX_SETBACKS

    def begin_leg(self, leg: Leg) -> None:
        """Note under which plan it goes on; one under which nothing was computed is forgotten."""
        if self.legs and self.legs[-1].start == leg.start:
            self.legs.pop()
        self.legs = [*self.legs, leg][-MAX_LEGS:]

    def usage(self) -> Usage:
        """Count tokens; an end-of-text token is not counted."""
        return Usage(prompt_tokens=self.num_prompt, completion_tokens=self.num_answer)

    def timings(self, now: float) -> Timings:
        """Return where the time went; a phase that was never reached lasts until now."""
        started_at = now if self.started_at is None else self.started_at
        first_token_at = now if self.first_token_at is None else self.first_token_at
        return Timings(
            queued_s=started_at - self.arrived_at,
            first_token_s=first_token_at - self.arrived_at,
            total_s=now - self.arrived_at,
        )


def open_session(event: RequestArrived, spec: ModelSpec, now: float) -> Session:
    """Check a request against the model; raises RequestInvalid or PromptTooLong with the numbers."""
    if len(event.prompt) % 4:
        raise RequestInvalid(f"prompt of {len(event.prompt)} bytes is no list of int32 token ids")
    tokens = token_ids(event.prompt)
    if not tokens:
        raise RequestInvalid("the prompt is empty", remedy="send at least one token")
    if event.max_tokens < 1:
        raise RequestInvalid(f"max_tokens {event.max_tokens} must be at least 1")
    if min(tokens) < 0 or max(tokens) >= spec.vocab:
        position, token = next((i, token) for i, token in enumerate(tokens) if not 0 <= token < spec.vocab)
        raise RequestInvalid(
            f"token {token} at position {position} of the prompt is outside the vocabulary of {spec.vocab}",
            remedy="encode the prompt with this model's tokenizer",
        )
    if len(tokens) + event.max_tokens > spec.max_positions:
        raise PromptTooLong(
            f"{len(tokens)} prompt tokens and max_tokens {event.max_tokens} exceed the context of {spec.max_positions}"
        )
    return Session(
        session=event.session,
        tokens=tokens,
        num_prompt=len(tokens),
        max_tokens=event.max_tokens,
        sampling=event.sampling,
        stop_tokens=event.stop_tokens,
        arrived_at=now,
    )
