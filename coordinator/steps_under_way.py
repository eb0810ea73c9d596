"""Steps that have been sent and not come back: what each computes, and whether its answer fits.

Knows nothing of queues or memory. Step numbers rise over all epochs.
"""

from __future__ import annotations

from typing import NamedTuple

from coordinator.batching import Batch
from coordinator.events import SendStep, token_bytes
from protocol.batches import SessionRows
from protocol.errors import FrameMalformed
from protocol.ids import SessionId
from protocol.messages import SessionSampling, Step, StepDone
from protocol.plans import Plan
from protocol.specs import ModelSpec


class _UnderWay(NamedTuple):
    rows: tuple[SessionRows, ...]
    sent_at: float


class Finished(NamedTuple):
    """The rows of a step that came back, and the token of each session that asked for one."""

    rows: tuple[SessionRows, ...]
    tokens: dict[SessionId, int]


class StepsUnderWay:
    """The steps of one epoch at a time; `forget` ends it."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._steps: dict[int, _UnderWay] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def oldest_at(self) -> float | None:
        """When the oldest one was sent; None when there is none."""
        return min((step.sent_at for step in self._steps.values()), default=None)

    def send(self, plan: Plan, batch: Batch, now: float) -> SendStep:
        """Make a step of a batch; the head is told of each session that it does not know under this epoch."""
        number = self._next
        self._next += 1
        rows = tuple(part for _, part in batch.parts)
        unknown = [(session, part) for session, part in batch.parts if session.opened_in != plan.epoch]
        opens = tuple(
            SessionSampling(session=session.session, sampling=session.sampling, history=part.start)
            for session, part in unknown
        )
        payload = [token_bytes(session.tokens[: part.start]) for session, part in unknown]
        payload += [token_bytes(session.tokens[part.start : part.start + part.count]) for session, part in batch.parts]
        for session, _ in batch.parts:
            session.is_in_flight = session.is_known = True
            session.last_step, session.opened_in = number, plan.epoch
        self._steps[number] = _UnderWay(rows, now)
        message = Step(epoch=plan.epoch, step=number, rows=rows, opens=opens, layers=batch.layers)
        return SendStep(worker=plan.head, step=message, tokens=b"".join(payload))

    def finish(self, done: StepDone) -> Finished | None:
        """Take a step that came back; None for an unknown one.

        Raises FrameMalformed, before anything has changed, when its tokens are not those that were asked for.
        """
        if done.step not in self._steps:
            return None
        rows = self._steps[done.step].rows
        tokens = {sampled.session: sampled.token for sampled in done.tokens}
        wanted = {part.session for part in rows if part.sample}
        if tokens.keys() != wanted or len(done.tokens) != len(wanted):
            raise FrameMalformed(f"step {done.step} brought tokens for {sorted(tokens)}, not {sorted(wanted)}")
        if any(token >= self._spec.vocab for token in tokens.values()):
            raise FrameMalformed(f"step {done.step} brought a token outside the vocabulary of {self._spec.vocab}")
        del self._steps[done.step]
        return Finished(rows, tokens)

    def forget(self) -> None:
        """The epoch is over: what comes back from now on is unknown."""
        self._steps = {}
