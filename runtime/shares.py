"""What one worker computes of a model, and the numbers of its operations in the order in which a step uses them.

Knows nothing of weights. Operation `2 * layer` is the attention of a layer, `2 * layer + 1` its FFN; the head's lm_head
comes after all layers, in chunks of a few tiles: operation `2 * layers + chunk`.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.contract import VOCAB_CHUNK_TILES
from protocol.specs import ModelSpec, Span
from protocol.tiles import num_vocab_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class StageShare:
    """What one member computes: its stage's layers, and its KV-head groups and FFN tiles in each of them."""

    layers: Span
    groups: Span
    ffn: Span


NO_SHARE = StageShare(layers=Span(0, 0), groups=Span(0, 0), ffn=Span(0, 0))


def layer_ops(share: StageShare, layers: Span | None = None) -> range:
    """Return the operations of a share's layers, or of those in `layers`; those without tiles here too."""
    own = share.layers if layers is None else share.layers & layers
    return range(2 * own.start, 2 * own.end)


def vocab_ops(spec: ModelSpec) -> range:
    """Return the operations of the lm_head."""
    return range(2 * spec.layers, 2 * spec.layers - (-num_vocab_tiles(spec) // VOCAB_CHUNK_TILES))


def vocab_tiles(spec: ModelSpec, op: int) -> Span:
    """Return the lm_head tiles of an operation."""
    first = (op - 2 * spec.layers) * VOCAB_CHUNK_TILES
    return Span(first, min(first + VOCAB_CHUNK_TILES, num_vocab_tiles(spec)))


def holds_nothing(share: StageShare, op: int) -> bool:
    """Say whether a share has no tile of an operation of its layers."""
    return not len(share.ffn if op % 2 else share.groups)


def used_ops(spec: ModelSpec, share: StageShare, *, is_head: bool) -> tuple[int, ...]:
    """Return the operations that need weights, in the order of a step."""
    ops = [op for op in layer_ops(share) if not holds_nothing(share, op)]
    return (*ops, *(vocab_ops(spec) if is_head else ()))
