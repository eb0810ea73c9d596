"""The model: a small decoder of Llama's architecture with grouped-query attention, and its loss.

Knows nothing of optimizers or files.

Shape legend: B batch, T positions, E hidden, H query heads, K key/value heads, D head size, F feed-forward, V vocab.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as fn


@dataclass(frozen=True)
class Shape:
    """Sizes of the model."""

    vocab: int = 2048
    hidden: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    head_size: int = 32
    feed_forward: int = 640
    positions: int = 1024
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


def rope_tables(shape: Shape, positions: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, D) of the rotary embedding, both halves of D alike."""
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_size, 2).float() / shape.head_size)
    angles = torch.outer(torch.arange(positions).float(), inverse).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to x (B, N, T, D)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear map without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 128) -> Tensor:
    """Attend from q (N, T, D) to k and v (N, T, D), a block of queries at a time.

    On a processor without matrix units this takes half the time of PyTorch's fused attention in bf16.
    """
    mask = torch.full((block, block), -math.inf, dtype=q.dtype).triu(1)
    mixed = []
    for first in range(0, q.shape[1], block):
        last = min(first + block, q.shape[1])
        scores = torch.bmm(q[:, first:last], k[:, :last].transpose(1, 2))
        here = mask[: last - first, : last - first]
        mixed.append(torch.bmm((scores + fn.pad(here, (first, 0))).softmax(-1), v[:, :last]))
    return torch.cat(mixed, dim=1)


class Attention(nn.Module):
    """Causal grouped-query attention; attribute names are those of the Hugging Face checkpoint."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_size, self.group = shape.head_size, shape.heads // shape.kv_heads
        self.q_proj = linear(shape.hidden, shape.heads * shape.head_size)
        self.k_proj = linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.v_proj = linear(shape.hidden, shape.kv_heads * shape.head_size)
        self.o_proj = linear(shape.heads * shape.head_size, shape.hidden)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (B, T, E) to (B, T, E)."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for p in self.projections())
        q, k = rotate(q, cos, sin) * self.head_size**-0.5, rotate(k, cos, sin)
        k, v = k.repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        with torch.autocast("cpu", enabled=False):  # which would take the softmax to fp32
            mixed = causal_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        out: Tensor = self.o_proj(mixed.view_as(q).transpose(1, 2).flatten(2))
        return out

    def projections(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Return the three input projections."""
        return self.q_proj, self.k_proj, self.v_proj


class FeedForward(nn.Module):
    """SwiGLU feed-forward block."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = linear(shape.hidden, shape.feed_forward)
        self.up_proj = linear(shape.hidden, shape.feed_forward)
        self.down_proj = linear(shape.feed_forward, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, T, E) to (B, T, E)."""
        out: Tensor = self.down_proj(fn.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (B, T, E) to (B, T, E)."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """The decoder; the output matrix is the embedding matrix."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.norm_eps)
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights; the matrices that write into the residual stream start smaller."""
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * self.shape.layers) if writes else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) for ids (B, T)."""
        x = self.embed_tokens(ids)
        kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        cos, sin = (table.to(kind) for table in rope_tables(self.shape, ids.shape[1]))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return fn.linear(self.norm(x), self.embed_tokens.weight)


def loss_of(model: Llama, batch: Tensor) -> Tensor:
    """Return the mean next-token loss of a batch (B, T+1)."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(batch[:, :-1])
    return fn.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
