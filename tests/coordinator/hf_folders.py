"""Builds tiny Hugging Face folders of every family on the spot, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

torch.set_num_threads(1)

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 16, "head_dim": 16}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 16}),
}


def build_model(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    """A model with random weights, biases and norms."""
    config_class, model_class, own = FAMILIES[family]
    torch.manual_seed(7)
    model = model_class(config_class(**{**BASE, **own, **extra}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def save_model(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "", **extra: Any
) -> Any:
    """Save a tiny model the way transformers does; returns the model."""
    model = build_model(family, dtype, **extra)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; `...` removes one."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is ...:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))
