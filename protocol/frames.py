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

from protocol.errors import FrameMalformed, FrameTooLarge, InvariantBroken, VersionMismatch
from protocol.messages import MAX_HEADER_BYTES, MAX_MANIFEST_BYTES, OLDEST_VERSION, ROW_OF, TABLE, VERSION
from protocol.schema import pack, unpack
from protocol.tiles import TileEntry

Buffer = bytes | bytearray | memoryview
MAX_PLAIN_ITEMS = 4096
MAX_MANIFEST_LINES = 1_000_000
_NOTHING = memoryview(b"")
_BOUNDS: dict[str, Any] = {
    "strict_map_key": True,
    "max_array_len": MAX_PLAIN_ITEMS,
    "max_map_len": 0,
    "max_ext_len": 0,
    "max_str_len": MAX_HEADER_BYTES,
    "max_bin_len": MAX_HEADER_BYTES,
}
_LINE_BOUNDS = {"max_array_len": 16, "max_str_len": 64, "max_bin_len": 64}


class Received(NamedTuple):
    """A decoded message and its payload (empty when it has none)."""

    message: Any
    payload: memoryview


def encode(message: object, payload: Buffer | None = None) -> list[Buffer]:
    """Return the frames of a message; the payload is not copied, so keep it unchanged until it is sent.

    Raises FrameTooLarge, or FrameMalformed for a payload where none belongs: bounds hold for our own frames too.
    """
    row = ROW_OF.get(type(message))
    if row is None:
        raise InvariantBroken(f"{type(message).__name__} is no message")
    header = msgpack.packb((row.code, *pack(message)))
    if len(header) > MAX_HEADER_BYTES:
        raise FrameTooLarge(f"{row.message.__name__}: header of {len(header)} bytes exceeds {MAX_HEADER_BYTES}")
    if not row.payload_bytes:
        if payload is not None:
            raise FrameMalformed(f"{row.message.__name__} carries no payload")
        return [header]
    body = payload if payload is not None else b""
    _payload(row.message.__name__, body, row.payload_bytes)
    return [header, body]


def decode(frames: Sequence[Buffer]) -> Received:
    """Decode frames from a peer; raises FrameMalformed or FrameTooLarge naming what is wrong."""
    if not frames:
        raise FrameMalformed("message without frames")
    fields = _header(frames[0])
    code = fields[0]
    row = TABLE.get(code) if type(code) is int else None
    if row is None:  # never shown when it is not a number: a deeply nested value would break repr
        raise FrameMalformed(f"unknown message code {code if type(code) is int else type(code).__name__}")
    name = row.message.__name__
    if len(frames) != (2 if row.payload_bytes else 1):
        raise FrameMalformed(f"{name}: {len(frames)} frames")
    payload = _payload(name, frames[1], row.payload_bytes) if row.payload_bytes else _NOTHING
    return Received(unpack(row.message, fields[1:]), payload)


def _payload(name: str, payload: Buffer, bound: int) -> memoryview:
    view = memoryview(payload)
    if view.nbytes > bound:
        raise FrameTooLarge(f"{name}: payload of {view.nbytes} bytes exceeds {bound}")
    return view


def _header(frame: Buffer) -> list[Any]:
    if len(frame) > MAX_HEADER_BYTES:
        raise FrameTooLarge(f"header of {len(frame)} bytes exceeds {MAX_HEADER_BYTES}")
    fields = _unpackb(frame)
    if type(fields) is not list or not fields:
        raise FrameMalformed("header is not a list that begins with a message code")
    return fields


def _unpackb(frame: Buffer) -> Any:
    try:
        return msgpack.unpackb(frame, **_BOUNDS)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:  # cut, too deep, trailing bytes, bad UTF-8
        raise FrameMalformed(f"frame can't be unpacked: {type(error).__name__}: {error!s:.200}") from error


def pack_manifest(entries: Iterable[TileEntry]) -> bytes:
    """Pack manifest lines for the payload of `Load`."""
    return bytes(msgpack.packb([pack(entry) for entry in entries]))


def unpack_manifest(payload: Buffer) -> tuple[TileEntry, ...]:
    """Unpack manifest lines; raises FrameMalformed or FrameTooLarge.

    Line by line, each checked before the next is unpacked: what a hostile manifest may take is one line more.
    """
    view = _payload("manifest", payload, MAX_MANIFEST_BYTES)
    unpacker = msgpack.Unpacker(max_buffer_size=MAX_MANIFEST_BYTES, **_BOUNDS | _LINE_BOUNDS)
    try:
        unpacker.feed(view)
        num_lines = unpacker.read_array_header()
        if num_lines > MAX_MANIFEST_LINES:
            raise FrameTooLarge(f"manifest of {num_lines} lines exceeds {MAX_MANIFEST_LINES}")
        lines = tuple(unpack(TileEntry, unpacker.unpack()) for _ in range(num_lines))
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise FrameMalformed(f"manifest can't be unpacked: {type(error).__name__}: {error!s:.200}") from error
    if unpacker.tell() != view.nbytes:
        raise FrameMalformed(f"manifest is followed by {view.nbytes - unpacker.tell()} bytes that don't belong to it")
    return lines


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
