"""The record of a run: what a reader may want to know of how the model came to be."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, field


@dataclass
class Record:
    """What a reader may want to know about a run; written as training.json."""

    python: str = platform.python_version()
    seed: int = 0
    parameters: int = 0
    train_files: int = 0
    train_bytes: int = 0
    train_tokens: int = 0
    held_out_files: int = 0
    held_out_bytes: int = 0
    held_out_tokens: int = 0
    steps: int = 0
    tokens_seen: int = 0
    minutes: float = 0.0
    train_loss: float = math.nan
    held_out_loss: float = math.nan
    held_out_bits_per_byte: float = math.nan
    history: list[dict[str, float]] = field(default_factory=list)
