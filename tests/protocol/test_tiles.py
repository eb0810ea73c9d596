"""Tiles: for any model they cover each checkpoint tensor exactly once, and their parts lie where they should."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.specs import (
    FFN_TILE_ALIGN,
    INT4_GROUP,
    ActivationFormat,
    ModelSpec,
    RopeSpec,
    Span,
    WeightFormat,
    default_ffn_tiles,
)
from protocol.tiles import (
    DTYPE_BYTES,
    HEAD_KINDS,
    HEAD_LAYER,
    LM_HEAD_ROWS,
    PART_ALIGN,
    TileId,
    TileKind,
    all_tiles,
    ffn_span,
    head_tiles,
    layer_tiles,
    tile_bytes,
    tile_parts,
    tile_slices,
)

REPLICATED = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small models of any shape that the constructors allow."""
    kv_heads = draw(st.integers(1, 5))
    weights = draw(st.sampled_from(WeightFormat))
    is_int4 = weights is WeightFormat.INT4
    intermediate = draw(st.integers(1, 20)) * INT4_GROUP if is_int4 else draw(st.integers(1, 300))
    few = st.integers(1, min(intermediate, 9))
    ffn_tiles = default_ffn_tiles(intermediate) if is_int4 else draw(few)
    flags = {name: draw(st.booleans()) for name in ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "tied_embeddings")}
    return ModelSpec(
        name="any",
        family="llama",
        hidden=draw(st.integers(1, 3)) * INT4_GROUP if is_int4 else draw(st.integers(1, 70)),
        layers=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        head_dim=INT4_GROUP if is_int4 else 2 * draw(st.integers(1, 16)),
        intermediate=intermediate,
        vocab=draw(st.integers(1, 3 * LM_HEAD_ROWS)),
        max_positions=64,
        norm_eps=1e-5,
        rope=RopeSpec(theta=1e4),
        ffn_tiles=ffn_tiles,
        weights=weights,
        activations=draw(st.sampled_from(ActivationFormat)),
        **flags,
    )


