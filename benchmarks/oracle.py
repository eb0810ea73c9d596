"""The same work done by transformers, in a process of its own: prints one JSON line.

python -m benchmarks.oracle FOLDER DTYPE THREADS PROMPT_TOKENS NEW_TOKENS ROUNDS
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import psutil
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Measure prefill and decode of `generate`, warm, as medians."""
    folder, dtype = sys.argv[1:3]
    threads, prompt_tokens, new_tokens, rounds = map(int, sys.argv[3:])
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    prompt = torch.arange(prompt_tokens).view(1, -1) % 500 + 2

    def run(count: int) -> float:
        began = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - began

    run(2)
    prefill_s, decode_s = [], []
    for _ in range(rounds):
        prefill_s.append(run(1))
        decode_s.append((run(new_tokens + 1) - prefill_s[-1]) / new_tokens)
    result = {
        "prefill_s": statistics.median(prefill_s),
        "decode_s": statistics.median(decode_s),
        "resident_bytes": psutil.Process().memory_info().rss,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
