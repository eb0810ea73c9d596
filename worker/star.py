"""The star: adds the members' parts of every operation at the hub and hands the same bytes to all.

Knows nothing of sockets (it is given `Post`) or of layers. Parts are added in the order of ranks, in fp32, rounded to
the wire's format first, so every member computes on with the same bits whoever is hub.

A frame is compared with the one that is due (`worker.due`), and decoded only to say in what it differs.

Shapes: T rows of a batch, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor

from protocol import flat
from protocol.errors import DeadlineExceeded, ManyhandsError, ProtocolViolation, StepFailed
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import Partial, Sum
from protocol.plans import Plan
from runtime.reduce import Total, add_parts, sum_partials
from runtime.tensors import as_bytes, as_tensor, dtype_of
from worker.doors import Doors, Unread
from worker.due import Due
from worker.wire import JOIN_MOST_BYTES, Arrival

STEP_TIMEOUT_S: Final = 30.0
PARTIAL: Final = flat.FORMS[Partial]
SUM: Final = flat.FORMS[Sum]


class Post(Protocol):
    """What the star needs of the outside."""

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer) -> None:
        """Send the same message (or the header of its flat form) to members; raises PeerLost."""
        ...

    def doors(self) -> Doors | None:
        """Return the short ways to members; None while something else must be heard first."""
        ...

    def collect(self, due: Due, timeout_s: float, unread: Unread | None = None) -> Arrival | None:
        """Wait until all that is due has come, or nothing of it comes for `timeout_s`; raises what ends the step.

        Returns at once with a `Partial` or `Sum` that is not due. `unread`: what `Doors.take` handed back.
        """
        ...


class Star:
    """One member's end of its stage's star, under one plan."""

    def __init__(
        self,
        plan: Plan,
        own: WorkerId,
        post: Post,
        device: torch.device,
        *,
        timeout_s: float = STEP_TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        number = plan.stage_of(own)
        if number is None:
            raise ValueError(f"{own} is a member of no stage")
        stage = plan.stages[number]
        self._plan = plan
        self._own, self._hub = own, stage.hub_worker
        self._is_hub = own == self._hub
        self._members = tuple(share.worker for share in stage.members)
        self._ranks = {worker: rank for rank, worker in enumerate(self._members)}
        self._rank = self._ranks[own]
        self._targets = tuple(worker for worker in self._members if worker != own) if self._is_hub else (self._hub,)
        owing = [(share, rank) for rank, share in enumerate(stage.members) if share.worker != own]
        self._owing = (  # by parity of the operation: attention, FFN
            tuple((share.worker, rank) for share, rank in owing if len(share.groups)),
            tuple((share.worker, rank) for share, rank in owing if len(share.ffn)),
        )
        self._post = post
        self._timeout_s = timeout_s
        self._device = device
        self._format = flat.place_of(plan.wire)
        self._activations, self._wire = dtype_of(plan.model.activations), dtype_of(plan.wire)
        self._hidden = plan.model.hidden
        self._row_bytes = self._hidden * self._wire.itemsize
        self._is_plain_fp32 = device.type == "cpu" and self._wire is self._activations is torch.float32
        self._totals: dict[int, Total] = {}  # by rows
        self._clock = clock
        self.num_ops = 0
        self.num_bytes = 0
        self.seconds = 0.0  # spent on sums, waiting for other members included

    def reduce(self, step: int, num_rows: int, op: int, own_TD: Tensor | None) -> Tensor:
        """Return the sum of `op` over all members, `[T, D]`; every member calls this for every operation.

        It is valid until the next call: small sums lie in the same memory one after the other. Raises ProtocolViolation
        for a frame that does not fit, DeadlineExceeded naming whom it waited for in vain, StepFailed for an own part of
        another shape.
        """
        if len(self._ranks) == 1:
            total_TD = sum_partials([own_TD], self._plan.wire)
            self.num_ops += 1
            return total_TD.to(self._activations)
        began = self._clock()
        shape, num_bytes = (num_rows, self._hidden), num_rows * self._row_bytes
        own = None
        if own_TD is not None:
            own = as_bytes(own_TD if own_TD.dtype is self._wire else own_TD.to(self._wire))
            if len(own) != num_bytes:
                raise StepFailed(f"the own part of a sum of {num_bytes} bytes has shape {list(own_TD.shape)}")
        # From here to the sockets the way is short on purpose, see `worker.doors`.
        total = self._totals.get(num_rows)
        if total is None and self._is_plain_fp32 and num_bytes <= JOIN_MOST_BYTES:
            total = self._totals[num_rows] = Total(num_rows, self._hidden)
        if self._is_hub:
            payload = self._gather(step, op, shape, own, total)
        else:
            payload = self._ask_hub(step, op, num_bytes, own)
            if total is not None:
                total.octets[:] = payload
        self.num_ops += 1
        self.seconds += self._clock() - began
        if total is not None:
            return total.total_TD
        return as_tensor(payload, self._wire, shape).to(self._device, self._activations)

    def _gather(
        self, step: int, op: int, shape: tuple[int, int], own: memoryview | None, total: Total | None
    ) -> memoryview:
        """Hub: wait for every part, add them in rank order, hand out the sum."""
        epoch, form = self._plan.epoch, self._format
        headers = {worker: PARTIAL.header(epoch, step, op, rank, form) for worker, rank in self._owing[op % 2]}
        due = Due(step, op, headers, shape[0] * self._row_bytes)
        doors = self._post.doors()
        unread = None if doors is None else doors.take(due)
        if headers:
            self._wait(due, unread)
            doors = self._post.doors()
        parts = due.parts
        if own is not None:
            parts[self._own] = own
        present = [parts[worker] for worker in self._members if worker in parts]
        payload = add_parts(present, self._plan.wire, shape, total)
        header = SUM.header(epoch, step, op, form)
        targets = self._targets if doors is None else doors.send(self._targets, header, payload)
        if targets:
            self._post.send(targets, header, payload)
        self.num_bytes += due.num_bytes * (len(parts) + len(self._targets))
        return payload

    def _ask_hub(self, step: int, op: int, num_bytes: int, own: memoryview | None) -> memoryview:
        """Another member: send the own part, wait for the sum."""
        epoch, form, hub = self._plan.epoch, self._format, self._hub
        doors = self._post.doors()
        if own is not None:
            header = PARTIAL.header(epoch, step, op, self._rank, form)
            if doors is None or doors.send(self._targets, header, own):
                self._post.send(self._targets, header, own)
        due = Due(step, op, {hub: SUM.header(epoch, step, op, form)}, num_bytes)
        unread = None if doors is None else doors.take(due)
        if due.headers:
            self._wait(due, unread)
        self.num_bytes += num_bytes * (1 if own is None else 2)
        return due.parts[hub]

    def _wait(self, due: Due, unread: Unread | None) -> None:
        """Wait for what did not come by the short way; raises what `reduce` does."""
        arrival = self._post.collect(due, self._timeout_s, unread)
        if due.headers:
            raise self._failure(arrival, due)

    def _failure(self, arrival: Arrival | None, due: Due) -> ManyhandsError:
        """Say why not all came that is due: something else came instead, or nothing for too long."""
        if arrival is not None:
            return self._difference(arrival, due)
        return DeadlineExceeded(
            f"{', '.join(due.headers)} sent nothing for op {due.op} of step {due.step} within {self._timeout_s:g} s",
            node=next(iter(due.headers)),
            phase="reduce",
        )

    def _difference(self, arrival: Arrival, due: Due) -> ProtocolViolation:
        """Say in what a frame differs from the one that was due from its sender."""
        sender, num_bytes = arrival.sender, len(arrival.payload)
        try:
            message = flat.unpack(arrival.message)
        except ProtocolViolation as error:
            error.node = sender
            return error
        kind = Partial if self._is_hub else Sum
        if not isinstance(message, kind) or (kind is Sum and sender != self._hub):
            what = f"sent a {type(message).__name__}, due was a {kind.__name__}{'' if self._is_hub else ' of the hub'}"
        elif isinstance(message, Partial) and message.rank != self._ranks.get(sender):
            what = f"claims rank {message.rank}"
        elif (message.step, message.op) != (due.step, due.op):
            what = f"sent op {message.op} of step {message.step}, due was op {due.op} of step {due.step}"
        elif message.format is not self._plan.wire:
            what = f"sent {message.format}, the plan's wire is {self._plan.wire}"
        elif num_bytes != due.num_bytes:
            what = f"sent {num_bytes} bytes, due were {due.num_bytes}"
        else:
            what = f"has no part in op {message.op}, or sent it twice"
        return ProtocolViolation(f"{sender} {what}", node=sender, phase="reduce")
