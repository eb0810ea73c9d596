"""Tiles: which there are, which rows and columns of the checkpoint each holds, and how its bytes are laid out.

Knows nothing of files or torch. Coordinator and worker compute the same layout from the same `ModelSpec`, so a tile
travels as bare bytes and its hash.

Weights stand as in the checkpoint, `[out, in]` row-major. A tile's parts follow each other, each at a multiple of
`PART_ALIGN` bytes; the gaps are zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NamedTuple

from protocol.schema import Digest, NumBytes, Within
from protocol.specs import FFN_TILE_ALIGN, INT4_GROUP, ActivationFormat, ModelSpec, Span, WeightFormat

PART_ALIGN = 64
HEAD_LAYER = -1
LM_HEAD_ROWS = 4096


class TileKind(StrEnum):
    """What a tile holds; the last three are the head's and never leave it."""

    ATTENTION = "attention"
    FFN = "ffn"
    NORMS = "norms"
    EMBEDDING = "embedding"
    FINAL_NORM = "final_norm"
    LM_HEAD = "lm_head"


HEAD_KINDS = frozenset({TileKind.EMBEDDING, TileKind.FINAL_NORM, TileKind.LM_HEAD})


@dataclass(frozen=True, slots=True, order=True)
class TileId:
    """One tile of one model: its layer (-1 for the head's tiles), kind and index within them."""

    layer: Annotated[int, Within(HEAD_LAYER, 2**20)]
    kind: TileKind
    index: Annotated[int, Within(0, 2**20)]

    def __str__(self) -> str:
        name = f"{self.kind}.{self.index}"
        return name if self.layer == HEAD_LAYER else f"layer {self.layer} {name}"


@dataclass(frozen=True, slots=True)
class TileEntry:
    """A line of the manifest: which tile, how many bytes, and their sha256."""

    tile: TileId
    num_bytes: NumBytes
    digest: Digest


class Part(NamedTuple):
    """One tensor of a tile: `[rows, cols]`, or `[rows]` when cols is 0; `dtype` is a numpy/torch name."""

    name: str
    dtype: str
    rows: int
    cols: int
    offset: int
    num_bytes: int


class Slice(NamedTuple):
    """Where a part comes from: a checkpoint tensor and the rows and columns of it (None: all)."""

    part: str
    tensor: str
    rows: Span | None
    cols: Span | None


DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "uint8": 1}


