"""(c) What distribution costs a token: a model so small that arithmetic is free, over one to four workers.

Where the time goes, of a token's way through all stages: blocks (Python and torch, of the hub of every stage), sums
(the same hubs, waiting for the other members included), and the rest: client, coordinator, head, and from stage to
stage.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import torch

from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.report import scratch, table
from benchmarks.single import prompt
from manyhands import LocalCluster

NEW_TOKENS, ROUNDS = 100, 3
PLANS = ("1", "1/1", "1/1/1", "1/1/1/1", "1,1", "1,1,1", "1,1,1,1", "1,1/1,1")


class Token(NamedTuple):
    """Seconds of one token at the client, median and best round, and of its way through the stages."""

    median_s: float
    best_s: float
    blocks_s: float
    sums_s: float


def measure(plan: str) -> Token:
    """Decode some rounds under a plan; the parts are means over all of them."""
    folder = make_checkpoint(SHAPES["free"], scratch("free"), torch.float32)
    with LocalCluster(folder, plan=plan) as cluster:
        client = cluster.client()
        client.generate(prompt(8), max_tokens=20, ignore_eos=True)
        times = []
        for _ in range(ROUNDS):
            done = client.generate(prompt(8), max_tokens=NEW_TOKENS + 1, ignore_eos=True)
            times.append((done.timings.total_s - done.timings.first_token_s) / NEW_TOKENS)
        time.sleep(1.0)  # the next heartbeat carries the counts
        blocks_s, sums_s = parts(cluster.status())
    return Token(statistics.median(times), min(times), blocks_s, sums_s)


def parts(status: dict[str, Any]) -> tuple[float, float]:
    """Return seconds a step in blocks and in sums, of the hubs of all stages together."""
    workers = {worker["name"]: worker for worker in status["workers"]}
    hubs = [workers[stage["hub"]] for stage in status["plan"]["stages"]]
    sums_s = sum(hub["step_s"] * hub["sums_share"] for hub in hubs)
    return sum(hub["step_s"] for hub in hubs) - sums_s, sums_s


def main() -> None:
    """Measure plans of one to four workers; the difference to one worker is the price of the way."""
    layers = SHAPES["free"].layers
    rows = []
    alone_s = 0.0
    for plan in PLANS:
        token = measure(plan)
        alone_s = alone_s or token.median_s
        rest_s = token.median_s - token.blocks_s - token.sums_s
        parts_s = (token.median_s, token.best_s, token.blocks_s, token.sums_s, rest_s)
        extra_s = (token.median_s - alone_s) / layers
        rows.append((plan, *(f"{1e3 * part_s:.2f}" for part_s in parts_s), f"{1e6 * extra_s:.0f}"))
    table(
        f"(c) Overhead of the way, {layers} layers of hidden {SHAPES['free'].hidden}, ms a token",
        ("plan", "median", "best round", "blocks", "sums", "rest", "us a layer beyond one worker"),
        rows,
    )


if __name__ == "__main__":
    main()
