"""Frames to messages and back: a bounded msgpack header, and beside it at most one raw payload frame.

Knows nothing of sockets. Every bound is checked before memory is taken; whatever is wrong raises a `ProtocolViolation`
that names the message and the field.

    frame 0   msgpack [code, field, field, ...]      at most 64 KiB
    frame 1   raw bytes, only for messages that carry a payload
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgpack

from protocol.errors import FrameMalformed, FrameTooLarge, VersionMismatch
from protocol.messages import MAX_HEADER_BYTES, MAX_MANIFEST_BYTES, OLDEST_VERSION, ROW_OF, TABLE, VERSION
from protocol.schema import pack, unpack
from protocol.tiles import TileEntry

Buffer = bytes | bytearray | memoryview
MAX_PLAIN_ITEMS = 4096
MAX_MANIFEST_ITEMS = 1_000_000


class Received(NamedTuple):
    """A decoded message and its payload (empty when it has none)."""

    message: Any
    payload: memoryview


def encode(message: object, payload: Buffer | None = None) -> list[Buffer]:
    """Return the frames of a message; the payload is not copied, so keep it unchanged until it is sent."""
    row = ROW_OF[type(message)]
    header = msgpack.packb([row.code, *pack(message)])
    if len(header) > MAX_HEADER_BYTES:
        raise FrameTooLarge(f"{row.message.__name__}: header of {len(header)} bytes exceeds {MAX_HEADER_BYTES}")
    if not row.payload_bytes:
        if payload is not None:
            raise FrameMalformed(f"{row.message.__name__} carries no payload")
        return [header]
    body = payload if payload is not None else b""
    _require_size(row.message.__name__, body, row.payload_bytes)
    return [header, body]


def decode(frames: Sequence[Buffer]) -> Received:
    """Decode frames from a peer; raises FrameMalformed or FrameTooLarge naming what is wrong."""
    if not frames:
        raise FrameMalformed("message without frames")
    fields = _header(frames[0])
    row = TABLE.get(fields[0]) if type(fields[0]) is int else None
    if row is None:
        raise FrameMalformed(f"unknown message code {fields[0]!r:.40}")
    name = row.message.__name__
    if len(frames) != (2 if row.payload_bytes else 1):
        raise FrameMalformed(f"{name}: {len(frames)} frames")
    if row.payload_bytes:
        _require_size(name, frames[1], row.payload_bytes)
        return Received(unpack(row.message, fields[1:]), memoryview(frames[1]))
    return Received(unpack(row.message, fields[1:]), memoryview(b""))


def _require_size(name: str, payload: Buffer, bound: int) -> None:
    size = memoryview(payload).nbytes
    if size > bound:
        raise FrameTooLarge(f"{name}: payload of {size} bytes exceeds {bound}")


def _header(frame: Buffer) -> list[Any]:
    if len(frame) > MAX_HEADER_BYTES:
        raise FrameTooLarge(f"header of {len(frame)} bytes exceeds {MAX_HEADER_BYTES}")
    fields = _unpackb(frame, MAX_PLAIN_ITEMS)
    if type(fields) is not list or not fields:
        raise FrameMalformed("header is not a list that begins with a message code")
    return fields


def _unpackb(frame: Buffer, max_items: int) -> Any:
    try:
        return msgpack.unpackb(
            frame,
            strict_map_key=True,
            max_array_len=max_items,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=MAX_HEADER_BYTES,
            max_bin_len=MAX_HEADER_BYTES,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:  # cut, too deep, trailing bytes, bad UTF-8
        raise FrameMalformed(f"frame can't be unpacked: {type(error).__name__}: {error!s:.200}") from error


def pack_manifest(entries: Iterable[TileEntry]) -> bytes:
    """Pack manifest lines for the payload of `Load`."""
    return bytes(msgpack.packb([pack(entry) for entry in entries]))


def unpack_manifest(payload: Buffer) -> tuple[TileEntry, ...]:
    """Unpack manifest lines; raises FrameMalformed or FrameTooLarge."""
    _require_size("manifest", payload, MAX_MANIFEST_BYTES)
    lines = _unpackb(payload, MAX_MANIFEST_ITEMS)
    if type(lines) is not list:
        raise FrameMalformed("manifest is not a list")
    return tuple(unpack(TileEntry, line) for line in lines)


def negotiate(oldest: int, newest: int, *, node: str, software: str, own_software: str) -> int:
    """Return the newest version both sides speak; raises VersionMismatch naming both ranges and releases."""
    version = min(newest, VERSION)
    if version < max(oldest, OLDEST_VERSION):
        raise VersionMismatch(
            f"{node} ({software}) speaks protocol {oldest} to {newest}, "
            f"this coordinator ({own_software}) speaks {OLDEST_VERSION} to {VERSION}",
            node=node,
            phase="handshake",
        )
    return version
