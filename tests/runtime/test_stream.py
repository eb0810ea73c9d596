"""The ring with a real loader thread and a real file: right bytes in the right order, and told failures."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import StorageFailed
from runtime import direct
from runtime.direct import PAGE, DirectFile, aligned_buffer
from runtime.page_cache import PageCache, cached_share, forget
from runtime.stream import Ring
from runtime.window import WindowPlan

SIZES = [100, PAGE, PAGE + 1, 3 * PAGE, 77]


@pytest.fixture
def paths(tmp_path: Path) -> dict[int, Path]:
    """A file for each block; none is a whole number of pages but one."""
    paths = {block: tmp_path / f"block-{block}" for block in range(len(SIZES))}
    for block, path in paths.items():
        path.write_bytes(bytes([block + 1]) * SIZES[block])
    return paths


@pytest.fixture
def plan() -> WindowPlan:
    return WindowPlan(pinned=frozenset({1}), streamed=(0, 2, 3, 4), slot_bytes=3 * PAGE, num_slots=2)


@pytest.fixture
def ring(paths: dict[int, Path], plan: WindowPlan) -> Iterator[Ring]:
    ring = Ring(plan, {block: DirectFile(path) for block, path in paths.items()})
    yield ring
    ring.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "window-loader"]


def holds(ring: Ring, block: int) -> bool:
    slot = ring.acquire(block)
    right = bytes(ring.slots[slot][: SIZES[block]]) == bytes([block + 1]) * SIZES[block]
    ring.release()
    return right


def test_steps_see_their_blocks_in_order(ring: Ring) -> None:
    for _ in range(20):
        assert all(holds(ring, block) for block in (0, 2, 3, 4))
    assert ring.counts().read_bytes >= 20 * sum(SIZES[block] for block in (0, 2, 3, 4))


def test_an_aborted_step_begins_again(ring: Ring) -> None:
    for cut in (1, 2, 3, 1, 4):
        assert all(holds(ring, block) for block in (0, 2, 3, 4)[:cut])


def test_the_ring_takes_its_memory_at_once(ring: Ring) -> None:
    assert ring.num_bytes == 2 * 3 * PAGE


def test_buffers_are_aligned_and_zero() -> None:
    view = aligned_buffer(PAGE + 5)
    assert len(view) == 2 * PAGE and not any(view)


class FailingFile(DirectFile):
    """Can't be read until it is mended."""

    is_broken = True

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if self.is_broken:
            raise StorageFailed(f"can't read {self.path} at {offset}: broken")
        super().read_into(buffer, offset)


def test_a_failed_read_is_told_and_tried_again(paths: dict[int, Path], plan: WindowPlan) -> None:
    broken = FailingFile(paths[3])
    ring = Ring(plan, {block: DirectFile(path) for block, path in paths.items()} | {3: broken})
    try:
        assert holds(ring, 0) and holds(ring, 2)
        with pytest.raises(StorageFailed, match=str(paths[3])):
            ring.acquire(3)
        broken.is_broken = False
        assert all(holds(ring, block) for block in (3, 4, 0))
    finally:
        ring.close()


def test_without_direct_reads(paths: dict[int, Path], plan: WindowPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_DIRECT", raising=False)
    ring = Ring(plan, {block: DirectFile(path) for block, path in paths.items()})
    assert all(holds(ring, block) for block in (0, 2, 3, 4, 0))
    ring.close()


@pytest.mark.parametrize("page_cache", PageCache)
def test_reading_leaves_the_page_cache_as_the_owner_wants_it(tmp_path: Path, page_cache: PageCache) -> None:
    path, size = tmp_path / "block", 5 * PAGE + 3
    wanted = bytes(number % 251 for number in range(size))
    path.write_bytes(wanted)
    buffer = aligned_buffer(size)
    with path.open("rb") as kept:
        os.fsync(kept.fileno())
        if cached_share(kept.fileno(), 0, size) < 1:
            pytest.skip("this kernel does not tell what is cached")
        for is_warm in (True, False):
            if not is_warm:
                forget(kept.fileno(), 0, 0)
                if cached_share(kept.fileno(), 0, 1):
                    pytest.skip("this file system lives in the page cache")
            file = DirectFile(path, page_cache)
            file.read_into(buffer, 0)
            file.close()
            assert bytes(buffer[:size]) == wanted
            buffer[:] = bytes(len(buffer))
            assert cached_share(kept.fileno(), 0, size) == (is_warm or page_cache is PageCache.FILL)


def test_half_a_file_in_the_page_cache_is_read_from_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_READ_BYTES", 4 * PAGE)
    monkeypatch.setattr(direct, "cached_share", lambda _, offset, __: 0.74 + 0.02 * (offset % (8 * PAGE) == 0))
    path, wanted = tmp_path / "block", b"".join(bytes([number]) * PAGE for number in range(19)) + b"end"
    path.write_bytes(wanted)
    buffer = aligned_buffer(len(wanted))
    file = DirectFile(path)
    file.read_into(buffer, 0)
    file.close()
    assert bytes(buffer[: len(wanted)]) == wanted


def test_reading_past_the_end_is_told(paths: dict[int, Path]) -> None:
    file = DirectFile(paths[1])
    with pytest.raises(StorageFailed, match="no byte"):
        file.read_into(aligned_buffer(PAGE), 100 * PAGE)
    paths[1].write_bytes(b"")  # truncated behind our back
    with pytest.raises(StorageFailed, match="ends at 0"):
        file.read_into(aligned_buffer(PAGE), 0)
    file.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="gone"):
        DirectFile(tmp_path / "gone")
