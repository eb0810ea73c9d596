"""How a message enters the table: its code, who may send it to whom, the reply it gets, the bound of its payload.

Knows nothing of any message (`protocol.messages` has them all) nor of encoding (`protocol.frames`).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple, TypeVar

VERSION = 2
OLDEST_VERSION = 2  # in 1 the hub of two members handed out a Sum, where both now add (decision 0012)

KIB, MIB = 2**10, 2**20
MAX_HEADER_BYTES = 64 * KIB
MAX_MANIFEST_BYTES = 16 * MIB
MAX_PROMPT_BYTES = 8 * MIB
MAX_TILE_CHUNK_BYTES = 1 * MIB
MAX_TENSOR_BYTES = 256 * MIB
MAX_STATUS_BYTES = 4 * MIB


class Role(StrEnum):
    """Who speaks. A key is admitted in exactly one role; `HEAD` is the worker the coordinator trusts with tokens."""

    COORDINATOR = "coordinator"
    INVITED = "invited"
    WORKER = "worker"
    HEAD = "head"
    CLIENT = "client"


class Row(NamedTuple):
    """A line of the table."""

    code: int
    message: type
    senders: frozenset[Role]
    receivers: frozenset[Role]
    reply: str
    payload_bytes: int


TABLE: dict[int, Row] = {}
ROW_OF: dict[type, Row] = {}
M = TypeVar("M", bound=type)


def message(
    code: int, sender: Role | set[Role], receiver: Role | set[Role], *, reply: str = "", payload_bytes: int = 0
) -> Callable[[M], M]:
    """Enter a dataclass into the table; a code that is taken is a bug and raises at import."""

    def enter(kind: M) -> M:
        if code in TABLE:
            raise RuntimeError(f"message code {code} is taken by {TABLE[code].message.__name__}")
        senders = frozenset(sender if isinstance(sender, set) else {sender})
        receivers = frozenset(receiver if isinstance(receiver, set) else {receiver})
        row = Row(code, kind, senders, receivers, reply, payload_bytes)
        TABLE[code] = ROW_OF[kind] = row
        return kind

    return enter


C, G, W, H, U = Role.COORDINATOR, Role.INVITED, Role.WORKER, Role.HEAD, Role.CLIENT  # G: invited guest
