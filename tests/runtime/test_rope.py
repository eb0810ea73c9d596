"""Rotary frequencies and rotation are those of transformers, bit for bit where the formula is the same."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from protocol.specs import RopeKind, RopeSpec
from runtime.rope import inverse_frequencies, rotate, rotation

CASES = {
    "default": (RopeSpec(theta=10000.0), {"rope_type": "default", "rope_theta": 10000.0}),
    "wide": (RopeSpec(theta=500000.0), {"rope_type": "default", "rope_theta": 500000.0}),
    "linear": (
        RopeSpec(theta=10000.0, kind=RopeKind.LINEAR, factor=4.0),
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "llama3": (
        RopeSpec(
            theta=500000.0,
            kind=RopeKind.LLAMA3,
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ),
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("head_dim", [24, 64, 128])
def test_rotation_is_that_of_transformers(case, head_dim):
    ours, theirs = CASES[case]
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=131072, rope_parameters=theirs
    )
    oracle = LlamaRotaryEmbedding(config)
    frequencies = inverse_frequencies(ours, head_dim)
    assert torch.equal(frequencies, oracle.inv_freq)

    positions = torch.tensor([0, 1, 5, 1000, 131071])
    heads = torch.randn(5, 2, head_dim, generator=torch.Generator().manual_seed(1))
    cos, sin = oracle(heads, positions[None])
    wanted, _ = apply_rotary_pos_emb(heads.transpose(0, 1)[None], heads.transpose(0, 1)[None], cos, sin)
    angles = rotation(frequencies, positions, torch.float32)
    assert torch.equal(angles.cos[:, 0], cos[0])
    torch.testing.assert_close(rotate(heads, angles), wanted[0].transpose(0, 1), rtol=0, atol=1e-6)
