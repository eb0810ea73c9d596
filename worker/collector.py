"""Collects the parts of one sum until every member that has one has sent it.

Knows nothing of sockets, tensors or time: it is told who sent what and says what is still missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from protocol.errors import ProtocolViolation

T = TypeVar("T")


class Operation(NamedTuple):
    """One sum under way; they are ordered as a stage computes them within a step."""

    step: int
    op: int


class Collector(Generic[T]):
    """The parts of one operation, by rank; `ranks` are the members that must send one."""

    def __init__(self, operation: Operation, ranks: Iterable[int]) -> None:
        self.operation = operation
        self._awaited = frozenset(ranks)
        self._parts: dict[int, T] = {}

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranks that have not sent their part, in order."""
        return tuple(sorted(self._awaited - self._parts.keys()))

    @property
    def is_complete(self) -> bool:
        """Whether every part is there."""
        return len(self._parts) == len(self._awaited)

    def add(self, operation: Operation, rank: int, part: T) -> None:
        """Take a part; raises ProtocolViolation for another operation, a rank that owes none, or a second part."""
        if operation != self.operation:
            raise ProtocolViolation(
                f"rank {rank} sent a part of op {operation.op} in step {operation.step} while op {self.operation.op} "
                f"of step {self.operation.step} is summed",
                phase="reduce",
            )
        if rank not in self._awaited:
            raise ProtocolViolation(f"rank {rank} has no part of op {operation.op} and sent one", phase="reduce")
        if rank in self._parts:
            raise ProtocolViolation(f"rank {rank} sent its part of op {operation.op} twice", phase="reduce")
        self._parts[rank] = part

    def in_rank_order(self, own_rank: int, own: T | None) -> list[T]:
        """Return all parts, one's own included, in the order of ranks, whatever order they came in."""
        parts = dict(self._parts)
        if own is not None:
            parts[own_rank] = own
        return [parts[rank] for rank in sorted(parts)]
