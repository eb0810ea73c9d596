"""Where blocks come from: all of them in memory, or some pinned and the others streamed through the window.

Knows nothing of what blocks compute. The worker says where the file of a block is; `load_blocks` makes a block that has
no file yet from its tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from protocol.errors import InvariantBroken
from protocol.specs import ModelSpec
from runtime.blocks import Block, BlockSource, VocabBlock, make_block
from runtime.direct import DirectFile, aligned_buffer
from runtime.fused import Tensors, allocate_block, block_bytes, block_parts, fill_block, view_block
from runtime.kernels import Kernels
from runtime.matrices import arrange, arrangement, make_matrix
from runtime.page_cache import PageCache
from runtime.shares import StageShare, used_ops
from runtime.shelf import BlockShelf
from runtime.slots import open_slots
from runtime.stream import Ring, StreamCounts
from runtime.tensors import TileSource
from runtime.window import WindowPlan, plan_window

AnyBlock = Block | VocabBlock


class BlockFiles(Protocol):
    """Keeps fused blocks on this device's disk."""

    @property
    def page_cache(self) -> PageCache:
        """What reading the files does with the page cache."""
        ...

    def name_of(self, op: int) -> bytes:
        """Return what a block's bytes depend on, hashed: blocks of one name are the same."""
        ...

    def path_of(self, op: int, num_bytes: int, fill: Callable[[memoryview], None]) -> Path:
        """Return the file of a block, proven to be whole; one that is not there is made by `fill` and kept.

        Raises StorageFull and StorageFailed.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOrder:
    """Whose blocks, in which form, on which device."""

    spec: ModelSpec
    share: StageShare
    is_head: bool
    kernels: Kernels
    device: torch.device

    @property
    def ops(self) -> tuple[int, ...]:
        """The operations in the order of a step."""
        return used_ops(self.spec, self.share, is_head=self.is_head)

    def sizes(self) -> list[int]:
        """Bytes of the blocks of `ops`."""
        return [block_bytes(self.spec, self.share, op) for op in self.ops]

    def fill(self, op: int, into: Tensors, source: TileSource) -> None:
        """Fill a block's tensors from its tiles, as this device's kernels want them."""
        fill_block(self.spec, self.share, op, into, source)
        arrange(into, self.kernels)

    def form(self, op: int) -> bytes:
        """Say how this device's kernels want a block to lie in memory: blocks of equal form are the same bytes."""
        return arrangement(block_parts(self.spec, self.share, op), self.kernels)

    def make(self, op: int, tensors: Tensors, *, is_pinned: bool) -> AnyBlock:
        """Put a block together."""
        return make_block(
            self.spec, self.share, op, tensors, lambda t, name: make_matrix(t, name, self.kernels, is_pinned=is_pinned)
        )


class PinnedBlocks:
    """Every block of a share in memory all the time."""

    def __init__(self, blocks: Mapping[int, AnyBlock]) -> None:
        self._blocks = blocks

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(block.num_bytes for block in self._blocks.values())

    def acquire(self, op: int) -> Block | None:
        """Return the block; None where this worker holds no tile of it."""
        return _layer_block(self._blocks.get(op))

    def acquire_vocab(self, op: int) -> VocabBlock:
        """Return a block of the lm_head."""
        return _vocab_block(self._blocks.get(op))

    def release(self, op: int) -> None:
        """Keep the block."""

    def counts(self) -> StreamCounts:
        """Nothing is streamed."""
        return StreamCounts(0, 0.0, 0.0)

    def restart(self) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """Nothing works behind the scenes."""


class WindowedBlocks:
    """Some blocks pinned, the others in the slots of a ring while they are computed."""

    def __init__(self, order: BlockOrder, plan: WindowPlan, pinned: Mapping[int, AnyBlock], ring: Ring) -> None:
        self._order = order
        self._pinned = pinned
        self._ring = ring
        self._index = {op: number for number, op in enumerate(order.ops)}
        self._streamed = frozenset(plan.streamed)
        # A block's views on a slot are made once: two dozen Python objects for each streamed block and slot.
        self._views: dict[tuple[int, int], AnyBlock] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of pinned blocks and of all slots."""
        return sum(block.num_bytes for block in self._pinned.values()) + self._ring.slots.num_bytes

    def acquire(self, op: int) -> Block | None:
        """Return the block, waiting for the disk when it is behind; raises StorageFailed, DeadlineExceeded."""
        return _layer_block(self._take(op)) if op in self._index else None

    def acquire_vocab(self, op: int) -> VocabBlock:
        """The same for a block of the lm_head."""
        return _vocab_block(self._take(op))

    def release(self, op: int) -> None:
        """A streamed block's slot may be overwritten."""
        if self._index.get(op) in self._streamed:
            self._ring.release()

    def counts(self) -> StreamCounts:
        """Return what has been streamed so far."""
        return self._ring.counts()

    def restart(self) -> None:
        """Count anew what is streamed."""
        self._ring.restart_counts()

    def close(self) -> None:
        """End the loader."""
        self._ring.close()

    def _take(self, op: int) -> AnyBlock:
        number = self._index[op]
        if number not in self._streamed:
            return self._pinned[op]
        slot = self._ring.acquire(number)
        view = self._views.get((op, slot))
        if view is None:
            spec, share = self._order.spec, self._order.share
            tensors = view_block(spec, share, op, self._ring.slots.data(number, slot))
            view = self._views[op, slot] = self._order.make(op, tensors, is_pinned=False)
        return view