def checkpoint_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Every tensor that the checkpoint of this model has, as (rows, cols); a vector has 0 columns."""
    queries, keys = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes = {"model.embed_tokens.weight": (spec.vocab, spec.hidden), "model.norm.weight": (spec.hidden, 0)}
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab, spec.hidden)
    for layer in range(spec.layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.{norm}.weight": (spec.hidden, 0) for norm in ("input_layernorm", "post_attention_layernorm")}
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (rows, spec.hidden)
            if spec.qkv_bias:
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (rows, 0)
        shapes[f"{at}.self_attn.o_proj.weight"] = (spec.hidden, queries)
        if spec.o_bias:
            shapes[f"{at}.self_attn.o_proj.bias"] = (spec.hidden, 0)
        if spec.qk_norm:
            shapes |= {f"{at}.self_attn.{name}_norm.weight": (spec.head_dim, 0) for name in ("q", "k")}
        for name in ("gate", "up"):
            shapes[f"{at}.mlp.{name}_proj.weight"] = (spec.intermediate, spec.hidden)
            if spec.mlp_bias:
                shapes[f"{at}.mlp.{name}_proj.bias"] = (spec.intermediate, 0)
        shapes[f"{at}.mlp.down_proj.weight"] = (spec.hidden, spec.intermediate)
        if spec.mlp_bias:
            shapes[f"{at}.mlp.down_proj.bias"] = (spec.hidden, 0)
    return shapes


def covers_once(spans: list[Span], length: int) -> bool:
    """Whether the spans, in some order, tile `[0, length)`."""
    ends = [0, *(span.end for span in sorted(spans))]
    return ends[:-1] == [span.start for span in sorted(spans)] and ends[-1] == length


@settings(max_examples=60, deadline=None)
@given(specs())
def test_tiles_cover_each_tensor_exactly_once(spec: ModelSpec) -> None:
    rows_of: dict[str, list[Span | None]] = defaultdict(list)
    cols_of: dict[str, list[Span | None]] = defaultdict(list)
    for tile in all_tiles(spec):
        for piece in tile_slices(spec, tile):
            rows_of[piece.tensor].append(piece.rows)
            cols_of[piece.tensor].append(piece.cols)
    shapes = checkpoint_shapes(spec)
    assert set(rows_of) == set(shapes)
    for tensor, (num_rows, num_cols) in shapes.items():
        rows, cols = rows_of[tensor], cols_of[tensor]
        if rows == [None] * len(rows) and cols == [None] * len(cols):  # whole: once, or in every tile that needs it
            assert len(rows) == 1 or tensor.endswith(REPLICATED), tensor
        elif cols == [None] * len(cols):
            assert covers_once([span for span in rows if span is not None], num_rows), tensor
        else:
            assert rows == [None] * len(rows), tensor
            assert covers_once([span for span in cols if span is not None], num_cols), tensor


@settings(max_examples=60, deadline=None)
@given(specs())
def test_parts_match_their_slices_are_aligned_and_do_not_overlap(spec: ModelSpec) -> None:
    shapes = checkpoint_shapes(spec)
    for tile in {(t.kind, t.index): t for t in all_tiles(spec) if t.layer <= 0}.values():
        parts = {part.name: part for part in tile_parts(spec, tile)}
        end = 0
        for part in parts.values():
            assert part.offset % PART_ALIGN == 0
            assert end <= part.offset < end + PART_ALIGN
            assert part.num_bytes == part.rows * max(part.cols, 1) * DTYPE_BYTES[part.dtype] > 0
            end = part.offset + part.num_bytes
        assert tile_bytes(spec, tile) == end
        for piece in tile_slices(spec, tile):
            num_rows, num_cols = shapes[piece.tensor]
            expected = (len(piece.rows) if piece.rows else num_rows, len(piece.cols) if piece.cols else num_cols)
            part = parts.pop(piece.part)
            packed = 2 if part.dtype == "uint8" else 1
            assert (part.rows, part.cols * packed) == expected
            for scale in (parts.pop(f"{piece.part}.scale", None), parts.pop(f"{piece.part}.zero", None)):
                groups = 0 if part.dtype == "int8" else expected[1] // INT4_GROUP
                assert scale is None or (scale.rows, scale.cols) == (expected[0], groups)
        assert not parts, "parts that come from nowhere"


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 40))
def test_ffn_cuts_leave_no_tile_empty_and_fall_on_groups_where_they_can(intermediate: int, ffn_tiles: int) -> None:
    ffn_tiles = min(ffn_tiles, intermediate)
    spec = plain_spec(intermediate=intermediate, ffn_tiles=ffn_tiles)
    spans = [ffn_span(spec, index) for index in range(ffn_tiles)]
    assert covers_once(spans, intermediate)
    assert all(len(span) for span in spans)
    if intermediate >= ffn_tiles * FFN_TILE_ALIGN:
        assert all(span.start % FFN_TILE_ALIGN == 0 for span in spans)


@pytest.mark.parametrize(
    ("intermediate", "tiles"), [(1, 1), (31, 1), (32, 1), (64, 2), (511, 15), (512, 16), (14336, 16)]
)
def test_default_number_of_ffn_tiles(intermediate: int, tiles: int) -> None:
    assert default_ffn_tiles(intermediate) == tiles


def plain_spec(**changes: object) -> ModelSpec:
    """A small model with some fields changed."""
    fields: dict[str, object] = {
        "name": "any",
        "family": "llama",
        "hidden": 64,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "intermediate": 128,
        "vocab": 5000,
        "max_positions": 64,
        "norm_eps": 1e-5,
        "rope": RopeSpec(theta=1e4),
        "ffn_tiles": 4,
        "weights": WeightFormat.FLOAT32,
        "activations": ActivationFormat.FLOAT32,
    }
    return ModelSpec(**fields | changes)  # type: ignore[arg-type]


def test_the_heads_tiles_stand_apart() -> None:
    spec = plain_spec()
    tiles = head_tiles(spec)
    assert {tile.kind for tile in tiles} == HEAD_KINDS
    assert {tile.layer for tile in tiles} == {HEAD_LAYER}
    assert len(tiles) == 2 * 2 + 1
    tied = head_tiles(plain_spec(tied_embeddings=True))
    assert {tile.kind for tile in tied} == HEAD_KINDS - {TileKind.LM_HEAD}


def test_a_share_with_an_empty_range_still_holds_the_norms() -> None:
    assert layer_tiles(3, Span(1, 1), Span(0, 1)) == [TileId(3, TileKind.NORMS, 0), TileId(3, TileKind.FFN, 0)]


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"hidden": 48}, "hidden 48"), ({"head_dim": 8}, "head_dim"), ({"intermediate": 100}, "intermediate 100")],
)
def test_int4_groups_never_cross_a_tile(changed: dict[str, int], told: str) -> None:
    fitting = {"hidden": 64, "head_dim": 32, "intermediate": 96, "ffn_tiles": 3}
    with pytest.raises(ValueError, match=told):
        plain_spec(**(fitting | changed), weights=WeightFormat.INT4)


@pytest.mark.parametrize(
    ("tile", "text"),
    [(TileId(3, TileKind.FFN, 2), "layer 3 ffn.2"), (TileId(HEAD_LAYER, TileKind.LM_HEAD, 0), "lm_head.0")],
)
def test_a_tile_names_itself(tile: TileId, text: str) -> None:
    assert str(tile) == text
