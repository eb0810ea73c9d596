"""How a data message lies on a link between workers: small ones in one frame, large ones in two.

Knows nothing of sockets. One frame instead of two saves a second encryption and a second pass through the I/O threads,
a fifth of the time of an allreduce of 4 KiB; copying a small payload costs less than lending it to the socket.

    flat       a `Partial` or `Sum` in its flat form (`protocol.flat`), then the payload, here or in a second frame
    joined     0xC1 (no msgpack value begins so), header length as 3 bytes little-endian, header, payload
    as it is   the frames of `protocol.frames`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from protocol import flat
from protocol.errors import FrameMalformed, FrameTooLarge, ProtocolViolation
from protocol.frames import Buffer, Received, decode, encode
from protocol.ids import WorkerId

MARK: Final = 0xC1
PREFIX_BYTES: Final = 4
JOIN_MOST_BYTES: Final = 32 * 1024


class Arrival(NamedTuple):
    """A message of the current epoch, proven to be from `sender` (empty: the coordinator).

    A `Partial` or `Sum` is the header of its flat form, of which only the epoch was looked at.
    """

    sender: WorkerId
    message: Any
    payload: memoryview


def pack_data(message: object, payload: Buffer | None = None) -> list[Buffer]:
    """Return the frames of a message for a link; a payload above 32 KiB is not copied, keep it until it is sent.

    The message may be the header of its flat form.
    """
    if message.__class__ in flat.FORMS:
        message = flat.FORMS[message.__class__].pack(message)
    if isinstance(message, bytes):
        body = payload or b""
        return [b"".join((message, body))] if len(body) <= JOIN_MOST_BYTES else _pack_large(message, body)
    frames = encode(message, payload)
    if len(frames) == 1 or memoryview(frames[1]).nbytes > JOIN_MOST_BYTES:
        return frames
    header = frames[0]
    return [b"".join((bytes((MARK,)), len(header).to_bytes(3, "little"), header, frames[1]))]


def open_data(frames: Sequence[Buffer]) -> Received:
    """Return what `pack_data` was given, but a `Partial` or `Sum` as the header of its flat form, not decoded.

    Its mark, code and length are checked, its fields are not: compare it with the header that is due, or decode it with
    `flat.unpack`. The payload is a view. Raises FrameMalformed or FrameTooLarge.
    """
    view = memoryview(frames[0]) if frames else memoryview(b"")
    if not view:
        return decode(frames)
    if view[0] == flat.MARK:
        return _open_flat(view, frames)
    if len(frames) != 1 or view[0] != MARK:
        return decode(frames)
    end = PREFIX_BYTES + int.from_bytes(view[1:PREFIX_BYTES], "little")
    if len(view) < max(end, PREFIX_BYTES):
        raise FrameMalformed(f"joined frame of {len(view)} bytes ends inside its header")
    return decode((view[PREFIX_BYTES:end], view[end:]))


def open_from(sender: WorkerId | None, frames: Sequence[Buffer]) -> Received | None:
    """Return what `open_data` does; what a neighbour garbles is an error that names it, a stranger's is None."""
    try:
        return open_data(frames)
    except ProtocolViolation as error:
        if sender is None:
            return None
        error.node = sender
        raise


def unpack_data(frames: Sequence[Buffer]) -> Received:
    """Decode what `pack_data` made, whatever it is; raises FrameMalformed or FrameTooLarge."""
    received = open_data(frames)
    if isinstance(received.message, bytes):
        return Received(flat.unpack(received.message), received.payload)
    return received


def _pack_large(header: bytes, payload: Buffer) -> list[Buffer]:
    row = flat.FORM_OF_CODE[header[1]].row
    if len(payload) > row.payload_bytes:
        raise FrameTooLarge(f"{row.message.__name__}: payload of {len(payload)} bytes exceeds {row.payload_bytes}")
    return [header, payload]


def _open_flat(view: memoryview, frames: Sequence[Buffer]) -> Received:
    form = flat.FORM_OF_CODE.get(view[1]) if len(view) > 1 else None
    if form is None:
        raise FrameMalformed(f"flat frame of {len(view)} bytes with an unknown message code")
    start = form.num_bytes
    if len(view) < start:
        raise FrameMalformed(f"{form.row.message.__name__}: flat frame of {len(view)} bytes ends inside its header")
    payload = view[start:]
    if len(frames) > 1:
        if len(frames) > 2 or payload:
            raise FrameMalformed(f"{form.row.message.__name__}: {len(frames)} frames beside {len(payload)} bytes")
        payload = memoryview(frames[1])
    if len(payload) > form.row.payload_bytes:
        raise FrameTooLarge(f"{form.row.message.__name__}: payload of {len(payload)} bytes")
    return Received(bytes(view[:start]), payload)
