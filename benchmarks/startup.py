"""(d) From `up` to ready: the coordinator's hashing, the tiles' way to the worker, loading; cold and warm cache."""

from __future__ import annotations

import shutil
import time

import torch

from benchmarks.checkpoints import SHAPES, make_checkpoint
from benchmarks.report import scratch, table
from manyhands import LocalCluster


def ready_s(shape: str, dtype: str, plan: str, *, cold: bool) -> float:
    """Return the seconds until the cluster is ready."""
    folder = make_checkpoint(SHAPES[shape], scratch(f"{shape}-{dtype}"), getattr(torch, dtype))
    cache = scratch(f"start-{shape}-{dtype}")
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
    began = time.perf_counter()
    with LocalCluster(folder, plan=plan, dtype=dtype, cache_dir=cache, startup_timeout_s=300):
        return time.perf_counter() - began


def main() -> None:
    """Measure the small and the 1B shape."""
    rows = []
    for shape, dtype, plan in (("free", "float32", "1,1/1"), ("1b", "bfloat16", "1"), ("1b", "bfloat16", "1/1")):
        cold = ready_s(shape, dtype, plan, cold=True)
        warm = ready_s(shape, dtype, plan, cold=False)
        rows.append((shape, dtype, plan, f"{cold:.1f}", f"{warm:.1f}"))
    table(
        "(d) Start-up to ready; with a warm cache nothing is hashed or fetched",
        ("shape", "dtype", "plan", "cold cache, s", "warm cache, s"),
        rows,
    )


if __name__ == "__main__":
    main()
