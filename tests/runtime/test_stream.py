"""The ring with a real loader thread and a real file: right bytes in the right order, and told failures."""

from __future__ import annotations

import gc
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protocol.errors import StorageFailed
from runtime import direct, mapped
from runtime.direct import PAGE, DirectFile, aligned_buffer
from runtime.mapped import MappedFile, can_map
from runtime.page_cache import PageCache, cached_share, forget
from runtime.slots import CopiedSlots, MappedSlots, open_slots
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


@pytest.fixture(params=[PageCache.USE, PageCache.FILL])
def ring(paths: dict[int, Path], plan: WindowPlan, request: pytest.FixtureRequest) -> Iterator[Ring]:
    """Slots that are copied to, and slots that show the page cache."""
    ring = Ring(plan, open_slots(plan, paths, request.param))
    yield ring
    ring.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "window-loader"]


def holds(ring: Ring, block: int) -> bool:
    slot = ring.acquire(block)
    right = bytes(ring.slots.data(block, slot)[: SIZES[block]]) == bytes([block + 1]) * SIZES[block]
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
    assert ring.slots.num_bytes == 2 * 3 * PAGE


def test_buffers_are_aligned_and_zero() -> None:
    view = aligned_buffer(PAGE + 5)
    assert len(view) == 2 * PAGE and not any(view)


class FailingFile(DirectFile):
    """Can't be read until it is mended."""

    is_broken = True

    def read_into(self, buffer: memoryview, offset: int, on_progress: Callable[[], None] = lambda: None) -> None:
        if self.is_broken:
            raise StorageFailed(f"can't read {self.path} at {offset}: broken")
        super().read_into(buffer, offset, on_progress)


def test_a_failed_read_is_told_and_tried_again(paths: dict[int, Path], plan: WindowPlan) -> None:
    broken = FailingFile(paths[3])
    ring = Ring(plan, CopiedSlots(plan, {block: DirectFile(path) for block, path in paths.items()} | {3: broken}))
    try:
        assert holds(ring, 0) and holds(ring, 2)
        with pytest.raises(StorageFailed, match=str(paths[3])):
            ring.acquire(3)
        broken.is_broken = False
        assert all(holds(ring, block) for block in (3, 4, 0))
    finally:
        ring.close()


def test_a_slow_disk_is_waited_for_anew_after_every_piece(
    paths: dict[int, Path], plan: WindowPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = threading.Semaphore(0)

    class Condition(threading.Condition):
        """Tells of every wait that has a deadline; who holds the lock can't be told anything before it waits."""

        def wait(self, timeout: float | None = None) -> bool:
            if timeout is not None:
                waits.release()
            return super().wait(timeout)

    class SlowSlots(CopiedSlots):
        """Gets on as often as somebody waits."""

        def fill(self, block: int, slot: int, on_progress: Callable[[], None]) -> int:
            for _ in range(3):
                assert waits.acquire(timeout=10)
                on_progress()
            return super().fill(block, slot, on_progress)

    monkeypatch.setattr(threading, "Condition", Condition)
    ring = Ring(plan, SlowSlots(plan, {block: DirectFile(path) for block, path in paths.items()}))
    assert holds(ring, 0)
    waits.release(3)  # what is read ahead
    ring.close()


def test_progress_is_told_after_every_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "MAX_READ_BYTES", 2 * PAGE)
    monkeypatch.setattr(mapped, "PIECE_BYTES", 2 * PAGE)
    path, pieces = tmp_path / "block", []
    path.write_bytes(bytes(5 * PAGE))
    file = DirectFile(path)
    file.read_into(aligned_buffer(5 * PAGE), 0, lambda: pieces.append("read"))
    file.close()
    assert pieces == ["read"] * 3
    if can_map():
        shown = MappedFile(path)
        shown.show(lambda: pieces.append("shown"))
        shown.close()
        assert pieces == ["read"] * 3 + ["shown"] * 3


def test_without_direct_reads(paths: dict[int, Path], plan: WindowPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_DIRECT", raising=False)
    ring = Ring(plan, open_slots(plan, paths, PageCache.USE))
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


needs_mapping = pytest.mark.skipif(not can_map(), reason="this system does not show pages on demand")


@needs_mapping
def test_who_fills_the_page_cache_computes_in_it(paths: dict[int, Path], plan: WindowPlan) -> None:
    ring = Ring(plan, open_slots(plan, paths, PageCache.FILL))
    assert isinstance(ring.slots, MappedSlots)
    ring.close()


def shown_pages(path: Path) -> int:
    """Pages of a file that are this process's memory now."""
    found = re.search(rf"{re.escape(str(path))}\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert found is not None
    return 1024 * int(found[1]) // PAGE


@needs_mapping
def test_no_more_is_shown_than_there_are_slots(tmp_path: Path) -> None:
    size = 64 * PAGE
    paths = {block: tmp_path / f"large-{block}" for block in range(4)}
    for block, path in paths.items():
        path.write_bytes(bytes([block]) * size)
    plan = WindowPlan(pinned=frozenset(), streamed=(0, 1, 2, 3), slot_bytes=size, num_slots=2)
    slots = open_slots(plan, paths, PageCache.FILL)
    for block, slot in [(0, 0), (1, 1), (2, 0), (3, 1), (0, 0)]:
        assert slots.fill(block, slot, lambda: None) == size
        assert bytes(slots.data(block, slot)) == bytes([block]) * size
        assert shown_pages(paths[block]) == 64
    assert [shown_pages(path) for path in paths.values()] == [64, 0, 0, 64]
    slots.close()


@needs_mapping
def test_a_mapped_file_that_ends_early_is_told(paths: dict[int, Path], plan: WindowPlan) -> None:
    slots = open_slots(plan, paths, PageCache.FILL)
    paths[3].write_bytes(b"")  # truncated behind our back
    with pytest.raises(StorageFailed, match=f"can't read {paths[3]}"):
        slots.fill(3, 0, lambda: None)
    assert slots.fill(2, 0, lambda: None) == SIZES[2]
    slots.close()


@needs_mapping
def test_a_file_that_is_larger_than_its_slot_is_told(paths: dict[int, Path], plan: WindowPlan) -> None:
    paths[2].write_bytes(bytes(4 * PAGE))
    with pytest.raises(StorageFailed, match=f"{paths[2]} has {4 * PAGE} bytes"):
        open_slots(plan, paths, PageCache.FILL)


@pytest.mark.parametrize("content", [None, b""])
def test_a_file_that_can_not_be_mapped_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "block"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(StorageFailed, match=str(path)):
        MappedFile(path)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="this system does not tell of open files")
@pytest.mark.parametrize("page_cache", [PageCache.USE, PageCache.FILL])
def test_files_that_can_not_all_be_opened_leave_none_open(
    paths: dict[int, Path], plan: WindowPlan, page_cache: PageCache
) -> None:
    paths[4].unlink()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(StorageFailed, match=str(paths[4])):
        open_slots(plan, paths, page_cache)
    gc.collect()  # what a mapping holds ends with the mapping
    assert len(list(Path("/proc/self/fd").iterdir())) == before
