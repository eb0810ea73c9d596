"""What one sum still waits for: the frames that are due, byte by byte in their headers, and the parts that have come.

Knows nothing of sockets or tensors. Whoever waits knows the header of the frames that are to come, because a message
has one flat form only: one comparison proves epoch, step, operation, rank and format at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from protocol.ids import WorkerId
from worker.wire import Arrival

OWING: Final = memoryview(b"")
"""In place of a part that has yet to come."""


@dataclass(slots=True)
class Due:
    """The frames of one operation: by sender, their headers and the payloads that have come, of `num_bytes` each.

    Nobody else may send one.
    """

    step: int
    op: int
    num_bytes: int
    headers: Mapping[WorkerId, bytes]
    parts: dict[WorkerId, memoryview]

    @property
    def owing(self) -> list[WorkerId]:
        """Who has yet to send; the operation is complete when nobody has."""
        return [sender for sender, part in self.parts.items() if part is OWING]

    def take(self, arrival: Arrival) -> bool:
        """Take a frame when it is due; a second one of the same sender is not."""
        sender, header, payload = arrival
        if self.parts.get(sender) is not OWING or header != self.headers[sender] or len(payload) != self.num_bytes:
            return False
        self.parts[sender] = payload
        return True
