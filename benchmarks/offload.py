"""The same model through accelerate's disk offload, in a process of its own: prints one JSON line.

    python -m benchmarks.offload FOLDER WEIGHT_BYTES THREADS NEW_TOKENS OFFLOAD_FOLDER LIMIT_BYTES

WEIGHT_BYTES is what it may keep in memory. With LIMIT_BYTES > 0 the process is held by a control group, which keeps
the page cache cold too; 0 leaves the page cache alone.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM

from benchmarks.held import MemoryGroup, drop_page_cache


def main() -> None:
    """Measure seconds a token, warm, median."""
    folder, offload = sys.argv[1], sys.argv[5]
    weight_bytes, threads, new_tokens, limit_bytes = (int(sys.argv[n]) for n in (2, 3, 4, 6))
    group = MemoryGroup.make("manyhands-offload", limit_bytes) if limit_bytes else None
    if group is not None:
        group.enter()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": weight_bytes}, offload_folder=offload
    )
    if group is not None and not drop_page_cache():  # what another process read is charged to that one
        sys.exit("the page cache can't be dropped here")
    token = torch.tensor([[5]])
    times = []
    with torch.inference_mode():
        past = model(torch.arange(8)[None], use_cache=True).past_key_values
        for _ in range(new_tokens):
            began = time.perf_counter()
            past = model(token, past_key_values=past, use_cache=True).past_key_values
            times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"token_s": statistics.median(times[1:]), "peak_bytes": peak, "held": group is not None}))
    if group is not None:
        group.leave()
        group.remove()


if __name__ == "__main__":
    main()