class Layout:
    """Collects parts one after the other, aligned."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.end = 0

    def add(self, name: str, dtype: str, rows: int, cols: int = 0) -> None:
        offset = -(-self.end // PART_ALIGN) * PART_ALIGN
        num_bytes = rows * max(cols, 1) * DTYPE_BYTES[dtype]
        self.parts.append(Part(name, dtype, rows, cols, offset, num_bytes))
        self.end = offset + num_bytes

    def add_matrix(self, name: str, weights: WeightFormat, rows: int, cols: int) -> None:
        """A weight matrix in its stored format, with its scales beside it."""
        if weights is WeightFormat.INT8:
            self.add(name, "int8", rows, cols)
            self.add(f"{name}.scale", "float32", rows)
        elif weights is WeightFormat.INT4:  # the spec's constructor proves that groups fit
            self.add(name, "uint8", rows, cols // 2)
            self.add(f"{name}.scale", "bfloat16", rows, cols // INT4_GROUP)
            self.add(f"{name}.zero", "bfloat16", rows, cols // INT4_GROUP)
        else:
            self.add(name, weights.value, rows, cols)


def vocab_format(weights: WeightFormat) -> WeightFormat:
    """Return how embedding and lm_head rows are stored: int4 would cost too much there, so they stay at int8."""
    return WeightFormat.INT8 if weights is WeightFormat.INT4 else weights


def ffn_span(spec: ModelSpec, index: int) -> Span:
    """Return the FFN columns that tile `index` holds; cuts fall on multiples of 32 where that leaves none empty."""
    return Span(_ffn_cut(spec, index), _ffn_cut(spec, index + 1))


def _ffn_cut(spec: ModelSpec, index: int) -> int:
    cut = spec.intermediate * index // spec.ffn_tiles
    if index == spec.ffn_tiles or spec.intermediate < spec.ffn_tiles * FFN_TILE_ALIGN:
        return cut
    return cut // FFN_TILE_ALIGN * FFN_TILE_ALIGN


def lm_head_span(spec: ModelSpec, index: int) -> Span:
    """Return the vocabulary rows that embedding or lm_head tile `index` holds."""
    return Span(index * LM_HEAD_ROWS, min((index + 1) * LM_HEAD_ROWS, spec.vocab))


def num_vocab_tiles(spec: ModelSpec) -> int:
    """How many tiles the embedding, and again the lm_head, is cut into."""
    return -(-spec.vocab // LM_HEAD_ROWS)


def layer_tiles(layer: int, groups: Span, ffn: Span) -> list[TileId]:
    """The tiles that a worker with these KV-head groups and FFN tiles holds of one layer."""
    return [
        TileId(layer, TileKind.NORMS, 0),
        *(TileId(layer, TileKind.ATTENTION, index) for index in range(groups.start, groups.end)),
        *(TileId(layer, TileKind.FFN, index) for index in range(ffn.start, ffn.end)),
    ]


def head_tiles(spec: ModelSpec) -> list[TileId]:
    """The tiles of the head: embedding, final norm, lm_head (none of its own when tied to the embedding)."""
    kinds = [TileKind.EMBEDDING] if spec.tied_embeddings else [TileKind.EMBEDDING, TileKind.LM_HEAD]
    vocab = [TileId(HEAD_LAYER, kind, index) for kind in kinds for index in range(num_vocab_tiles(spec))]
    return [*vocab, TileId(HEAD_LAYER, TileKind.FINAL_NORM, 0)]


def all_tiles(spec: ModelSpec) -> list[TileId]:
    """Every tile of the model, the head's first, then layer by layer."""
    groups, ffn = Span(0, spec.kv_heads), Span(0, spec.ffn_tiles)
    return head_tiles(spec) + [tile for layer in range(spec.layers) for tile in layer_tiles(layer, groups, ffn)]


def tile_parts(spec: ModelSpec, tile: TileId) -> tuple[Part, ...]:
    """Return the tensors of a tile with their places; the tile ends where the last part ends."""
    layout = Layout()
    {
        TileKind.ATTENTION: _attention_parts,
        TileKind.FFN: _ffn_parts,
        TileKind.NORMS: _norm_parts,
        TileKind.FINAL_NORM: _final_norm_parts,
        TileKind.EMBEDDING: _vocab_parts,
        TileKind.LM_HEAD: _vocab_parts,
    }[tile.kind](layout, spec, tile)
    return tuple(layout.parts)


def tile_bytes(spec: ModelSpec, tile: TileId) -> int:
    """Return the length of a tile in bytes."""
    last = tile_parts(spec, tile)[-1]
    return last.offset + last.num_bytes


def _plain_dtype(spec: ModelSpec) -> str:
    """Norms and biases stay in the activations' format whatever the weights are."""
    return "float32" if spec.activations is ActivationFormat.FLOAT32 else "bfloat16"


def _attention_parts(layout: Layout, spec: ModelSpec, tile: TileId) -> None:
    rows, plain = spec.queries_per_group * spec.head_dim, _plain_dtype(spec)
    for name, num_rows in (("q", rows), ("k", spec.head_dim), ("v", spec.head_dim)):
        layout.add_matrix(name, spec.weights, num_rows, spec.hidden)
        if spec.qkv_bias:
            layout.add(f"{name}.bias", plain, num_rows)
    layout.add_matrix("o", spec.weights, spec.hidden, rows)
    if spec.o_bias and tile.index == 0:
        layout.add("o.bias", plain, spec.hidden)
    if spec.qk_norm:
        layout.add("q_norm", plain, spec.head_dim)
        layout.add("k_norm", plain, spec.head_dim)


