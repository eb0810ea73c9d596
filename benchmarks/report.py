"""Prints results as Markdown tables under a line that says where and from what they were measured."""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).parent.parent


def scratch(name: str) -> Path:
    """Return a folder for checkpoints and caches that later runs use again ($MANYHANDS_BENCH, or the temporary one)."""
    return Path(os.environ.get("MANYHANDS_BENCH", tempfile.gettempdir())) / "manyhands-bench" / name


def where() -> str:
    """Return hardware, versions and commit in one line."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    model = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    memory = psutil.virtual_memory().total / 2**30
    return f"{model}, {psutil.cpu_count()} cores, {memory:.0f} GiB, torch {torch.__version__}, commit {commit}"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print one table."""
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |", flush=True)
