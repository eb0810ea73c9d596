"""(i) A worker is killed in mid-answer: how long until the next token, and where the time goes.

    python -m benchmarks.recovery [--seeds 20] [--shapes demo,100m]

Three workers, each with a disk of its own; the victim is any but the head, plan, history and moment come from the seed.
`cold`: the survivors fetch the tiles that they lack. `spares`: they have them. `copies`: and the keys and values too.
`from zero` is what the same client would have waited had it lost its request: until the model serves again, and then
for the whole answer up to the token it was at, measured on the same survivors.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from benchmarks.checkpoints import SHAPES, Shape, make_checkpoint
from benchmarks.fleet import Fleet
from benchmarks.nursery import Nursery
from benchmarks.report import scratch, table, where
from manyhands.cluster import DEMO_MODEL

WORKERS: Final = ("worker-1", "worker-2", "worker-3")
PLANS: Final = ("1/1/1", "1,1/1", "1,1,1")
READY: Final[dict[str, dict[str, str]]] = {
    "cold": {},
    "spares": {"spares": "1"},
    "copies": {"spares": "1", "replicate_kv": "true"},
}
SETTLE_S: Final = 1.0  # nothing was written for so long: the spares are there
MORE_TOKENS: Final = 6  # after the crash
SHAPES["100m"] = Shape(
    hidden=768, layers=12, heads=12, kv_heads=4, intermediate=2048, vocab=32_000, tied=True
)  # as GPT-2's small sister with grouped heads; 0.1 B weights


class Crash(NamedTuple):
    """One crash and what followed, in seconds; the parts are the coordinator's, `total_s` the client's."""

    detect_s: float
    plan_s: float
    fetch_s: float
    load_s: float
    replay_s: float
    total_s: float
    prefill_s: float  # of the history, by those who are left
    from_zero_s: float
    fetched_bytes: int
    repeated: int


def crash(nursery: Nursery, model: Path, vocab: int, readiness: str, seed: int) -> Crash:
    """Kill a worker in mid-answer once, on a fresh cluster."""
    dice = random.Random(f"recovery {seed}")  # alike for all kinds of readiness
    plan, victim = dice.choice(PLANS), dice.choice(WORKERS[1:])
    prompt = [dice.randrange(3, vocab) for _ in range(dice.randint(64, 256))]
    at = dice.randint(8, 40)
    with Fleet(nursery, model, {"plan": plan, "probation_s": "0", **READY[readiness]}) as fleet:
        for name in WORKERS:
            fleet.start(name)
        fleet.until_ready(len(WORKERS))
        if READY[readiness]:
            until_disks_rest(fleet)
        tokens: list[int] = []
        arrivals: list[float] = []
        stream = fleet.client.generate(prompt, max_tokens=at + MORE_TOKENS, ignore_eos=True, stream=True)
        killed_at = 0.0
        for piece in stream:
            arrivals.append(time.monotonic())
            tokens += piece.token_ids
            if not killed_at and len(tokens) >= at:
                killed_at = time.monotonic()
                fleet.workers[victim].process.kill()
        asked_at = time.monotonic()
        story: dict[str, Any] = fleet.client.status()["recoveries"][-1]
        began_at = (asked_at + time.monotonic()) / 2 - story["ago_s"]
        # A step that was under way may still come back: the crash's pause is the longest one after it.
        ends = [one for one in arrivals if one > killed_at]
        pauses = {end - start: end for start, end in zip([killed_at, *ends], ends, strict=False)}
        next_at = pauses[max(pauses)]
        ready_at = began_at + story["plan_s"] + story["load_s"]
        history = prompt + tokens[:at]
        prefill = fleet.client.generate(history, max_tokens=1, ignore_eos=True)
        again = fleet.client.generate(prompt, max_tokens=at + 1, ignore_eos=True)
    return Crash(
        detect_s=began_at - killed_at,
        plan_s=story["plan_s"],
        fetch_s=max(0.0, story["load_s"] - story["worker_load_s"]),
        load_s=story["worker_load_s"],
        replay_s=story["replay_s"],
        total_s=next_at - killed_at,
        prefill_s=prefill.timings.first_token_s,
        from_zero_s=ready_at - killed_at + again.timings.total_s,
        fetched_bytes=story["fetched_bytes"],
        repeated=story["repeated"],
    )


def until_disks_rest(fleet: Fleet) -> None:
    """Wait until no worker has written tiles for a while: what was to be kept ready is there."""
    size, since = -1, time.monotonic()
    while time.monotonic() - since < SETTLE_S:
        now = sum(path.stat().st_size for path in fleet.folder.glob("worker-*/cache/tiles/**/*") if path.is_file())
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.1)


def measure(nursery: Nursery, shape: str, seeds: Sequence[int]) -> None:
    """Measure one model under every kind of readiness and print its table."""
    model, vocab = DEMO_MODEL, 2048
    if shape != "demo":
        vocab = SHAPES[shape].vocab
        model = make_checkpoint(SHAPES[shape], scratch(f"{shape}-float32"), torch.float32)
    rows = []
    for readiness in READY:
        crashes = [crash(nursery, model, vocab, readiness, seed) for seed in seeds]
        for percent in (50, 95):
            rows.append((readiness, f"p{percent}", *cells(crashes, percent)))
        met = sum(one.total_s <= 2 * one.prefill_s + 1.0 for one in crashes)
        print(f"{shape}, {readiness}: within 2 prefills + 1 s in {met} of {len(crashes)}", flush=True)
    table(
        f"(i) Crash to next token, {shape}, {len(seeds)} crashes each, milliseconds",
        ("tiles and KV", "", "detect", "plan", "fetch and link", "load", "replay", "in all", "prefill of the history",
         "from zero", "fetched MB", "positions repeated"),
        rows,
    )  # fmt: skip


def cells(crashes: Sequence[Crash], percent: int) -> list[str]:
    """Return the percentile of each part."""
    columns = list(zip(*crashes, strict=True))
    ms = [f"{1e3 * percentile(column, percent):.0f}" for column in columns[:-2]]
    return [*ms, f"{percentile(columns[-2], percent) / 1e6:.1f}", f"{percentile(columns[-1], percent):.0f}"]


def percentile(values: Sequence[float], percent: int) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return statistics.median(ordered) if percent == 50 else ordered[-(-len(ordered) * percent // 100) - 1]


def main() -> None:
    """Read the flags and run."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--seeds", type=int, default=20)
    flags.add_argument("--shapes", default="demo,100m")
    chosen = flags.parse_args()
    print(f"Measured on {where()}: python -m benchmarks.recovery {' '.join(sys.argv[1:])}")
    with Nursery() as nursery:
        for shape in chosen.shapes.split(","):
            measure(nursery, shape, range(chosen.seeds))


if __name__ == "__main__":
    main()
