"""The ring with a real loader thread and a real file: right bytes in the right order, and told failures."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocol.errors import StorageFailed
from runtime.direct import PAGE, DirectFile, aligned_buffer, round_up
from runtime.stream import Extent, Ring
from runtime.window import WindowPlan

SIZES = [100, PAGE, PAGE + 1, 3 * PAGE, 77]


@pytest.fixture
def block_file(tmp_path: Path) -> tuple[Path, dict[int, Extent]]:
    extents, content = {}, bytearray()
    for block, size in enumerate(SIZES):
        extents[block] = Extent(len(content), size)
        content += bytes([block + 1]) * size
        content += bytes(round_up(len(content)) - len(content))
    path = tmp_path / "blocks"
    path.write_bytes(content[:-1])  # a file may end inside its last page
    return path, extents


@pytest.fixture
def plan() -> WindowPlan:
    return WindowPlan(pinned=frozenset({1}), streamed=(0, 2, 3, 4), slot_bytes=3 * PAGE, num_slots=2)


@pytest.fixture
def ring(block_file: tuple[Path, dict[int, Extent]], plan: WindowPlan) -> Iterator[Ring]:
    ring = Ring(plan, block_file[1], DirectFile(block_file[0]))
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
    """Fails at one offset until it is mended."""

    broken_at = -1

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if offset == self.broken_at:
            raise StorageFailed(f"can't read {self.path} at {offset}: broken")
        super().read_into(buffer, offset)


def test_a_failed_read_is_told_and_tried_again(block_file: tuple[Path, dict[int, Extent]], plan: WindowPlan) -> None:
    path, extents = block_file
    file = FailingFile(path)
    file.broken_at = extents[3].offset
    ring = Ring(plan, extents, file)
    try:
        assert holds(ring, 0) and holds(ring, 2)
        with pytest.raises(StorageFailed, match=str(path)):
            ring.acquire(3)
        file.broken_at = -1
        assert all(holds(ring, block) for block in (3, 4, 0))
    finally:
        ring.close()


def test_without_direct_reads(
    block_file: tuple[Path, dict[int, Extent]], plan: WindowPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.O_DIRECT", raising=False)
    path, extents = block_file
    ring = Ring(plan, extents, DirectFile(path))
    assert all(holds(ring, block) for block in (0, 2, 3, 4, 0))
    ring.close()


@pytest.mark.parametrize("offset", [PAGE * 100, PAGE * 7])
def test_reading_past_the_end_is_told(block_file: tuple[Path, dict[int, Extent]], offset: int) -> None:
    file = DirectFile(block_file[0])
    with pytest.raises(StorageFailed):
        if offset > file.num_bytes:
            file.read_into(aligned_buffer(PAGE), offset)
        else:
            block_file[0].write_bytes(b"")  # truncated behind our back
            file.read_into(aligned_buffer(PAGE), 0)
    file.close()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="gone"):
        DirectFile(tmp_path / "gone")
