"""What a model is, as far as its arithmetic goes: `ModelSpec`, spans of layers, number formats.

Knows nothing of files, devices or torch. Constructors prove their invariants and raise ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Final

from protocol.schema import Count, Name, Within

Positive = Annotated[int, Within(1, 2**31 - 1)]


class WeightFormat(StrEnum):
    """How weights are stored, travel and are computed with."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"  # symmetric, one scale per output row of the checkpoint
    INT4 = "int4"  # groups along the input, a scale and a zero point per group


class ActivationFormat(StrEnum):
    """Number format of hidden states, in memory and on the wire."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        """Bytes of one value."""
        return 4 if self is ActivationFormat.FLOAT32 else 2


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Half-open range `[start, end)` of layers, of KV-head groups or of FFN tiles."""

    start: Count
    end: Count

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end:
            raise ValueError(f"span [{self.start}, {self.end}) is not in order")

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, item: int) -> bool:
        return self.start <= item < self.end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __and__(self, other: Span) -> Span:
        """Return what is in both; empty when nothing is."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.end, other.end)))

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"


NO_LAYERS: Final = Span(0, 0)


def require_tiling(spans: tuple[Span, ...], num_items: int, what: str) -> None:
    """Raise ValueError unless the spans, in order, cover `[0, num_items)` once and without a gap."""
    position = 0
    for span in spans:
        if span.start != position:
            raise ValueError(f"{what}: {span} should start at {position}")
        position = span.end
    if position != num_items:
        raise ValueError(f"{what}: spans end at {position}, not at {num_items}")


INT4_GROUP = 32


class RopeKind(StrEnum):
    """Which rotary frequencies a model uses."""

    DEFAULT = "default"
    LINEAR = "linear"
    LLAMA3 = "llama3"


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: base and, for long contexts, the scaling of its frequencies."""

    theta: float
    kind: RopeKind = RopeKind.DEFAULT
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: Count = 0

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor"):
            if not 0 < getattr(self, name) < math.inf:  # also refuses NaN
                raise ValueError(f"rope {name} {getattr(self, name)} must be positive and finite")
        if self.kind is RopeKind.LLAMA3 and not (
            0 < self.low_freq_factor < self.high_freq_factor and self.original_max_positions > 0
        ):
            raise ValueError("llama3 rope needs 0 < low_freq_factor < high_freq_factor and original_max_positions")


_SIZES = ["hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab", "max_positions", "ffn_tiles"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """All that decides a decoder's arithmetic.

    `sliding_windows` has one entry a layer: how many positions back it attends, itself included; 0 means all.
    `vocab` rows of the embedding; `ffn_tiles` column slices of each FFN.
    """

    name: Name
    family: Name
    hidden: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    intermediate: Positive
    vocab: Positive
    max_positions: Positive
    norm_eps: float
    rope: RopeSpec
    ffn_tiles: Positive
    weights: WeightFormat
    activations: ActivationFormat
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    sliding_windows: tuple[Count, ...] = ()

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even for rotary embedding")
        if self.ffn_tiles > self.intermediate:
            raise ValueError(f"ffn_tiles {self.ffn_tiles} exceeds intermediate {self.intermediate}")
        if self.sliding_windows and len(self.sliding_windows) != self.layers:
            raise ValueError(f"sliding_windows has {len(self.sliding_windows)} entries for {self.layers} layers")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps {self.norm_eps} must be positive and finite")
        if self.weights is WeightFormat.INT4:
            self._require_groups()

    def _require_groups(self) -> None:
        """Groups of int4 weights lie along the input and must not cross a tile."""
        for name, cols in (
            ("hidden", self.hidden),
            ("heads / kv_heads * head_dim", self.queries_per_group * self.head_dim),
            ("intermediate", self.intermediate),
        ):
            if cols % INT4_GROUP:
                raise ValueError(f"int4 needs groups of {INT4_GROUP} columns, {name} {cols} is no multiple of that")
        if self.ffn_tiles * INT4_GROUP > self.intermediate:
            raise ValueError(f"int4 needs FFN tiles of {INT4_GROUP} columns, {self.ffn_tiles} are too many")

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    def window_of(self, layer: int) -> int:
        """Positions that `layer` looks back, itself included; 0 means all."""
        return self.sliding_windows[layer] if self.sliding_windows else 0

    def kv_bytes_per_token(self, groups: int, layers: int) -> int:
        """Bytes of keys and values that one position takes in `groups` KV-head groups of `layers` layers."""
        return (
            2  # key + value
            * groups
            * layers
            * self.head_dim
            * self.activations.num_bytes
        )


FFN_TILE_ALIGN = 32
DEFAULT_FFN_TILES = 16


def default_ffn_tiles(intermediate: int) -> int:
    """Return 16 tiles a layer, or fewer when a tile would be narrower than one quantisation group (32 columns)."""
    return max(1, min(DEFAULT_FFN_TILES, intermediate // FFN_TILE_ALIGN))
