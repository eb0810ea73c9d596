"""Blocks that stay: only what is new is loaded, only after what is old was let go, and the bits are the same."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiles_of import FolderFiles, NoFiles, load, make_model, source_of, spec_of

from protocol.batches import SessionRows
from protocol.ids import SessionId
from protocol.specs import ModelSpec, Span
from protocol.tiles import TileId
from runtime.fused import block_bytes, block_tiles
from runtime.loading import LoadedPart
from runtime.shares import StageShare, used_ops
from runtime.shelf import BlockShelf

MODEL = make_model("llama3-gqa", num_hidden_layers=4)
SPEC = spec_of(MODEL)
ROWS = (SessionRows(session=SessionId(1), start=0, count=5, capacity=9),)


def share(layers: Span, groups: Span, ffn: Span) -> StageShare:
    return StageShare(layers=layers, groups=groups, ffn=ffn)


ALL, GROUPS, FFN = Span(0, SPEC.layers), Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles)
WHOLE, UPPER = share(ALL, GROUPS, FFN), share(Span(2, 4), GROUPS, FFN)
HALF_GROUPS = share(ALL, Span(0, 1), FFN)


class Named(NoFiles):
    """Names blocks by their tiles."""

    def __init__(self, spec: ModelSpec, held: StageShare) -> None:
        self.spec, self.held = spec, held

    def name_of(self, op: int) -> bytes:
        return repr((op, block_tiles(self.spec, self.held, op))).encode()


class NamedInFolder(Named, FolderFiles):
    def __init__(self, spec: ModelSpec, held: StageShare, folder: Path) -> None:
        Named.__init__(self, spec, held)
        FolderFiles.__init__(self, folder)

    def path_of(self, op: int, num_bytes: int, fill: Callable[[memoryview], None]) -> Path:
        self.path = self.folder / str(abs(hash(self.name_of(op))))
        if not self.path.exists():
            buffer = bytearray(num_bytes)
            fill(memoryview(buffer))
            self.path.write_bytes(buffer)
        return self.path


class Reader:
    """Reads tiles, and remembers which; `before` is called with each."""

    def __init__(self) -> None:
        self.source = source_of(SPEC, MODEL)
        self.read: list[TileId] = []
        self.before: Callable[[TileId], None] = lambda tile: None

    def __call__(self, tile: TileId) -> memoryview:
        self.before(tile)
        self.read.append(tile)
        return self.source(tile)


@pytest.fixture
def shelf() -> Iterator[BlockShelf]:
    one = BlockShelf()
    yield one
    one.clear()


def forward(part: LoadedPart) -> torch.Tensor:
    assert part.stage is not None
    torch.manual_seed(3)
    hidden_TD = torch.randn(5, SPEC.hidden)
    return part.stage.forward(hidden_TD, ROWS, lambda op, own: own if own is not None else torch.zeros(5, SPEC.hidden))


def blocks_of(shelf: BlockShelf, ops: range) -> dict[int, object]:
    return {op: block for op, block in shelf.blocks.items() if op in ops}


def test_what_both_plans_have_stays_and_what_is_new_comes_after_the_old_has_gone(shelf: BlockShelf) -> None:
    reader = Reader()
    load(SPEC, reader, WHOLE, files=Named(SPEC, WHOLE), shelf=shelf)
    kept, old = blocks_of(shelf, range(4, 8)), [weakref.ref(block) for block in blocks_of(shelf, range(4)).values()]
    reader.read.clear()
    part = load(SPEC, reader, UPPER, files=Named(SPEC, UPPER), shelf=shelf)
    assert blocks_of(shelf, range(8)) == kept
    assert all(ref() is None for ref in old)
    assert {tile.kind.name for tile in reader.read} == {"NORMS"}
    assert torch.equal(forward(part), forward(load(SPEC, reader, UPPER)))

    gone = [weakref.ref(block) for op, block in kept.items() if op % 2 == 0]
    del kept, part
    reader.before = lambda tile: _none(gone)
    part = load(SPEC, reader, HALF_GROUPS, files=Named(SPEC, HALF_GROUPS), shelf=shelf)
    assert torch.equal(forward(part), forward(load(SPEC, Reader(), HALF_GROUPS)))


def _none(refs: list[weakref.ref[object]]) -> None:
    assert all(ref() is None for ref in refs)


def test_a_load_that_was_ended_goes_on_where_it_was(shelf: BlockShelf) -> None:
    reader = Reader()

    def stop(tile: TileId) -> None:
        if tile.layer == 2:
            raise InterruptedError

    reader.before = stop
    with pytest.raises(InterruptedError):
        load(SPEC, reader, WHOLE, files=Named(SPEC, WHOLE), shelf=shelf)
    reader.before = lambda tile: None
    reader.read.clear()
    load(SPEC, reader, WHOLE, files=Named(SPEC, WHOLE), shelf=shelf)
    assert all(tile.layer >= 2 for tile in reader.read if tile.kind.name != "NORMS")


def test_the_ring_goes_on_under_the_same_plan_and_pinned_blocks_under_another(
    shelf: BlockShelf, tmp_path: Path
) -> None:
    sizes = [block_bytes(SPEC, WHOLE, op) for op in used_ops(SPEC, WHOLE, is_head=False)]
    reader = Reader()
    files = NamedInFolder(SPEC, WHOLE, tmp_path)

    def loaded(left_bytes: int) -> LoadedPart:
        return load(SPEC, reader, WHOLE, files=files, left_bytes=left_bytes, shelf=shelf)

    left_bytes = sum(sizes) // 2 + 2 * max(sizes)
    first = loaded(left_bytes)
    expected = forward(load(SPEC, Reader(), WHOLE))
    assert first.window.streamed
    assert torch.equal(forward(first), expected)
    assert first.blocks.counts().read_bytes
    again = loaded(left_bytes)
    assert again.blocks is first.blocks
    assert again.blocks.counts().stalled_s == 0
    assert torch.equal(forward(again), expected)
    pinned = shelf.blocks
    tighter = loaded(left_bytes - max(sizes))
    assert tighter.blocks is not first.blocks
    assert shelf.blocks and all(pinned.get(op, block) is block for op, block in shelf.blocks.items())
    assert torch.equal(forward(tighter), expected)
