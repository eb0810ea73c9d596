"""What `worker.fetch_plan` asks for.

Knows nothing of why.
"""

from __future__ import annotations

from typing import NamedTuple

from protocol.ids import WorkerId
from protocol.messages import TileRequest
from protocol.tiles import TileEntry


class Open(NamedTuple):
    """Open the tile's part, then say `opened` with the bytes that are there already, or `found`."""

    entry: TileEntry


class Ask(NamedTuple):
    """Send this request to this source (empty: the coordinator)."""

    source: WorkerId
    request: TileRequest


class Append(NamedTuple):
    """Add these bytes at the end of the tile's part."""

    entry: TileEntry
    data: memoryview


class Finish(NamedTuple):
    """All bytes of the tile are there: verify it, then say `verified` or `spoiled`."""

    entry: TileEntry


class HangUp(NamedTuple):
    """Forget what was asked of this source, and close the connection if it is a peer's.

    It is dialled anew if it is asked again, which never happens if `is_final`.
    """

    source: WorkerId
    reason: str
    is_final: bool


Action = Open | Ask | Append | Finish | HangUp
