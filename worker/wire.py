"""How a data message lies on a link between workers: small ones in one frame, large ones in two.

Knows nothing of sockets. One frame instead of two saves a second encryption and a second pass through the I/O threads,
a fifth of the time of an allreduce of 4 KiB; copying a small payload costs less than lending it to the socket.

    flat       a `Partial` or `Sum` in its flat form (`protocol.flat`), then the payload
    joined     0xC1 (no msgpack value begins so), header length as 3 bytes little-endian, header, payload
    as it is   the frames of `protocol.frames`
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from protocol import flat
from protocol.errors import FrameMalformed, FrameTooLarge
from protocol.frames import Buffer, Received, decode, encode
from protocol.ids import WorkerId

MARK: Final = 0xC1
PREFIX_BYTES: Final = 4
JOIN_MOST_BYTES: Final = 32 * 1024


class Arrival(NamedTuple):
    """A message of the current epoch, proven to be from `sender` (empty: the coordinator)."""

    sender: WorkerId
    message: Any
    payload: memoryview


def pack_data(message: object, payload: Buffer | None = None) -> list[Buffer]:
    """Return the frames of a message for a link; a payload above 32 KiB is not copied, keep it until it is sent."""
    form = flat.FORMS.get(message.__class__)
    if form is not None and payload is not None and memoryview(payload).nbytes <= JOIN_MOST_BYTES:
        return [b"".join((form.pack(message), payload))]
    frames = encode(message, payload)
    if len(frames) == 1 or memoryview(frames[1]).nbytes > JOIN_MOST_BYTES:
        return frames
    header = frames[0]
    return [b"".join((bytes((MARK,)), len(header).to_bytes(3, "little"), header, frames[1]))]


def unpack_data(frames: Sequence[Buffer]) -> Received:
    """Decode what `pack_data` made; the payload is a view. Raises FrameMalformed or FrameTooLarge."""
    if len(frames) != 1 or not len(frames[0]):
        return decode(frames)
    view = memoryview(frames[0])
    if view[0] == flat.MARK:
        return _unpack_flat(view)
    if view[0] != MARK:
        return decode(frames)
    end = PREFIX_BYTES + int.from_bytes(view[1:PREFIX_BYTES], "little")
    if len(view) < max(end, PREFIX_BYTES):
        raise FrameMalformed(f"joined frame of {len(view)} bytes ends inside its header")
    return decode((view[PREFIX_BYTES:end], view[end:]))


def _unpack_flat(view: memoryview) -> Received:
    form = flat.FORM_OF_CODE.get(view[1]) if len(view) > 1 else None
    if form is None:
        raise FrameMalformed(f"flat frame of {len(view)} bytes with an unknown message code")
    start = form.num_bytes
    if len(view) < start:
        raise FrameMalformed(f"{form.row.message.__name__}: flat frame of {len(view)} bytes ends inside its header")
    if len(view) - start > form.row.payload_bytes:
        raise FrameTooLarge(f"{form.row.message.__name__}: payload of {len(view) - start} bytes")
    return Received(form.unpack(view), view[start:])
