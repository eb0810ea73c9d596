"""(e6) Decode and prefill by format, all weights in memory, beside transformers and what the memory allows.

    python -m benchmarks.formats [THREADS] [FORMAT ...]

Every run stands between two of transformers in bf16, because the machine's speed drifts; a ratio is against their mean.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.report import scratch, table
from benchmarks.single import PROMPT_TOKENS, prompt, theirs
from manyhands import LocalCluster

NEW_TOKENS, ROUNDS = 24, 3
FORMATS = ("bfloat16", "int8", "int4")
RATE_BYTES = 1 << 30


def weight_bytes(dtype: str) -> int:
    """Bytes of the 1B shape's weights that one token reads; int4 has 5 bits a weight, and its lm_head is int8."""
    shape = SHAPES["1b"]
    vocab = shape.vocab * shape.hidden
    in_layers = shape.parameters - vocab
    return int({"bfloat16": 2.0, "int8": 1.0, "int4": 0.625}[dtype] * in_layers) + vocab * (1 + (dtype == "bfloat16"))


def memory_rate(threads: int) -> float:
    """Bytes a second at which this many threads read memory: the best of some sums over a gigabyte."""
    torch.set_num_threads(threads)
    values = torch.ones(RATE_BYTES // 4)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        values.sum()
        times.append(time.perf_counter() - began)
    return RATE_BYTES / min(times)


def ours(dtype: str, threads: int) -> tuple[float, float]:
    """Return seconds of one token and of the prompt, as medians."""
    folder = make_checkpoint(SHAPES["1b"], scratch("1b-bfloat16"), torch.bfloat16)
    with LocalCluster(
        folder, plan="1", dtype=dtype, threads=threads, cache_dir=scratch(f"window-1b-{dtype}"), startup_timeout_s=600
    ) as cluster:
        client = cluster.client(timeout_s=60)
        client.generate(prompt(8), max_tokens=2, ignore_eos=True)
        decode_s, prefill_s = [], []
        for salt in range(ROUNDS):
            first = client.generate(prompt(PROMPT_TOKENS, salt), max_tokens=1, ignore_eos=True)
            prefill_s.append(first.timings.total_s)
            whole = client.generate(prompt(8, salt), max_tokens=NEW_TOKENS + 1, ignore_eos=True)
            decode_s.append((whole.timings.total_s - whole.timings.first_token_s) / NEW_TOKENS)
    return statistics.median(decode_s), statistics.median(prefill_s)


def main(threads: int = 1, formats: Sequence[str] = FORMATS) -> None:
    """Measure each format between two runs of transformers."""
    folder = make_checkpoint(SHAPES["1b"], scratch("1b-bfloat16"), torch.bfloat16)
    rate = memory_rate(threads)
    before = theirs(folder, "bfloat16", threads)
    rows = []
    for dtype in formats:
        decode_s, prefill_s = ours(dtype, threads)
        after = theirs(folder, "bfloat16", threads)
        their_decode_s, their_prefill_s = ((before[name] + after[name]) / 2 for name in ("decode_s", "prefill_s"))
        before = after
        read_s = weight_bytes(dtype) / rate
        rows.append(
            (
                dtype,
                f"{1e3 * decode_s:.0f}",
                f"{1 / decode_s:.1f}",
                f"{1 / their_decode_s:.1f}",
                f"{their_decode_s / decode_s:.2f}x",
                f"{1e3 * read_s:.0f}",
                f"{read_s / decode_s:.0%}",
                f"{PROMPT_TOKENS / prefill_s:.0f}",
                f"{PROMPT_TOKENS / their_prefill_s:.0f}",
                f"{their_prefill_s / prefill_s:.2f}x",
            )
        )
    table(
        f"(e6) 1B shape, all in memory, {threads} thread{'s' * (threads > 1)}, beside transformers in bf16; "
        f"memory is read at {rate / 1e9:.1f} GB/s",
        ("format", "ms a token", "tok/s", "transformers", "ratio", "bound ms", "of the bound", "prefill tok/s",
         "transformers", "ratio"),
        rows,
    )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1, tuple(sys.argv[2:]) or FORMATS)
