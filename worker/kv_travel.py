"""How keys and values lie in a `KvRows` message, and how they are cut to messages of a bounded size.

Knows nothing of sockets or of when they travel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from protocol.errors import FrameMalformed
from protocol.ids import WorkerId
from protocol.messages import Cells, KvRows
from protocol.specs import ModelSpec, Span
from worker.spool import Cell

MOST_BYTES: Final = 1 << 20


class CellRows(NamedTuple):
    """Keys and values of one cell, for the positions of the message they came in."""

    cell: Cell
    keys: memoryview
    values: memoryview


def row_bytes(spec: ModelSpec) -> int:
    """Return the bytes of one position's key, or value, in one cell."""
    return spec.head_dim * spec.activations.num_bytes


def pieces(spec: ModelSpec, cells: Cells, start: int, end: int) -> Iterator[Span]:
    """Cut positions `[start, end)` so that a message of each part takes at most 1 MiB, or is one position."""
    each = 2 * len(cells.layers) * len(cells.groups) * row_bytes(spec)
    most = max(1, MOST_BYTES // max(each, 1))
    for first in range(start, end, most):
        yield Span(first, min(first + most, end))


def split_rows(spec: ModelSpec, sender: WorkerId, message: KvRows, payload: memoryview) -> Iterator[CellRows]:
    """Yield what a message holds, cell by cell; raises FrameMalformed naming the sender when it does not fit."""
    layers, groups = message.cells.layers, message.cells.groups
    each = message.count * row_bytes(spec)
    if layers.end > spec.layers or groups.end > spec.kv_heads or message.start + message.count > spec.max_positions:
        raise FrameMalformed(f"{sender} sent rows of layers {layers}, groups {groups}: there are none", node=sender)
    if payload.nbytes != 2 * len(layers) * len(groups) * each:
        raise FrameMalformed(
            f"{sender} sent {payload.nbytes} bytes for {message.count} rows of {len(layers)} x {len(groups)} cells",
            node=sender,
        )
    at = 0
    for layer in layers:
        middle = at + len(groups) * each
        for number, group in enumerate(groups):
            keys, values = at + number * each, middle + number * each
            yield CellRows(Cell(layer, group), payload[keys : keys + each], payload[values : values + each])
        at = middle + len(groups) * each
