"""(e) Models larger than memory: the contract under a control group, against accelerate, and by budget and format."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import formats
from benchmarks.budgeted import FIXED_BYTES, MB, Run, offload, run, weights
from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.held import MemoryGroup
from benchmarks.report import scratch, table, where
from benchmarks.single import prompt
from manyhands import LocalCluster


def contract() -> None:
    """1B bf16 in a group of base + 30 % of the weights, beside the unbounded run."""
    free = run("1b", "bfloat16", None)
    budget = int(free.worker["base_bytes"] + 0.30 * weights("bfloat16")) + 250 * MB  # KV arena and workspace
    group = MemoryGroup.make("manyhands-bench", budget)
    held = run("1b", "bfloat16", budget, group=group)
    if group is not None:
        group.remove()
    worker = held.worker
    table(
        "(e1) 1B shape, bf16, one worker held by a control group",
        ("limit MB", "predicted MB", "peak MB", "killed", "same tokens", "s a token", "unbounded s"),
        [
            (
                budget // MB,
                worker["predicted_bytes"] // MB,
                worker["peak_bytes"] // MB,
                held.kills,
                held.tokens == free.tokens,
                f"{held.token_s:.2f}",
                f"{free.token_s:.2f}",
            )
        ],
    )


def peaks() -> None:
    """The most each process held, after a prompt in the largest chunks, against what `status` predicted."""
    rows = []
    for dtype, memory, plan in (
        ("bfloat16", 1271 * MB, "1"),
        ("int8", 900 * MB, "1"),
        ("int4", 900 * MB, "1"),
        ("bfloat16", 700 * MB, "1,1,1"),
    ):
        one = run("1b", dtype, memory, plan=plan, new=3, length=700)
        for worker in one.workers:
            peak, predicted = worker["peak_bytes"], worker["predicted_bytes"]
            numbers = (
                f"{memory / MB:.0f}",
                f"{predicted / MB:.0f}",
                f"{peak / MB:.0f}",
                f"{peak / predicted - 1:+.1%}",
            )
            rows.append((dtype, plan, worker["role"], *numbers))
    table(
        "(e1) Peaks after a prompt of 700 tokens, 1B shape",
        ("format", "plan", "worker", "budget MB", "predicted MB", "peak MB", "off"),
        rows,
    )


def against_accelerate(dtypes: Sequence[str] = formats.FORMATS) -> None:
    """30 % of each one's weights in memory, and as many bytes; weights on disk alone, and all in the page cache."""
    rows = []
    keep = int(0.30 * weights("bfloat16"))
    compute_s = {dtype: run("1b", dtype, None).token_s for dtype in dtypes}
    for page_cache in ("cold", "warm"):
        for dtype in dtypes:
            theirs = offload(keep, keep + 900 * MB if page_cache == "cold" else 0)
            budgets = {"30 % of its own": int(0.30 * weights(dtype)), "as accelerate's": keep}
            for words, kept in list(budgets.items())[: 1 + (dtype != "bfloat16")]:
                ours = run("1b", dtype, FIXED_BYTES + kept, page_cache=page_cache)
                rows.append((page_cache, dtype, words, *compared(ours, theirs, compute_s[dtype])))
    table(
        "(e2) Beside accelerate's disk offload (bf16), 1B shape, 30 % of its weights in memory, one thread",
        ("page cache", "ours", "weights in memory", "s a token", "accelerate", "ratio", "MB read", "MB/s",
         "all in memory, s", "disk, MB/s", "of the bound", "waiting", "peak MB"),
        rows,
    )  # fmt: skip


def compared(ours: Run, theirs: dict[str, Any], compute_s: float) -> tuple[str, ...]:
    """Return the cells of one run beside accelerate's."""
    return (
        f"{ours.token_s:.2f}",
        f"{theirs['token_s']:.2f}",
        f"{theirs['token_s'] / ours.token_s:.1f}x",
        f"{ours.worker['streamed_bytes_per_step'] / MB:.0f}",
        f"{ours.worker['disk_bytes_per_s'] / MB:.0f}",
        f"{compute_s:.2f}",
        f"{ours.disk_rate / MB:.0f}",
        f"{ours.token_s / ours.bound_s(compute_s):.2f}x",
        f"{ours.worker['stalled_share']:.0%}",
        f"{ours.worker['peak_bytes'] // MB} / {theirs['peak_bytes'] // MB}",
    )


