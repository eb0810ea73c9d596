"""The model as a folder in Hugging Face layout, with the record of its run beside it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer

from training.model import Llama, Shape
from training.record import Record
from training.tokenizer import BOS, BOS_ID, EOS, EOS_ID, PAD, PAD_ID

CHAT_TEMPLATE = (
    "{{- bos_token }}{% for message in messages %}{{- message['content'] }}"
    "{% if not loop.last %}{{- '\\n' }}{% endif %}{% endfor %}"
)


def model_config(shape: Shape) -> dict[str, object]:
    """Return config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.positions,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": shape.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def generation_config(shape: Shape) -> dict[str, object]:
    """Return generation_config.json."""
    return {
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "max_length": shape.positions,
    }


def tokenizer_config(shape: Shape) -> dict[str, object]:
    """Return tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": shape.positions,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "chat_template": CHAT_TEMPLATE,
    }


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def export_all(folder: Path, model: Llama, tokenizer: Tokenizer, record: Record) -> None:
    """Write the whole model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"model.{name}": weight.detach().bfloat16() for name, weight in model.named_parameters()}
    write_whole(folder / "model.safetensors", safetensors_bytes(tensors, metadata={"format": "pt"}))
    write_whole(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    documents = {
        "config.json": model_config(model.shape),
        "generation_config.json": generation_config(model.shape),
        "tokenizer_config.json": tokenizer_config(model.shape),
        "training.json": asdict(record),
    }
    for name, document in documents.items():
        write_whole(folder / name, (json.dumps(document, indent=2) + "\n").encode())
