"""Carries steps through this worker's part of a plan: embed, own stage, hand on, sample.

Knows nothing of threads, commands or sockets: messages come in by method calls and go out through `Post`. Only the
head holds token ids, and only the head is ever given a `Step`.

A hub keeps what it hands to the next stage. A step through a part of the layers passes all stages as any other, but
nothing is computed nor carried before its first layer and after its last; the hub that keeps what enters the first
layer puts it in.

Shapes: T rows of a batch, D hidden, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from protocol.batches import Sampling, SessionRows, num_rows
from protocol.errors import AccessRefused, FrameMalformed, ProtocolViolation, SessionLost, StepFailed
from protocol.frames import Buffer
from protocol.ids import SessionId, WorkerId
from protocol.messages import Activation, SampledToken, Step, StepDone
from protocol.plans import Plan
from protocol.specs import NO_LAYERS, Span
from runtime.decoder import StageModel
from runtime.head import Head
from runtime.reduce import from_wire, to_wire
from runtime.sampler import choose
from runtime.tensors import dtype_of
from worker.kept_inputs import InputStore
from worker.star import Post, Star

Rows = tuple[SessionRows, ...]


class HeadPost(Post, Protocol):
    """What the steps need of the outside beside the star's needs."""

    def send_up(self, message: object) -> None:
        """Send to the coordinator; raises CoordinatorLost."""
        ...

    def give_way(self) -> None:
        """Called before each operation of a step; raises what ends the step when something else is due."""
        ...


class Batch(NamedTuple):
    """Rows on their way through the stages; `layers`, unless empty: those that are computed again."""

    step: int
    rows: Rows
    layers: Span = NO_LAYERS

    @property
    def is_whole(self) -> bool:
        """Whether it passes through all layers."""
        return not len(self.layers)


class Work(NamedTuple):
    """Steps computed, and the seconds of this worker's part in them."""

    steps: int
    computing_s: float


