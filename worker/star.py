"""The star: adds the members' parts of every operation at the hub and hands the same bytes to all.

Knows nothing of sockets (it is given `Post`) or of layers. Parts are added in the order of ranks, in fp32, rounded to
the wire's format first, so every member computes on with the same bits whoever is hub.

Small sums go a short way (`worker.lanes`); the long way goes on where that ends, and with large sums. A frame is
compared with the one that is due (`worker.due`), and decoded only to say in what it differs.

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
from runtime.reduce import Room, add_parts, sum_partials
from runtime.tensors import as_bytes, as_tensor, dtype_of
from worker.doors import Doors, Unread
from worker.due import OWING, Due
from worker.lanes import HubLane, Lane, MemberLane, PairLane, Unfinished
from worker.seat import PARTIAL, SUM, Seat
from worker.wire import JOIN_MOST_BYTES, Arrival

STEP_TIMEOUT_S: Final = 30.0
MAX_ROOMS: Final = 8  # of sizes that came last: sessions come and go one by one


class Post(Protocol):
    """What the star needs of the outside."""

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer) -> None:
        """Send the same message (or the header of its flat form) to members; raises PeerLost."""
        ...

    def doors(self) -> Doors | None:
        """Return the sockets that lead to members; None while something else must be heard first."""
        ...

    def collect(self, due: Due, timeout_s: float, unread: Unread | None = None) -> Arrival | None:
        """Wait until all that is due has come, or nothing of it comes for `timeout_s`; raises what ends the step.

        Returns at once with a `Partial` or `Sum` that is not due. `unread`: what a lane left unread.
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
        self._seat = Seat(plan, own)
        self._plan = plan
        self._post = post
        self._timeout_s = timeout_s
        self._device = device
        self._activations, self._wire = dtype_of(plan.model.activations), dtype_of(plan.wire)
        self._hidden = plan.model.hidden
        self._row_bytes = self._hidden * self._wire.itemsize
        self._is_plain = device.type == "cpu" and self._wire is self._activations
        self._rooms: dict[int, Room] = {}  # by rows
        self._lanes: dict[int, Lane | None] = {}  # by rows, through `_doors`
        self._doors: Doors | None = None
        self._clock = clock
        self.num_ops = 0
        self.seconds = 0.0  # spent on sums, waiting for other members included

    def part(self, num_rows: int) -> Tensor | None:
        """Return where the own part may be written before it is given to `reduce`; None where that saves nothing."""
        room = self._room(num_rows) if self._is_plain and self._seat.targets else None
        return room.part_TD if room is not None else None

    def reduce(self, step: int, num_rows: int, op: int, own_TD: Tensor | None) -> Tensor:
        """Return the sum of `op` over all members, `[T, D]`; every member calls this for every operation.

        It is valid until the next call: small sums lie in the same memory one after the other. Raises ProtocolViolation
        for a frame that does not fit, DeadlineExceeded naming whom it waited for in vain, StepFailed for an own part of
        another shape, or one that the plan does not have.
        """
        if not self._seat.targets:
            self.num_ops += 1
            return sum_partials([own_TD], self._plan.wire).to(self._activations)
        began = self._clock()
        room = self._rooms.get(num_rows)
        if room is None or own_TD is not room.part_TD or not self._seat.has_part[op & 1]:
            room = self._move_in(num_rows, op, own_TD)
        if room is None:
            total_TD = self._finish(self._whole(step, num_rows, op), num_rows, own_TD, None)
        else:
            doors, lane = self._post.doors(), None
            if doors is not None:
                if doors is not self._doors:
                    self._lanes.clear()
                    self._doors = doors
                lane = self._lanes[num_rows] if num_rows in self._lanes else self._open_lane(num_rows, room, doors)
            left = lane.sum(step, op) if lane is not None else self._whole(step, num_rows, op)
            total_TD = room.total_TD if left is None else self._finish(left, num_rows, own_TD, room)
        if not self._is_plain:
            total_TD = total_TD.to(self._device, self._activations)
        self.num_ops += 1
        self.seconds += self._clock() - began
        return total_TD

    def _room(self, num_rows: int) -> Room | None:
        """Return where small sums lie; None for large ones, whose memory is not kept."""
        if num_rows not in self._rooms and num_rows * self._row_bytes <= JOIN_MOST_BYTES:
            if len(self._rooms) >= MAX_ROOMS:
                oldest = next(iter(self._rooms))
                del self._rooms[oldest]
                self._lanes.pop(oldest, None)
            self._rooms[num_rows] = Room(num_rows, self._hidden, self._plan.wire, PARTIAL.num_bytes, SUM.num_bytes)
        return self._rooms.get(num_rows)

    def _move_in(self, num_rows: int, op: int, own_TD: Tensor | None) -> Room | None:
        """Check the own part and put it where small ones lie; returns that room."""
        if (own_TD is not None) is not self._seat.has_part[op & 1]:
            raise StepFailed(
                f"{self._seat.own} has {'no' if own_TD is None else 'a'} part in op {op}, unlike in the plan"
            )
        if own_TD is not None and own_TD.shape != (num_rows, self._hidden):
            raise StepFailed(f"the own part of a sum of {num_rows} rows has shape {list(own_TD.shape)}")
        room = self._room(num_rows)
        if room is not None and own_TD is not None:
            room.part_TD.copy_(own_TD)
        return room

    def _open_lane(self, num_rows: int, room: Room, doors: Doors) -> Lane | None:
        """Return the short way for sums of so many rows, if there is one through the doors of this moment."""
        seat = self._seat
        ways = doors.between(seat.sources, seat.targets)
        lane: Lane | None = None
        if ways is not None:
            kind = PairLane if seat.is_pair else HubLane if seat.hands_out else MemberLane
            lane = kind(ways, seat, room)
        self._lanes[num_rows] = lane
        return lane

    def _whole(self, step: int, num_rows: int, op: int) -> Unfinished:
        """Return all that is to be done for a sum."""
        return Unfinished(self._seat.due(step, op, num_rows * self._row_bytes), None, self._seat.targets)

    def _finish(self, left: Unfinished, num_rows: int, own_TD: Tensor | None, room: Room | None) -> Tensor:
        """Do the long way what is left of a sum."""
        (due, unread, targets), seat = left, self._seat
        own = OWING
        if own_TD is not None:
            own = room.part if room is not None else as_bytes(own_TD.to(self._wire))
        if own_TD is not None and seat.adds:
            due.parts[seat.own] = own
        if own_TD is not None and not seat.hands_out and targets:
            self._post.send(targets, seat.partial_header(due.step, due.op, seat.ranks[seat.own], seat.form), own)
        self._wait(due, unread)
        if not seat.adds:
            payload = due.parts[seat.hub]
        else:
            payload = add_parts(list(due.parts.values()), self._plan.wire, (num_rows, self._hidden))
        if seat.hands_out:
            self._post.send(targets, seat.sum_header(due.step, due.op, seat.form), payload)
        if room is None:
            return as_tensor(payload, self._wire, (num_rows, self._hidden))
        room.total[:] = payload
        return room.total_TD

    def _wait(self, due: Due, unread: Unread | None) -> None:
        """Wait for what has not come; raises what `reduce` does."""
        if not due.owing:
            return
        arrival = self._post.collect(due, self._timeout_s, unread)
        if due.owing:
            raise self._failure(arrival, due)

    def _failure(self, arrival: Arrival | None, due: Due) -> ManyhandsError:
        """Say why not all came that is due: something else came instead, or nothing for too long."""
        if arrival is not None:
            return self._difference(arrival, due)
        return DeadlineExceeded(
            f"{', '.join(due.owing)} sent nothing for op {due.op} of step {due.step} within {self._timeout_s:g} s",
            node=due.owing[0],
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
        adds = self._seat.adds
        kind = Partial if adds else Sum
        if not isinstance(message, kind) or (kind is Sum and sender != self._seat.hub):
            what = f"sent a {type(message).__name__}, due was a {kind.__name__}{'' if adds else ' of the hub'}"
        elif isinstance(message, Partial) and message.rank != self._seat.ranks.get(sender):
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
