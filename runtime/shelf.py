"""Blocks that stay in memory from one plan to the next.

Knows nothing of plans or files. A block has a name that says all that its bytes depend on; what is named alike is the
same block. What the next plan does not use is let go before anything is loaded, so that both together never take more
than either may.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from runtime.blocks import Block, BlockSource, VocabBlock


class BlockShelf:
    """The pinned blocks of the plan before, by operation, and the source that lent them."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block | VocabBlock] = {}
        self._names: dict[int, bytes] = {}
        self._source: BlockSource | None = None
        self._recipe: Hashable = None

    @property
    def blocks(self) -> dict[int, Block | VocabBlock]:
        """A copy of which blocks are here."""
        return dict(self._blocks)

    def source_of(self, recipe: Hashable) -> BlockSource | None:
        """Return the source of before as it stands, when it was made by the same recipe; else it ends now."""
        if self._source is not None and self._recipe == recipe:
            self._source.restart()
            return self._source
        if self._source is not None:
            self._source.close()
        self._source = self._recipe = None
        return None

    def keep(self, pinned: Mapping[int, bytes]) -> None:
        """Let go of all blocks but those that are wanted again, given by operation and name."""
        self._names = {op: name for op, name in self._names.items() if pinned.get(op) == name}
        self._blocks = {op: block for op, block in self._blocks.items() if op in self._names}

    def put(self, op: int, name: bytes, block: Block | VocabBlock) -> None:
        """Keep a block that was loaded."""
        self._blocks[op], self._names[op] = block, name

    def lend(self, recipe: Hashable, source: BlockSource) -> BlockSource:
        """Keep a source that was made, and return it."""
        self._source, self._recipe = source, recipe
        return source

    def clear(self) -> None:
        """Let go of everything, and end what works behind the scenes."""
        self.source_of(None)
        self.keep({})
