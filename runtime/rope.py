"""Rotary position embedding: frequencies of the three kinds we know, and the rotation of queries and keys.

Knows nothing of sessions or caches. Halves are rotated against each other (Hugging Face's convention), not pairs.

Shapes: T rows, H heads, d head_dim. Source: Su et al., RoFormer (2021); the llama3 scaling is Meta's, Llama 3.1 (2024).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from protocol.specs import RopeKind, RopeSpec


class Rotation(NamedTuple):
    """The angles of a batch's rows, both `[T, 1, d]`; the first half of `signed_sin` is negated."""

    cos: Tensor
    signed_sin: Tensor


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Return the fp32 angle per position of each pair of dimensions, shape `[d / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind is RopeKind.LINEAR:
        return frequencies / rope.factor
    if rope.kind is RopeKind.LLAMA3:
        return _llama3(rope, frequencies)
    return frequencies


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Keep short waves, divide long ones by the factor, blend those between."""
    longest = rope.original_max_positions / rope.low_freq_factor
    shortest = rope.original_max_positions / rope.high_freq_factor
    waves = 2 * math.pi / frequencies
    scaled = torch.where(waves > longest, frequencies / rope.factor, frequencies)
    blend = (rope.original_max_positions / waves - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * scaled / rope.factor + blend * scaled
    between = (waves >= shortest) & (waves <= longest)
    return torch.where(between, blended, scaled)


def rotation(frequencies: Tensor, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
    """Compute the angles of these positions in fp32, then cast; once a step, shared by all its layers."""
    angles = positions_T[:, None].float() * frequencies
    sin = angles.sin()
    cos_T1d = torch.cat((angles, angles), dim=-1).cos()[:, None, :]
    sin_T1d = torch.cat((-sin, sin), dim=-1)[:, None, :]
    return Rotation(cos_T1d.to(dtype), sin_T1d.to(dtype))


def rotate(x_THd: Tensor, angles: Rotation) -> Tensor:
    """Return the heads rotated by their rows' angles, contiguous, same shape and dtype."""
    swapped_THd = x_THd.roll(x_THd.shape[-1] // 2, dims=-1)
    return torch.addcmul(x_THd * angles.cos, swapped_THd, angles.signed_sin)