def load_blocks(
    order: BlockOrder, source: TileSource, files: BlockFiles, left_bytes: int, shelf: BlockShelf | None = None
) -> tuple[BlockSource, WindowPlan]:
    """Load a share's blocks into at most `left_bytes`: all of them if they fit, else as much as the window allows.

    What is on the `shelf` already is not loaded again, what it holds beside is let go first; then it holds what was
    loaded. Raises BudgetTooSmall when not even two slots fit, and what reading tiles and files raises.
    """
    sizes, shelf = order.sizes(), shelf or BlockShelf()
    # While a matrix is packed it stands in memory twice; on the way in there must be room for the largest block again.
    fits = order.device.type != "cpu" or sum(sizes) + max(sizes, default=0) <= left_bytes
    if fits:
        plan = WindowPlan(pinned=frozenset(range(len(sizes))), streamed=(), slot_bytes=0, num_slots=0)
    else:
        plan = plan_window(sizes, left_bytes)
    names = {op: files.name_of(op) for op in order.ops}
    recipe = (tuple(names.items()), plan)
    found = shelf.source_of(recipe)
    if found is not None:
        return found, plan
    shelf.keep({order.ops[number]: names[order.ops[number]] for number in plan.pinned})
    wanted = [op for op in order.ops if op not in shelf.blocks]
    if fits:
        for op in wanted:
            shelf.put(op, names[op], _pin(order, op, source))
        return shelf.lend(recipe, PinnedBlocks(shelf.blocks)), plan
    by_op = dict(zip(order.ops, sizes, strict=True))
    paths = {op: files.path_of(op, by_op[op], _filler(order, op, source)) for op in wanted}
    streamed = {number: order.ops[number] for number in plan.streamed}
    for op, block in _pin_from_files(
        order, [op for op in wanted if op not in streamed.values()], paths, files.page_cache
    ):
        shelf.put(op, names[op], block)
    if not streamed:
        return shelf.lend(recipe, PinnedBlocks(shelf.blocks)), plan
    slots = open_slots(plan, {number: paths[op] for number, op in streamed.items()}, files.page_cache)
    return shelf.lend(recipe, WindowedBlocks(order, plan, shelf.blocks, Ring(plan, slots))), plan


def _pin(order: BlockOrder, op: int, source: TileSource) -> AnyBlock:
    tensors = allocate_block(order.spec, order.share, op, order.device)
    order.fill(op, tensors, source)
    return order.make(op, tensors, is_pinned=True)


def _filler(order: BlockOrder, op: int, source: TileSource) -> Callable[[memoryview], None]:
    return lambda buffer: order.fill(op, view_block(order.spec, order.share, op, buffer), source)


def _pin_from_files(
    order: BlockOrder, ops: Sequence[int], paths: Mapping[int, Path], page_cache: PageCache
) -> Iterator[tuple[int, AnyBlock]]:
    """Read blocks one after the other through one buffer, which is gone before the ring is made."""
    sizes = {op: block_bytes(order.spec, order.share, op) for op in ops}
    buffer = aligned_buffer(max(sizes.values(), default=1))
    for op in ops:
        file = DirectFile(paths[op], page_cache)
        try:
            file.read_into(buffer, 0)
        finally:
            file.close()
        tensors = {name: part.clone() for name, part in view_block(order.spec, order.share, op, buffer).items()}
        yield op, order.make(op, tensors, is_pinned=True)


def _layer_block(found: AnyBlock | None) -> Block | None:
    if isinstance(found, VocabBlock):
        raise InvariantBroken("a block of the lm_head was asked for as a layer's")
    return found


def _vocab_block(found: AnyBlock | None) -> VocabBlock:
    if not isinstance(found, VocabBlock):
        raise InvariantBroken("a layer's block was asked for as the lm_head's")
    return found