def slow_disk(dtypes: Sequence[str] = formats.FORMATS, bytes_per_s: int = 80 * MB) -> None:
    """A disk held to 80 MB/s, against streamed bytes over that rate."""
    rows = []
    for dtype in dtypes:
        one = run("1b", dtype, FIXED_BYTES + int(0.30 * weights(dtype)), new=3, disk_rate_held=bytes_per_s)
        read = one.worker["streamed_bytes_per_step"]
        rows.append((dtype, f"{read / MB:.0f}", f"{one.token_s:.2f}", f"{one.token_s / (read / bytes_per_s):.2f}x"))
    table(
        f"(e2) The same on a disk held to {bytes_per_s // MB} MB/s",
        ("format", "MB read a token", "s a token", "of the bound"),
        rows,
    )


def budgets() -> None:
    """Token time by budget, from 20 % to 100 % of the weights."""
    rows = []
    whole = weights("bfloat16")
    for percent in (20, 40, 60, 80, 100):
        one = run("1b", "bfloat16", FIXED_BYTES + whole * percent // 100 + (200 * MB if percent == 100 else 0))
        read = one.worker["streamed_bytes_per_step"] / MB
        rows.append((f"{percent} %", f"{read:.0f}", f"{one.token_s:.2f}", "#" * round(one.token_s * 20)))
    table("(e3) Pin what fits: 1B shape, bf16", ("weights in memory", "MB read a token", "s a token", ""), rows)


def large() -> None:
    """An 8B shape in int4 on one worker of 1 GB, and on four of 600 MB."""
    rows = []
    for memory, plan in ((1000 * MB, "1"), (600 * MB, "1/1/1/1")):
        one = run("8b", "int4", memory, plan=plan, new=4)
        peak = max(worker["peak_bytes"] for worker in one.workers) // MB
        read = sum(worker["streamed_bytes_per_step"] for worker in one.workers) / MB
        rows.append((plan, memory // MB, f"{one.token_s:.1f}", f"{read:.0f}", peak))
    table("(e4) 8B shape, int4", ("plan", "budget MB each", "s a token", "MB read a token", "largest peak MB"), rows)


def steadiness(minutes: float = 10.0) -> None:
    """Resident memory while decoding for minutes on end."""
    folder = make_checkpoint(SHAPES["1b"], scratch("1b-bfloat16"), torch.bfloat16)
    samples: list[tuple[float, float]] = []
    with LocalCluster(
        folder, plan="1", dtype="int8", memory="900MB", cache_dir=scratch("window-1b-int8"), startup_timeout_s=600
    ) as cluster:
        client = cluster.client(timeout_s=60)
        client.generate(prompt(300), max_tokens=8, ignore_eos=True)
        began = time.monotonic()
        while time.monotonic() - began < 60 * minutes:
            client.generate(prompt(64), max_tokens=20, ignore_eos=True)
            samples.append((time.monotonic() - began, cluster.status()["workers"][0]["resident_bytes"] / MB))
    mean_t = sum(t for t, _ in samples) / len(samples)
    mean_m = sum(m for _, m in samples) / len(samples)
    spread = sum((t - mean_t) ** 2 for t, _ in samples)
    slope = sum((t - mean_t) * (m - mean_m) for t, m in samples) / spread * 60
    table(
        f"(e5) {minutes:g} minutes of decoding, int8, 900 MB",
        ("requests", "resident MB, first", "last", "slope MB/min"),
        [(len(samples), f"{samples[0][1]:.1f}", f"{samples[-1][1]:.1f}", f"{slope:.3f}")],
    )


PARTS: dict[str, Callable[[], None]] = {
    "contract": contract,
    "peaks": peaks,
    "budgets": budgets,
    "large": large,
    "steadiness": steadiness,
}


BY_FORMAT: dict[str, Callable[[Sequence[str]], None]] = {
    "accelerate": against_accelerate,
    "slow-disk": slow_disk,
    "formats": lambda dtypes: formats.main(1, dtypes),
}


def main(words: Sequence[str]) -> None:
    """Run the parts that were named, or all; formats that are named too are the only ones measured."""
    print(f"Measured on {where()}, load {os.getloadavg()[0]:.1f}: python -m benchmarks.window {' '.join(words)}")
    dtypes = [word for word in words if word in formats.FORMATS] or formats.FORMATS
    for name in [word for word in words if word not in formats.FORMATS] or [*PARTS, *BY_FORMAT]:
        if name in BY_FORMAT:
            BY_FORMAT[name](dtypes)
        else:
            PARTS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
