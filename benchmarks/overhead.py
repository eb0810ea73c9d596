"""(c) What distribution costs a token: a model so small that arithmetic is free, over one to four workers."""

from __future__ import annotations

import statistics

import torch

from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.report import scratch, table
from benchmarks.single import prompt
from manyhands import LocalCluster

NEW_TOKENS, ROUNDS = 100, 3


def token_s(plan: str) -> tuple[float, float]:
    """Return seconds a token at the client: the median of the rounds, and the best."""
    folder = make_checkpoint(SHAPES["free"], scratch("free"), torch.float32)
    with LocalCluster(folder, plan=plan) as cluster:
        client = cluster.client()
        client.generate(prompt(8), max_tokens=20, ignore_eos=True)
        times = []
        for _ in range(ROUNDS):
            done = client.generate(prompt(8), max_tokens=NEW_TOKENS + 1, ignore_eos=True)
            times.append((done.timings.total_s - done.timings.first_token_s) / NEW_TOKENS)
    return statistics.median(times), min(times)


def main() -> None:
    """Measure plans of one to four workers; the difference to one worker is the price of the way."""
    layers = SHAPES["free"].layers
    rows = []
    alone = None
    for plan in ("1", "1/1", "1/1/1", "1/1/1/1", "1,1", "1,1,1", "1,1,1,1", "1,1/1,1"):
        median, best = token_s(plan)
        alone = median if alone is None else alone
        extra = (median - alone) / layers
        rows.append((plan, f"{median * 1e3:.2f}", f"{best * 1e3:.2f}", f"{extra * 1e6:.0f}"))
    table(
        f"(c) Overhead of the way, {layers} layers of hidden {SHAPES['free'].hidden}",
        ("plan", "ms a token, median", "best round", "us a layer beyond one worker"),
        rows,
    )


if __name__ == "__main__":
    main()