def _ffn_parts(layout: Layout, spec: ModelSpec, tile: TileId) -> None:
    cols, plain = len(ffn_span(spec, tile.index)), _plain_dtype(spec)
    for name in ("gate", "up"):
        layout.add_matrix(name, spec.weights, cols, spec.hidden)
        if spec.mlp_bias:
            layout.add(f"{name}.bias", plain, cols)
    layout.add_matrix("down", spec.weights, spec.hidden, cols)
    if spec.mlp_bias and tile.index == 0:
        layout.add("down.bias", plain, spec.hidden)


def _norm_parts(layout: Layout, spec: ModelSpec, tile: TileId) -> None:
    layout.add("attention_norm", _plain_dtype(spec), spec.hidden)
    layout.add("ffn_norm", _plain_dtype(spec), spec.hidden)


def _final_norm_parts(layout: Layout, spec: ModelSpec, tile: TileId) -> None:
    layout.add("final_norm", _plain_dtype(spec), spec.hidden)


def _vocab_parts(layout: Layout, spec: ModelSpec, tile: TileId) -> None:
    layout.add_matrix("rows", vocab_format(spec.weights), len(lm_head_span(spec, tile.index)), spec.hidden)


def tile_slices(spec: ModelSpec, tile: TileId) -> tuple[Slice, ...]:
    """Return where each part of a tile comes from, in Hugging Face names of the Llama family."""
    if tile.kind is TileKind.ATTENTION:
        return _attention_slices(spec, tile)
    if tile.kind is TileKind.FFN:
        return _ffn_slices(spec, tile)
    if tile.kind is TileKind.NORMS:
        at = f"model.layers.{tile.layer}"
        return (
            Slice("attention_norm", f"{at}.input_layernorm.weight", None, None),
            Slice("ffn_norm", f"{at}.post_attention_layernorm.weight", None, None),
        )
    if tile.kind is TileKind.FINAL_NORM:
        return (Slice("final_norm", "model.norm.weight", None, None),)
    tensor = "lm_head.weight" if tile.kind is TileKind.LM_HEAD else "model.embed_tokens.weight"
    return (Slice("rows", tensor, lm_head_span(spec, tile.index), None),)


def _attention_slices(spec: ModelSpec, tile: TileId) -> tuple[Slice, ...]:
    at, dim = f"model.layers.{tile.layer}.self_attn", spec.head_dim
    width = spec.queries_per_group * dim
    query = Span(tile.index * width, (tile.index + 1) * width)
    key = Span(tile.index * dim, (tile.index + 1) * dim)
    slices = []
    for name, rows in (("q", query), ("k", key), ("v", key)):
        slices.append(Slice(name, f"{at}.{name}_proj.weight", rows, None))
        if spec.qkv_bias:
            slices.append(Slice(f"{name}.bias", f"{at}.{name}_proj.bias", rows, None))
    slices.append(Slice("o", f"{at}.o_proj.weight", None, query))
    if spec.o_bias and tile.index == 0:
        slices.append(Slice("o.bias", f"{at}.o_proj.bias", None, None))
    if spec.qk_norm:
        slices += [Slice(f"{n}_norm", f"{at}.{n}_norm.weight", None, None) for n in ("q", "k")]
    return tuple(slices)


def _ffn_slices(spec: ModelSpec, tile: TileId) -> tuple[Slice, ...]:
    at, cols = f"model.layers.{tile.layer}.mlp", ffn_span(spec, tile.index)
    slices = []
    for name in ("gate", "up"):
        slices.append(Slice(name, f"{at}.{name}_proj.weight", cols, None))
        if spec.mlp_bias:
            slices.append(Slice(f"{name}.bias", f"{at}.{name}_proj.bias", cols, None))
    slices.append(Slice("down", f"{at}.down_proj.weight", None, cols))
    if spec.mlp_bias and tile.index == 0:
        slices.append(Slice("down.bias", f"{at}.down_proj.bias", None, None))
    return tuple(slices)
