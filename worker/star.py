"""The star: adds the members' parts of every operation at the hub and hands the same bytes to all.

Knows nothing of sockets (it is given `Post`) or of layers. Parts are added in the order of ranks, in fp32, rounded to
the wire's format first, so every member computes on with the same bits whoever is hub.

Shapes: T rows of a batch, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from protocol.errors import DeadlineExceeded, ProtocolViolation
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import Partial, Sum
from protocol.plans import Plan
from runtime.reduce import Part, add_parts, from_wire, sum_partials, to_wire
from runtime.tensors import dtype_of
from worker.collector import Collector, Operation

STEP_TIMEOUT_S: Final = 30.0


class StarFrame(NamedTuple):
    """A `Partial` or a `Sum`, and who proved to have sent it."""

    sender: WorkerId
    message: Any
    payload: memoryview


class Post(Protocol):
    """What the star needs of the outside."""

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer) -> None:
        """Send the same message to members; raises PeerLost."""
        ...

    def next_star_frame(self, timeout_s: float) -> StarFrame | None:
        """Return the next `Partial` or `Sum`, or None after `timeout_s`; raises what ends the step."""
        ...


class Star:
    """One member's end of its stage's star, under one plan."""

    def __init__(
        self, plan: Plan, own: WorkerId, post: Post, device: torch.device, timeout_s: float = STEP_TIMEOUT_S
    ) -> None:
        number = plan.stage_of(own)
        if number is None:
            raise ValueError(f"{own} is a member of no stage")
        stage = plan.stages[number]
        self._plan = plan
        self._members = tuple(share.worker for share in stage.members)
        self._others = tuple(worker for worker in self._members if worker != own)
        self._rank = stage.rank_of(own)
        self._hub = stage.hub
        self._post = post
        self._timeout_s = timeout_s
        self._device = device
        attention = frozenset(rank for rank, share in enumerate(stage.members) if len(share.groups))
        ffn = frozenset(rank for rank, share in enumerate(stage.members) if len(share.ffn))
        self._ranks_of_parity = (attention - {self._rank}, ffn - {self._rank})
        self._activations, self._wire = dtype_of(plan.model.activations), dtype_of(plan.wire)
        self._is_plain = device.type == "cpu" and self._wire is self._activations  # what comes in can be computed on
        self.num_ops = 0
        self.num_bytes = 0

    def reduce(self, step: int, num_rows: int, op: int, own_TD: Tensor | None) -> Tensor:
        """Return the sum of `op` over all members, `[T, D]`; every member calls this for every operation.

        Raises ProtocolViolation for a frame that does not fit, DeadlineExceeded naming whom it waited for in vain.
        """
        shape = (num_rows, self._plan.model.hidden)
        if len(self._members) == 1:
            total_TD = sum_partials([own_TD], self._plan.wire)
            self.num_ops += 1
            return total_TD.to(self._activations)
        if own_TD is not None and not (own_TD.is_cpu and own_TD.dtype is self._wire):
            own_TD = own_TD.to("cpu", self._wire)
        if self._rank == self._hub:
            total_TD = self._gather(Operation(step, op), shape, own_TD)
        else:
            total_TD = self._ask_hub(Operation(step, op), shape, own_TD)
        self.num_ops += 1
        return total_TD if self._is_plain else total_TD.to(self._device, self._activations)

    def _gather(self, operation: Operation, shape: tuple[int, int], own_TD: Tensor | None) -> Tensor:
        collector: Collector[Part] = Collector(operation, self._ranks_of_parity[operation.op % 2])
        while not collector.is_complete:
            frame = self._post.next_star_frame(self._timeout_s)
            if frame is None:
                raise self._silence(operation, tuple(self._members[rank] for rank in collector.missing))
            message = frame.message
            if not isinstance(message, Partial):
                raise self._violation(frame, "sent a sum to the hub")
            if not (0 <= message.rank < len(self._members)) or self._members[message.rank] != frame.sender:
                raise self._violation(frame, f"claims rank {message.rank}")
            self._check(frame, shape)
            collector.add(Operation(message.step, message.op), message.rank, frame.payload)
        payload = add_parts(collector.in_rank_order(self._rank, own_TD), self._plan.wire, shape)
        message = Sum(epoch=self._plan.epoch, step=operation.step, op=operation.op, format=self._plan.wire)
        self._post.send(self._others, message, payload)
        self.num_bytes += len(payload) * len(self._others)
        return from_wire(payload, self._plan.wire, shape)

    def _ask_hub(self, operation: Operation, shape: tuple[int, int], own_TD: Tensor | None) -> Tensor:
        hub, plan = self._members[self._hub], self._plan
        if own_TD is not None:
            message = Partial(epoch=plan.epoch, step=operation.step, op=operation.op, rank=self._rank, format=plan.wire)
            payload = to_wire(own_TD, plan.wire)
            self._post.send((hub,), message, payload)
            self.num_bytes += len(payload)
        frame = self._post.next_star_frame(self._timeout_s)
        if frame is None:
            raise self._silence(operation, (hub,))
        if not isinstance(frame.message, Sum) or frame.sender != hub:
            raise self._violation(frame, f"sent a {type(frame.message).__name__} where the hub's sum was due")
        if (frame.message.step, frame.message.op) != operation:
            raise self._violation(
                frame,
                f"sent the sum of op {frame.message.op} in step {frame.message.step}, due was op {operation.op} in "
                f"step {operation.step}",
            )
        self._check(frame, shape)
        return from_wire(frame.payload, plan.wire, shape)

    def _check(self, frame: StarFrame, shape: tuple[int, int]) -> None:
        """Take nothing that is not the plan's wire, or too short or long; says who sent it."""
        if frame.message.format is not self._plan.wire:
            raise self._violation(frame, f"sent {frame.message.format}, the plan's wire is {self._plan.wire}")
        num_bytes = shape[0] * shape[1] * self._wire.itemsize
        if frame.payload.nbytes != num_bytes:
            raise self._violation(frame, f"sent {frame.payload.nbytes} bytes, {num_bytes} are the {list(shape)} due")
        self.num_bytes += num_bytes

    def _silence(self, operation: Operation, awaited: tuple[WorkerId, ...]) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"{', '.join(awaited)} sent nothing for op {operation.op} of step {operation.step} within "
            f"{self._timeout_s:g} s",
            node=awaited[0],
            phase="reduce",
        )

    def _violation(self, frame: StarFrame, what: str) -> ProtocolViolation:
        return ProtocolViolation(f"{frame.sender} {what}", node=frame.sender, phase="reduce")
