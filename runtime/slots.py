"""The slots of the window: where streamed blocks lie while they are computed, copied there or shown there.

Knows nothing of which block comes next or who waits. `fill` is for one loader thread, `data` for the one that computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

from protocol.errors import StorageFailed
from runtime.direct import DirectFile, aligned_buffer, round_up
from runtime.mapped import MappedFile, can_map
from runtime.page_cache import PageCache
from runtime.window import WindowPlan


class Slots(Protocol):
    """As many places for blocks as the plan has slots."""

    @property
    def num_bytes(self) -> int:
        """Memory that all slots take at most."""
        ...

    def path(self, block: int) -> Path:
        """Return the file of a block."""
        ...

    def fill(self, block: int, slot: int, on_progress: Callable[[], None]) -> int:
        """Read a block into a slot, over what was there; returns its bytes, raises StorageFailed.

        `on_progress` is called after every piece of it, so that who waits knows that the disk is only slow.
        """
        ...

    def data(self, block: int, slot: int) -> memoryview:
        """Return where a block lies that was read into this slot: the same view every time."""
        ...

    def close(self) -> None:
        """Close the files; memory lives as long as somebody looks at it."""
        ...


class CopiedSlots:
    """Preallocated, touched memory that blocks are copied to, whatever the page cache has."""

    def __init__(self, plan: WindowPlan, files: Mapping[int, DirectFile]) -> None:
        self._slots = [aligned_buffer(plan.slot_bytes) for _ in range(plan.num_slots)]
        self._files = files

    @property
    def num_bytes(self) -> int:
        """Bytes of all slots."""
        return sum(len(slot) for slot in self._slots)

    def path(self, block: int) -> Path:
        """Return the file of a block."""
        return self._files[block].path

    def fill(self, block: int, slot: int, on_progress: Callable[[], None]) -> int:
        """Copy a block from its file."""
        file, memory = self._files[block], self._slots[slot]
        file.read_into(memory[: min(round_up(file.num_bytes), len(memory))], 0, on_progress)
        return file.num_bytes

    def data(self, block: int, slot: int) -> memoryview:
        """Return the slot."""
        return self._slots[slot]

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


class MappedSlots:
    """Blocks are shown where the page cache has them; a slot is the right to show one."""

    def __init__(self, plan: WindowPlan, files: Mapping[int, MappedFile]) -> None:
        self._shown: list[int | None] = [None] * plan.num_slots
        self._files = files
        self._slot_bytes = round_up(plan.slot_bytes)
        for block, file in files.items():
            if file.num_bytes > self._slot_bytes:
                raise StorageFailed(f"{file.path} has {file.num_bytes} bytes, block {block} at most {self._slot_bytes}")

    @property
    def num_bytes(self) -> int:
        """Bytes of blocks that are shown at most."""
        return self._slot_bytes * len(self._shown)

    def path(self, block: int) -> Path:
        """Return the file of a block."""
        return self._files[block].path

    def fill(self, block: int, slot: int, on_progress: Callable[[], None]) -> int:
        """Show a block instead of the one before."""
        before = self._shown[slot]
        if before is not None:
            self._files[before].hide()
        self._shown[slot] = block
        self._files[block].show(on_progress)
        return self._files[block].num_bytes

    def data(self, block: int, slot: int) -> memoryview:
        """Return the file's bytes."""
        return self._files[block].data

    def close(self) -> None:
        """Show nothing any more."""
        for file in self._files.values():
            file.hide()
            file.close()


def open_slots(plan: WindowPlan, paths: Mapping[int, Path], page_cache: PageCache) -> Slots:
    """Open the files of streamed blocks. Raises StorageFailed.

    An owner who lets the page cache be filled has blocks computed on in there, where the system can show them.
    """
    with ExitStack() as opened:  # when one can't be opened, those before it are closed
        slots: Slots
        if page_cache is PageCache.FILL and can_map():
            slots = MappedSlots(
                plan, {block: opened.enter_context(closing(MappedFile(path))) for block, path in paths.items()}
            )
        else:
            slots = CopiedSlots(
                plan,
                {block: opened.enter_context(closing(DirectFile(path, page_cache))) for block, path in paths.items()},
            )
        opened.pop_all()
    return slots
