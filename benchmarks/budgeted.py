"""One cluster under a memory budget, with a cold or a warm page cache and a disk held back; and accelerate's offload.

Knows nothing of what is compared with what.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.held import DiskGroup, MemoryGroup, disk_rate, drop_page_cache, warm_page_cache
from benchmarks.report import ROOT, scratch
from benchmarks.single import prompt
from manyhands import LocalCluster

NEW_TOKENS = 10
MB = 10**6
FIXED_BYTES = 530 * MB  # the process itself, KV arena and one step's temporaries of the 1B shape


class HeldCluster(LocalCluster):
    """A local cluster whose workers live in a control group, and may be told what to do with the page cache."""

    group: MemoryGroup | None = None
    page_cache = "use"

    def _start_worker(self, name: str, link: str) -> None:
        self._for_workers["page_cache"] = self.page_cache
        if self.group is None:
            super()._start_worker(name, link)
            return
        self.group.enter()
        try:
            super()._start_worker(name, link)
        finally:
            self.group.leave()


class Run(NamedTuple):
    """What one cluster did."""

    tokens: tuple[int, ...]
    token_s: float
    workers: list[dict[str, Any]]
    kills: int
    disk_rate: float = float("inf")  # bytes a second, measured before and after the run

    @property
    def worker(self) -> dict[str, Any]:
        """The first worker's status."""
        return self.workers[0]

    def bound_s(self, compute_s: float) -> float:
        """What a token takes at least: computing it, or reading what it streams at the disk's rate.

        A virtual disk may give more to the worker than to the reader beside it: the better rate counts.
        """
        rate = max(self.disk_rate, float(self.worker["disk_bytes_per_s"]))
        return max(compute_s, float(self.worker["streamed_bytes_per_step"]) / rate)


def run(
    shape: str,
    dtype: str,
    memory: int | None,
    *,
    plan: str = "1",
    group: MemoryGroup | None = None,
    new: int = NEW_TOKENS,
    page_cache: str = "cold",
    disk_rate_held: int = 0,
    length: int = 8,
) -> Run:
    """Decode some tokens under a budget in bytes (None: all that is free).

    `page_cache`: cold or warm; workers then fill it as accelerate does, or the kernel would soon take it back.
    `disk_rate_held`: bytes a second that the disk may give.
    """
    folder = make_checkpoint(SHAPES[shape], scratch(f"{shape}-bfloat16"), torch.bfloat16)
    cache = scratch(f"window-{shape}-{dtype}")
    HeldCluster.group, HeldCluster.page_cache = group, "fill" if page_cache == "warm" else "use"
    disk = DiskGroup.make("manyhands-disk") if disk_rate_held else None
    with HeldCluster(
        folder, plan=plan, dtype=dtype, memory=str(memory) if memory else None, cache_dir=cache, startup_timeout_s=600
    ) as cluster:
        client = cluster.client(timeout_s=60)
        blocks = _blocks(cache)
        if memory and page_cache == "warm":
            warm_page_cache(blocks)
        elif memory and not drop_page_cache():
            sys.exit("the page cache can't be dropped here")
        is_rated = memory and page_cache == "cold" and blocks and not disk_rate_held
        rate = disk_rate(blocks) if is_rated else float(disk_rate_held or "inf")
        if disk is not None:
            for worker in cluster.workers:
                disk.take(worker.pid)
            disk.hold(cache, disk_rate_held)
        client.generate(prompt(8), max_tokens=2, ignore_eos=True)
        done = client.generate(prompt(length), max_tokens=new + 1, ignore_eos=True)
        time.sleep(1.0)  # the next heartbeat carries the counts
        status = cluster.status()
        kills = group.kills() if group else 0
        if is_rated:  # virtual disks drift: before and after
            rate = (rate + disk_rate(blocks)) / 2
    if disk is not None:
        disk.remove()
    token_s = (done.timings.total_s - done.timings.first_token_s) / new
    return Run(done.token_ids, token_s, status["workers"], kills, rate)


def _blocks(cache: Path) -> list[Path]:
    """The largest files of a cache, which are the blocks."""
    files = [path for path in cache.glob("**/tiles/*/*") if path.suffix != ".part"]
    largest = max((path.stat().st_size for path in files), default=0)
    return sorted(path for path in files if path.stat().st_size >= largest / 8)


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
