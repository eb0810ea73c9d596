"""Model folders made on the spot, and what transformers generates from them on one machine.

Knows nothing of clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import VOCAB, expected, random_model

NUM_TOKENS = 64
WINDOW = 32
PREFILL_CHUNK = 256  # the coordinator's default
LEAST_GAP = 2e-3  # of the two highest logits, which are about 9; sums in another order move them by about 1e-5

# Room for long prompts, and large weights, which keep the choices apart.
ALIKE: dict[str, Any] = {"max_position_embeddings": 2048, "initializer_range": 0.4}
OWN: dict[str, dict[str, Any]] = {
    "llama3": {"tie_word_embeddings": True, "num_hidden_layers": 4, "num_key_value_heads": 4},
    "llama2": {},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {},
    "qwen3": {},
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
        tokens, logits = expected(self.model, prompt, count)
        top = torch.stack(logits).topk(2).values
        gap = float((top[..., 0] - top[..., 1]).min())
        if gap < LEAST_GAP:
            raise AssertionError(f"a near-tie: the two highest logits are {gap:.1e} apart; take another prompt or seed")
        return tuple(tokens)


def make_checkpoint(
    folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 7, **changes: Any
) -> Checkpoint:
    """Save a random model of a family in `dtype`, without a tokenizer."""
    model = random_model(family, seed=seed, **{**ALIKE, **OWN[family], **changes}).to(dtype)
    model.save_pretrained(folder)
    return Checkpoint(folder=folder, model=model.float())
