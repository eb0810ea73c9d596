"""(e) Models larger than memory: the contract under a control group, against accelerate, and by budget and format."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any, NamedTuple

import torch

from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.held import MemoryGroup
from benchmarks.report import ROOT, scratch, table
from benchmarks.single import prompt
from manyhands import LocalCluster

NEW_TOKENS = 10
MB = 10**6


class HeldCluster(LocalCluster):
    """A local cluster whose workers live in a control group."""

    group: MemoryGroup | None = None

    def _start_worker(self, name: str, settings: dict[str, str], *, trusted: bool) -> None:
        if self.group is None:
            super()._start_worker(name, settings, trusted=trusted)
            return
        self.group.enter()
        try:
            super()._start_worker(name, settings, trusted=trusted)
        finally:
            self.group.leave()


class Run(NamedTuple):
    """What one cluster did."""

    tokens: tuple[int, ...]
    token_s: float
    workers: list[dict[str, Any]]
    kills: int

    @property
    def worker(self) -> dict[str, Any]:
        """The first worker's status."""
        return self.workers[0]

    @property
    def bound_s(self) -> float:
        """What reading alone takes: streamed bytes over the rate at which they were read."""
        rate = self.worker["disk_bytes_per_s"]
        return float(self.worker["streamed_bytes_per_step"] / rate) if rate else 0.0


def run(
    shape: str,
    dtype: str,
    memory: int | None,
    *,
    plan: str = "1",
    group: MemoryGroup | None = None,
    new: int = NEW_TOKENS,
) -> Run:
    """Decode some tokens under a budget in bytes (None: all that is free)."""
    folder = make_checkpoint(SHAPES[shape], scratch(f"{shape}-bfloat16"), torch.bfloat16)
    HeldCluster.group = group
    with HeldCluster(
        folder, plan=plan, dtype=dtype, memory=str(memory) if memory else None,
        cache_dir=scratch(f"window-{shape}-{dtype}"), startup_timeout_s=600,
    ) as cluster:  # fmt: skip
        client = cluster.client(timeout_s=60)
        client.generate(prompt(8), max_tokens=2, ignore_eos=True)
        done = client.generate(prompt(8), max_tokens=new + 1, ignore_eos=True)
        time.sleep(1.0)  # the next heartbeat carries the counts
        status = cluster.status()
        kills = group.kills() if group else 0
    return Run(done.token_ids, (done.timings.total_s - done.timings.first_token_s) / new, status["workers"], kills)


def offload(weight_bytes: int, limit_bytes: int) -> dict[str, Any]:
    """The same with accelerate."""
    words = [scratch("1b-bfloat16"), weight_bytes, 1, NEW_TOKENS, scratch("offload"), limit_bytes]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.offload", *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return {"token_s": float("nan"), "peak_bytes": 0, "held": bool(limit_bytes), "error": done.stderr[-300:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def weights(dtype: str) -> int:
    """Bytes of the 1B shape's weights in a format."""
    per_weight = {"bfloat16": 2.0, "int8": 1.0, "int4": 0.65}[dtype]
    return int(SHAPES["1b"].parameters * per_weight)


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


def against_accelerate() -> None:
    """The same memory for both: 30 % of the bf16 weights pinned or kept."""
    rows = []
    keep = int(0.30 * weights("bfloat16"))
    for cold in (True, False):
        theirs = offload(keep, keep + 900 * MB if cold else 0)
        for dtype in ("bfloat16", "int8", "int4"):
            ours = run("1b", dtype, 240 * MB + 290 * MB + int(0.30 * weights(dtype)))
            rows.append(
                (
                    "cold" if cold else "warm",
                    dtype,
                    f"{ours.token_s:.2f}",
                    f"{theirs['token_s']:.2f}",
                    f"{theirs['token_s'] / ours.token_s:.1f}x",
                    f"{ours.worker['streamed_bytes_per_step'] / MB:.0f}",
                    f"{ours.worker['disk_bytes_per_s'] / MB:.0f}",
                    f"{ours.token_s / max(ours.bound_s, 1e-9):.2f}x",
                    f"{ours.worker['stalled_share']:.0%}",
                )
            )
    table(
        "(e2) Beside accelerate's disk offload (bf16), 1B shape, 30 % of the weights in memory, one thread",
        ("page cache of accelerate", "ours", "s a token", "accelerate", "ratio", "MB read", "MB/s", "of the bound",
         "waiting"),
        rows,
    )  # fmt: skip


def budgets() -> None:
    """Token time by budget, from 20 % to 100 % of the weights."""
    rows = []
    whole = weights("bfloat16")
    for percent in (20, 40, 60, 80, 100):
        one = run("1b", "bfloat16", 240 * MB + 290 * MB + whole * percent // 100 + (200 * MB if percent == 100 else 0))
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


PARTS = {
    "contract": contract,
    "accelerate": against_accelerate,
    "budgets": budgets,
    "large": large,
    "steadiness": steadiness,
}


def main(names: list[str] | None = None) -> None:
    """Run the parts that were named, or all."""
    for name in names or list(PARTS):
        PARTS[name]()


if __name__ == "__main__":
    main(sys.argv[1:])
