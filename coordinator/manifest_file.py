"""Keeps a manifest on disk, so that a model is hashed once and not at every start.

Knows nothing of checkpoints: it is given a key and gives back entries, or nothing when the file is absent or damaged.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgpack

from protocol.durable_file import write_whole
from protocol.errors import FrameMalformed, StorageFailed, StorageFull
from protocol.schema import pack, unpack
from protocol.tiles import TileEntry

_LOG = logging.getLogger(__name__)
MAGIC = b"manyhands-manifest-1\n"
MAX_FILE_BYTES = 256 << 20


def load_entries(path: Path) -> list[TileEntry] | None:
    """Return the entries, or None when there is no file; a damaged one is logged and counts as none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("can't read the tile manifest %s (%s); hashing the model again", path, error)
        return None
    try:
        return _decode(data)
    except (FrameMalformed, ValueError, TypeError) as error:
        _LOG.warning("the tile manifest %s is damaged (%s); hashing the model again", path, error)
        return None


def _decode(data: bytes) -> list[TileEntry]:
    """Raise ValueError or FrameMalformed unless `data` is what `store_entries` wrote."""
    if len(data) > MAX_FILE_BYTES or not data.startswith(MAGIC):
        raise ValueError("not a manifest of this version")
    digest, payload = data[len(MAGIC) : len(MAGIC) + 32], data[len(MAGIC) + 32 :]
    if hashlib.sha256(payload).digest() != digest:
        raise ValueError("its checksum is wrong")
    return [unpack(TileEntry, value) for value in list(msgpack.unpackb(payload))]


def store_entries(path: Path, entries: list[TileEntry]) -> None:
    """Write atomically; a file that can't be written is logged: it only costs hashing again at the next start."""
    payload = msgpack.packb([pack(entry) for entry in entries])
    data = MAGIC + hashlib.sha256(payload).digest() + payload
    try:
        write_whole(path, data, is_synced=True)
    except (StorageFull, StorageFailed) as error:
        _LOG.warning("%s; the next start hashes the model again for want of a tile manifest", error.message)
