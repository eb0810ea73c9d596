"""Model folders made on the spot, and what transformers generates from them on one machine.

Knows nothing of clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

NUM_TOKENS = 64
VOCAB = 131
WINDOW = 32
PREFILL_CHUNK = 256  # the coordinator's default
LEAST_GAP = 2e-3  # of the two highest logits, which are about 9; sums in another order move them by about 1e-5

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "max_position_embeddings": 2048,
    "initializer_range": 0.4,  # large weights keep the choices apart
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3": (
        "Llama",
        {
            "rope_parameters": ROPE,
            "tie_word_embeddings": True,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
    ),
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": WINDOW, "head_dim": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
}


def ids(seed: int, count: int) -> list[int]:
    """Token ids that repeat late."""
    return [(seed * i * i + 5 * i + 3) % VOCAB for i in range(count)]


# Short; beyond Mistral's window; longer than a prefill chunk, and no multiple of it.
PROMPTS = (ids(17, 7), ids(11, WINDOW + 9), ids(23, PREFILL_CHUNK + 45))


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A saved model, and the model itself in float32."""

    folder: Path
    model: Any

    def tokens(self, prompt: Sequence[int], count: int = NUM_TOKENS) -> tuple[int, ...]:
        """What transformers generates greedily; fails when a choice was so close that equality would be luck."""
        out = self.model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
            max_new_tokens=count,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        top = torch.stack(out.logits).topk(2).values
        gap = float((top[..., 0] - top[..., 1]).min())
        if gap < LEAST_GAP:
            raise AssertionError(f"a near-tie: the two highest logits are {gap:.1e} apart; take another prompt or seed")
        return tuple(out.sequences[0, len(prompt) :].tolist())


def make_checkpoint(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 7, **changes: Any
) -> Checkpoint:
    """Save a random model of a family in `dtype`, without a tokenizer; biases and norms are random too."""
    kind, own = FAMILIES[family]
    config = getattr(transformers, f"{kind}Config")(**{**SMALL, **own, **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "norm" in name:
                weight.uniform_(0.5, 1.5)
    model = model.to(dtype)
    model.save_pretrained(folder)
    return Checkpoint(folder=folder, model=model.float())
