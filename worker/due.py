"""What one sum still waits for: the frames that are due, byte by byte in their headers, and the parts that have come.

Knows nothing of sockets or tensors. Whoever waits knows the header of every frame that is to come, because a message
has one flat form only: one comparison proves epoch, step, operation, rank and format at once.
"""

from __future__ import annotations

from protocol.ids import WorkerId
from worker.wire import Arrival


class Due:
    """The frames of one operation; complete when `headers` is empty."""

    __slots__ = ("headers", "num_bytes", "op", "parts", "sources", "step")

    def __init__(self, step: int, op: int, headers: dict[WorkerId, bytes], num_bytes: int) -> None:
        """`headers`: by sender, taken out as the frames come; `num_bytes`: of every payload."""
        self.step = step
        self.op = op
        self.headers = headers
        self.num_bytes = num_bytes
        self.sources = tuple(headers)
        self.parts: dict[WorkerId, memoryview] = {}

    def take(self, arrival: Arrival) -> bool:
        """Take a frame when it is due; a second one of the same sender is not."""
        sender, header, payload = arrival
        if header != self.headers.get(sender) or len(payload) != self.num_bytes:
            return False
        del self.headers[sender]
        self.parts[sender] = payload
        return True
