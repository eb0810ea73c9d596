"""Random checkpoints of true shapes, written in Hugging Face layout shard by shard.

Knows nothing of what is measured with them. The weights are noise; speed and memory do not depend on their values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD_BYTES = 10**9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama shape by its usual numbers."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool

    @property
    def parameters(self) -> int:
        """Number of weights."""
        dim = self.hidden // self.heads
        layer = self.hidden * (2 * self.hidden + 2 * self.kv_heads * dim + 3 * self.intermediate + 2)
        return self.layers * layer + self.hidden * (self.vocab * (1 if self.tied else 2) + 1)


SHAPES = {
    "1b": Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128_256, tied=True),
    "8b": Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14_336, vocab=128_256, tied=False),
    "free": Shape(hidden=64, layers=16, heads=8, kv_heads=4, intermediate=512, vocab=512, tied=True),
}


def make_checkpoint(shape: Shape, folder: Path, dtype: torch.dtype) -> Path:
    """Write a checkpoint unless a finished one is there; returns its folder."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 0
    for name, size in _tensors(shape):
        tensor = torch.empty(size, dtype=dtype).normal_(0.0, 0.02, generator=generator)
        shard[name] = tensor + 1 if name.endswith("norm.weight") else tensor
        if sum(part.nbytes for part in shard.values()) >= SHARD_BYTES:
            number, shard = _write(folder, number, shard, weight_map), {}
    _write(folder, number, shard, weight_map)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(_config(shape, dtype), indent=1))  # last: marks it finished
    return folder


def _write(folder: Path, number: int, shard: dict[str, torch.Tensor], weight_map: dict[str, str]) -> int:
    file = f"model-{number:05}.safetensors"
    if shard:
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    return number + 1


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    for layer in range(shape.layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            yield f"{at}.self_attn.{name}_proj.weight", (rows, hidden)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        yield f"{at}.mlp.gate_proj.weight", (shape.intermediate, hidden)
        yield f"{at}.mlp.up_proj.weight", (shape.intermediate, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, shape.intermediate)
    yield "model.norm.weight", (hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, hidden)


def _config(shape: Shape, dtype: torch.dtype) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
