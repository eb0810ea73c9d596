"""(a) One worker beside `transformers.generate`: the same checkpoint, threads and prompt, in turn, warm, medians."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import psutil
import torch

from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.report import ROOT, scratch, table
from manyhands import LocalCluster

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 24, 3


def prompt(count: int, salt: int = 0) -> list[int]:
    """Token ids that mean nothing."""
    return [(number * 7 + salt) % 500 + 2 for number in range(count)]


def ours(folder: Path, dtype: str, threads: int) -> dict[str, float]:
    """Prefill, decode and memory of one worker behind a coordinator."""
    cache = scratch(f"tiles-{dtype}")
    with LocalCluster(
        folder, plan="1", dtype=dtype, threads=threads, cache_dir=cache, startup_timeout_s=300
    ) as cluster:
        client = cluster.client()
        client.generate(prompt(8), max_tokens=2, ignore_eos=True)
        prefill_s, decode_s = [], []
        for salt in range(ROUNDS):
            first = client.generate(prompt(PROMPT_TOKENS, salt), max_tokens=1, ignore_eos=True).timings.total_s
            whole = client.generate(prompt(PROMPT_TOKENS, salt), max_tokens=NEW_TOKENS + 1, ignore_eos=True)
            prefill_s.append(first)
            decode_s.append((whole.timings.total_s - whole.timings.first_token_s) / NEW_TOKENS)
        memory = psutil.Process(cluster.workers[0].pid).memory_info().rss
    return {
        "prefill_s": statistics.median(prefill_s),
        "decode_s": statistics.median(decode_s),
        "resident_bytes": float(memory),
    }


def theirs(folder: Path, dtype: str, threads: int) -> dict[str, float]:
    """The same with transformers in a process of its own."""
    words = [str(folder), dtype, str(threads), str(PROMPT_TOKENS), str(NEW_TOKENS), str(ROUNDS)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.oracle", *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Measure float32 and bfloat16, one and two threads."""
    rows = []
    for dtype in ("bfloat16", "float32"):
        folder = make_checkpoint(SHAPES["1b"], scratch(f"1b-{dtype}"), getattr(torch, dtype))
        for threads in (1, 2):
            one, other = ours(folder, dtype, threads), theirs(folder, dtype, threads)
            rows.append(
                (
                    dtype,
                    threads,
                    f"{1 / one['decode_s']:.2f}",
                    f"{1 / other['decode_s']:.2f}",
                    f"{other['decode_s'] / one['decode_s']:.2f}x",
                    f"{PROMPT_TOKENS / one['prefill_s']:.0f}",
                    f"{PROMPT_TOKENS / other['prefill_s']:.0f}",
                    f"{other['prefill_s'] / one['prefill_s']:.2f}x",
                    f"{one['resident_bytes'] / 2**20:.0f} / {other['resident_bytes'] / 2**20:.0f}",
                )
            )
    table(
        f"(a) One worker beside transformers, 1B shape, {PROMPT_TOKENS} prompt tokens",
        (
            "dtype",
            "threads",
            "decode tok/s",
            "theirs",
            "ratio",
            "prefill tok/s",
            "theirs",
            "ratio",
            "MiB ours / theirs",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
