"""The tile cache: whole tiles or none, whatever happens in between."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_cluster import entry_of, put

import worker.store as store_module
from protocol.errors import StorageFull, TileUnavailable
from protocol.tiles import TileEntry, TileId, TileKind
from worker.store import TileStore

DATA = bytes(range(256)) * 40


def tile(index: int, data: bytes = DATA) -> TileEntry:
    return entry_of(TileId(0, TileKind.FFN, index), data)


def numbered(index: int) -> bytes:
    return DATA + index.to_bytes(4, "little")


def test_a_tile_is_read_back_and_counts_once_however_often_it_is_listed(tmp_path: Path) -> None:
    store = TileStore(tmp_path, 10**6)
    assert len(store.missing([tile(0), tile(1)])) == 1  # equal content, one file
    put(store, tile(0), DATA)
    assert store.missing([tile(0), tile(1)]) == ()
    assert store.read(tile(1)) == DATA


def test_a_part_goes_on_where_a_killed_process_left_it(tmp_path: Path) -> None:
    here = Path(__file__).parent
    script = (
        f"import os, sys; sys.path[:0] = [{str(here.parent.parent)!r}, {str(here)!r}]\n"
        "from pathlib import Path; from test_store import *\n"
        f"part = TileStore(Path({str(tmp_path)!r}), 10**6).open_part(tile(0)); part.append(DATA[:1000])\n"
        "os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == -9
    store = TileStore(tmp_path, 10**6)
    assert not store.has(tile(0))
    part = store.open_part(tile(0))
    assert part.length == 1000
    part.append(DATA[1000:])
    assert part.finish()
    assert store.read(tile(0)) == DATA


def test_wrong_bytes_are_never_published(tmp_path: Path) -> None:
    store = TileStore(tmp_path, 10**6)
    part = store.open_part(tile(0))
    part.append(b"x" * len(DATA))
    assert not part.finish()
    assert not store.has(tile(0))
    part.append(DATA)
    assert part.finish()
    assert store.read(tile(0)) == DATA


def test_a_tile_altered_on_disk_is_deleted_and_missing_again(tmp_path: Path) -> None:
    store = TileStore(tmp_path, 10**6)
    put(store, tile(0), DATA)
    path = next((tmp_path / "tiles").glob("??/*"))
    path.write_bytes(b"y" + DATA[1:])
    with pytest.raises(TileUnavailable, match="altered"):
        store.read(tile(0))
    assert store.missing([tile(0)]) == (tile(0),)
    with pytest.raises(TileUnavailable, match="not in the cache"):
        store.read(tile(0))


@pytest.mark.parametrize("how", ["read", "verify", "read_range"])
def test_a_tile_that_cannot_be_read_is_deleted_and_missing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, "broken disk")

    store = TileStore(tmp_path, 10**6)
    put(store, tile(0), DATA)
    monkeypatch.setattr(Path, "read_bytes", broken)
    monkeypatch.setattr(store_module, "read_at", broken)
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(TileUnavailable, match="broken disk"):
        store.read_range(tile(0), 0, 9) if how == "read_range" else getattr(store, how)(tile(0))
    assert store.missing([tile(0)]) == (tile(0),)


def test_a_full_disk_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = TileStore(tmp_path, 10**6)
    put(store, tile(1, numbered(1)), numbered(1))
    part = store.open_part(tile(0))
    part.append(DATA[:500])
    room = [300]

    def write_some(descriptor: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = min(room[0], len(data))
        room[0] -= taken
        return os.write(descriptor, data[:taken])

    monkeypatch.setattr(store_module, "write_some", write_some)
    with pytest.raises(StorageFull, match="no room"):
        part.append(DATA[500:])
    monkeypatch.undo()
    assert part.length == 500
    part.append(DATA[500:])
    assert part.finish()
    assert store.read(tile(1, numbered(1))) == numbered(1)


def test_the_least_recently_used_goes_first_and_pinned_tiles_stay(tmp_path: Path) -> None:
    store = TileStore(tmp_path, 4 * len(numbered(0)))
    entries = [tile(index, numbered(index)) for index in range(6)]
    for index in range(4):
        put(store, entries[index], numbered(index))
        path = next((tmp_path / "tiles").glob(f"??/{entries[index].digest.hex()}"))
        os.utime(path, ns=(index, index))
    store.pin([entries[0], entries[4]])
    store.make_room([entries[4]])
    assert [store.has(entry) for entry in entries[:4]] == [True, False, True, True]
    with pytest.raises(StorageFull, match="limited"):
        TileStore(tmp_path, len(DATA)).make_room(entries[4:6])
    assert store.has(entries[0])
    store.close()


def test_tiles_that_another_process_needs_are_not_evicted(tmp_path: Path) -> None:
    store, other = (TileStore(tmp_path, 2 * len(numbered(0))) for _ in range(2))
    first, second, third = (tile(index, numbered(index)) for index in range(3))
    put(store, first, numbered(0))
    put(store, second, numbered(1))
    store.pin([first])
    other.make_room([third])
    assert (store.has(first), store.has(second)) == (True, False)
    with pytest.raises(StorageFull):
        other.make_room([second, third])
    store.close()  # its pins end with it
    other.make_room([second, third])
    assert not store.has(first)


def test_two_who_fetch_the_same_tile_do_not_disturb_each_other(tmp_path: Path) -> None:
    store, other = TileStore(tmp_path, 10**6), TileStore(tmp_path, 10**6)
    one, two = store.open_part(tile(0)), other.open_part(tile(0))
    one.append(DATA[:100])
    two.append(DATA)
    assert two.length == len(DATA)
    assert two.finish()
    assert store.has(tile(0))
    one.append(DATA[100:])
    assert one.finish()
    assert store.read(tile(0)) == DATA