@dataclass(slots=True)
class _Stream:
    """What the head knows of a session: how to sample, and all its ids so far."""

    sampling: Sampling
    history: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What this worker has loaded for a plan; a head without tiles has no stage and no star."""

    stage: StageModel | None
    star: Star | None
    head: Head | None
    device: torch.device
    inputs: InputStore | None = None


class StepRunner:
    """One worker's work under one plan."""

    def __init__(
        self, plan: Plan, own: WorkerId, parts: Parts, post: HeadPost, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._plan = plan
        self._own = own
        self._parts = parts
        self._post = post
        self._clock = clock
        self._number = plan.stage_of(own)
        self._started: dict[int, float] = {}
        self.work = Work(0, 0.0)
        self._streams: dict[SessionId, _Stream] = {}

    def on_step(self, step: Step, payload: memoryview) -> None:
        """Head: embed the rows and send them into the first stage. Raises AccessRefused on any other worker."""
        head = self._parts.head
        if head is None or self._own != self._plan.head:
            raise AccessRefused(
                f"{self._own} is not the head and must not be given token ids",
                remedy="please report this: only the head may be sent a Step",
                phase="step",
            )
        ids = self._ids(step, payload)
        at = 0
        for opened in step.opens:
            self._streams[opened.session] = _Stream(opened.sampling, ids[at : at + opened.history])
            at += opened.history
        ids, at = ids[at:], 0
        for part in step.rows:
            self._append(part, ids[at : at + part.count])
            at += part.count
        self._started[step.step] = self._clock()
        batch = self._batch(step.step, step.rows, step.layers)
        self._hand_to(0, batch, head.embed(ids) if batch.is_whole or not batch.layers.start else None)

    def on_activation(self, sender: WorkerId, message: Activation, payload: memoryview) -> None:
        """Compute the stage a batch has come to, or sample it at the end. Raises ProtocolViolation when astray."""
        if sender not in self._senders(message.stage):
            raise ProtocolViolation(f"{sender} may not send activations into stage {message.stage}", node=sender)
        if message.format is not self._plan.wire:
            raise ProtocolViolation(
                f"{sender} sent {message.format}, the plan's wire is {self._plan.wire}", node=sender
            )
        batch = self._batch(message.step, message.rows, message.layers)
        hidden_TD = None
        if payload.nbytes or batch.is_whole:
            try:
                hidden_TD = self._from_wire(payload, batch)
            except ProtocolViolation as error:
                error.node = sender
                raise
        if message.stage == len(self._plan.stages):
            self._finish(batch, hidden_TD)
        else:
            self._compute(batch, hidden_TD)

    def release(self, sessions: Iterable[SessionId]) -> None:
        """Forget sessions and free their caches."""
        for session in sessions:
            self._streams.pop(session, None)
            if self._parts.stage is not None:
                self._parts.stage.release(session)

    def _hand_to(self, stage: int, batch: Batch, hidden_TD: Tensor | None) -> None:
        """Pass a batch on to the hub of `stage`, or to the head after the last; here when that is this worker."""
        if hidden_TD is not None:
            # What crosses a stage's border is rounded to the wire's format, also where no wire is crossed.
            hidden_TD = hidden_TD.to(dtype_of(self._plan.wire)).to(dtype_of(self._plan.model.activations))
        is_last = stage == len(self._plan.stages)
        target = self._plan.head if is_last else self._plan.stages[stage].hub_worker
        if target != self._own:
            self._post.send((target,), self._activation(stage, batch), self._to_wire(hidden_TD))
        elif is_last:
            self._finish(batch, hidden_TD)
        else:
            self._compute(batch, hidden_TD)

    def _compute(self, batch: Batch, hidden_TD: Tensor | None) -> None:
        star = self._parts.star
        if self._parts.stage is None or self._number is None or star is None:
            raise ProtocolViolation(f"{self._own} is a member of no stage", phase="step")
        stage = self._plan.stages[self._number]
        is_hub = stage.hub_worker == self._own
        if hidden_TD is None and is_hub and self._plan.enters_after(self._number, batch.layers.start):
            hidden_TD = self._kept(batch)
        if is_hub and not batch.is_whole and not len(batch.layers & stage.layers):
            self._hand_to(self._number + 1, batch, hidden_TD)
            return
        if hidden_TD is None:
            raise StepFailed(f"what enters layer {batch.layers.start} did not come to {self._own}", phase="step")
        if is_hub and len(stage.members) > 1:
            message, payload = self._activation(self._number, batch), self._to_wire(hidden_TD)
            self._post.send([share.worker for share in stage.members if share.worker != self._own], message, payload)
        count = num_rows(batch.rows)
        began = self._clock()

        def reduce(op: int, part_TD: Tensor | None) -> Tensor:
            self._post.give_way()
            return star.reduce(batch.step, count, op, part_TD)

        hidden_TD = self._parts.stage.forward(
            hidden_TD, batch.rows, reduce, None if batch.is_whole else batch.layers, star.part(count)
        )
        self._count(began, steps=1)
        if is_hub:
            is_over = not batch.is_whole and batch.layers.end <= stage.layers.end
            self._hand_to(self._number + 1, batch, None if is_over else hidden_TD)
            self._keep(batch, stage.layers.end, hidden_TD)  # after it is on its way: nobody waits for the disk

    def _keep(self, batch: Batch, layer: int, hidden_TD: Tensor) -> None:
        """Keep what enters a later layer, unless this is the end, or the batch ended before that."""
        inputs, is_reached = self._parts.inputs, batch.is_whole or batch.layers.end >= layer
        if inputs is None or layer == self._plan.model.layers or not is_reached:
            return
        data, at = memoryview(self._to_wire(hidden_TD)), 0
        row_bytes = data.nbytes // num_rows(batch.rows)
        for part in batch.rows:
            inputs.keep(part.session, layer, part.start, data[at : at + part.count * row_bytes])
            at += part.count * row_bytes

    def _kept(self, batch: Batch) -> Tensor | None:
        """Return what enters the first layer of a batch; None when not all of it is kept here."""
        inputs, layer = self._parts.inputs, batch.layers.start
        if inputs is None:
            return None
        found = [inputs.read(part.session, layer, part.start, part.count) for part in batch.rows]
        halves = [data for data in found if data is not None]
        return self._from_wire(memoryview(b"".join(halves)), batch) if len(halves) == len(found) else None

    def _finish(self, batch: Batch, hidden_TD: Tensor | None) -> None:
        head, started = self._parts.head, self._started.pop(batch.step, None)
        if head is None or started is None:
            raise ProtocolViolation(f"step {batch.step} came back to {self._own}, which has not begun it", phase="step")
        sampled = [part for part in batch.rows if part.sample]
        tokens = []
        if sampled and hidden_TD is not None:
            began = self._clock()
            logits_NV = head.logits(hidden_TD, batch.rows)
            tokens = [self._sample(part, logits_V) for part, logits_V in zip(sampled, logits_NV, strict=True)]
            self._count(began, steps=int(self._parts.stage is None))
        done = StepDone(
            epoch=self._plan.epoch, step=batch.step, tokens=tuple(tokens), step_s=max(0.0, self._clock() - started)
        )
        self._post.send_up(done)

    def _count(self, began: float, *, steps: int) -> None:
        self.work = Work(self.work.steps + steps, self.work.computing_s + self._clock() - began)

    def _sample(self, part: SessionRows, logits_V: Tensor) -> SampledToken:
        stream = self._streams.get(part.session)
        if stream is None:  # released while its step was under way: nobody reads this token
            stream = _Stream(Sampling())
        choice = choose(logits_V, stream.sampling, history=stream.history, position=part.start + part.count)
        return SampledToken(session=part.session, token=choice.token, logprob=choice.logprob)

    def _append(self, part: SessionRows, ids: list[int]) -> None:
        stream = self._streams.get(part.session)
        if stream is None or len(stream.history) < part.start:
            known = 0 if stream is None else len(stream.history)
            raise SessionLost(f"the head knows {known} ids of session {part.session}, its rows start at {part.start}")
        del stream.history[part.start :]  # a repeated step says them again
        stream.history += ids

    def _ids(self, step: Step, payload: memoryview) -> list[int]:
        """Return the histories of `opens`, in order, then one id a row."""
        count, known = num_rows(step.rows), sum(opened.history for opened in step.opens)
        if len(payload) != 4 * (known + count):
            raise FrameMalformed(f"Step: {len(payload)} bytes of token ids for {known} of histories and {count} rows")
        ids: list[int] = np.frombuffer(payload, dtype="<i4").tolist()
        return ids

    def _senders(self, stage: int) -> tuple[WorkerId, ...]:
        """Who may send this worker activations into `stage`."""
        plan = self._plan
        if stage == len(plan.stages):
            return (plan.stages[-1].hub_worker,) if self._own == plan.head else ()
        if stage != self._number:
            return ()
        hub = plan.stages[stage].hub_worker
        if hub != self._own:
            return (hub,)
        return (plan.head if stage == 0 else plan.stages[stage - 1].hub_worker,)

    def _batch(self, step: int, rows: Rows, layers: Span) -> Batch:
        """Put a batch together; raises ProtocolViolation for layers that are none, or that end before the sampler."""
        if layers.end > self._plan.model.layers or (len(layers) and any(part.sample for part in rows)):
            raise ProtocolViolation(f"step {step} can't go through layers {layers}", phase="step")
        return Batch(step, rows, layers)

    def _to_wire(self, hidden_TD: Tensor | None) -> Buffer:
        return to_wire(hidden_TD, self._plan.wire) if hidden_TD is not None else b""

    def _from_wire(self, payload: memoryview, batch: Batch) -> Tensor:
        hidden_TD = from_wire(payload, self._plan.wire, (num_rows(batch.rows), self._plan.model.hidden))
        return hidden_TD.to(self._parts.device, dtype_of(self._plan.model.activations))

    def _activation(self, stage: int, batch: Batch) -> Activation:
        return Activation(
            epoch=self._plan.epoch,
            step=batch.step,
            stage=stage,
            format=self._plan.wire,
            rows=batch.rows,
            layers=batch.layers,
        )
