"""What a step's temporaries count for: by the width of what is computed, and never for what can't be there at once."""

from __future__ import annotations

import dataclasses

from protocol.contract import (
    LOGIT_COPIES,
    SAMPLER_COPIES,
    SLACK_BYTES,
    STRIP_BYTES,
    mask_bytes_per_position,
    workspace_bytes,
)
from protocol.specs import ActivationFormat, ModelSpec, RopeSpec, WeightFormat

SPEC = ModelSpec(
    name="m", family="llama", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=256, vocab=1000,
    max_positions=512, norm_eps=1e-5, rope=RopeSpec(theta=1e4), ffn_tiles=8, weights=WeightFormat.FLOAT32,
    activations=ActivationFormat.FLOAT32,
)  # fmt: skip
NARROW = dataclasses.replace(SPEC, weights=WeightFormat.BFLOAT16, activations=ActivationFormat.BFLOAT16)
INT8 = dataclasses.replace(NARROW, weights=WeightFormat.INT8)


def room(spec: ModelSpec, *, ffn_tiles: int = 8, is_head: bool = False, positions: int = 0, samples: int = 4) -> int:
    counted = workspace_bytes(spec, ffn_tiles=ffn_tiles, is_head=is_head, rows=32, samples=samples, positions=positions)
    return counted - SLACK_BYTES


def test_half_as_wide_values_take_half_the_room() -> None:
    assert room(SPEC) == 32 * (10 * 64 + 3 * 256) * 4 == 2 * room(NARROW)


def test_quantised_products_have_room_for_a_strip() -> None:
    assert room(INT8) == room(NARROW) + STRIP_BYTES


def test_a_smaller_share_takes_less_and_longer_sessions_more() -> None:
    assert room(SPEC) - room(SPEC, ffn_tiles=2) == 32 * 3 * 192 * 4
    assert room(SPEC, positions=100) - room(SPEC) == 100 * mask_bytes_per_position(SPEC, 32) == 100 * 32 * 5


def test_logits_and_layers_are_never_there_at_once() -> None:
    logits = 4 * SPEC.vocab * (4 * LOGIT_COPIES + SAMPLER_COPIES)
    ffn = 32 * 3 * 256 * 4
    assert logits < ffn
    assert room(SPEC, is_head=True) == room(SPEC)
    assert room(SPEC, is_head=True, ffn_tiles=0) == room(SPEC, ffn_tiles=0) + logits
    assert room(SPEC, is_head=True, samples=20) > room(SPEC)
