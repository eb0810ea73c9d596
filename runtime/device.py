"""Measures what this machine can give: device, cores, memory, inside the limits of its control groups.

Knows nothing of models or of other machines. Files are read below `root`, so that tests can bring their own.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from protocol.errors import ConfigInvalid

ROOT = Path("/")
UNLIMITED_BYTES = 2**60
"""Control groups v1 write "no limit" as a number near 2**63."""


class DeviceFacts(NamedTuple):
    """What a worker tells of its machine; `device` is cpu, cuda or mps, bytes are those of that device's memory."""

    system: str
    machine: str
    cores: int
    memory_bytes: int
    available_bytes: int
    device: str
    torch: str


class Memory(NamedTuple):
    """Bytes in all, and bytes that may still be taken."""

    total_bytes: int
    available_bytes: int


def pick_device(name: str) -> torch.device:
    """Return the device for "auto", "cpu", "mps", "cuda" or "cuda:N"; raises ConfigInvalid when it is not here."""
    kind, _, number = name.partition(":")
    if name == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name in ("auto", "cpu", "mps", "cuda") or (kind == "cuda" and number.isdecimal()):
        count = torch.cuda.device_count() if kind == "cuda" else int(kind == "cpu" or torch.backends.mps.is_available())
        if int(number or 0) < count:
            return torch.device(kind, int(number or 0)) if kind == "cuda" else torch.device(kind)
        raise ConfigInvalid(f"device {name!r} is not on this machine", remedy="use --device cpu or auto")
    raise ConfigInvalid(f"device {name!r:.40} is not auto, cpu, mps, cuda or cuda:N")


def num_threads(root: Path = ROOT) -> int:
    """Return how many threads are worth starting: cores we may run on, cut to the CPU quota, at least 1."""
    quota = cpu_quota(root)
    cores = _num_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def measure(device: torch.device, root: Path = ROOT) -> DeviceFacts:
    """Return the facts of this machine and of the device chosen on it."""
    memory = host_memory(root)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory = Memory(total, free)
    return DeviceFacts(
        system=platform.system().lower(),
        machine=platform.machine().lower(),
        cores=num_threads(root),
        memory_bytes=memory.total_bytes,
        available_bytes=memory.available_bytes,
        device=device.type,
        torch=str(torch.__version__),
    )


def host_memory(root: Path = ROOT) -> Memory:
    """Return the host's memory, cut to the tightest control group above this process."""
    host = psutil.virtual_memory()
    total, available = host.total, host.available
    for folder, v2 in _groups("memory", root):
        limit = _read_int(folder / ("memory.max" if v2 else "memory.limit_in_bytes"))
        used = _read_int(folder / ("memory.current" if v2 else "memory.usage_in_bytes"))
        if limit is None or limit >= UNLIMITED_BYTES:
            continue
        total = min(total, limit)
        if used is not None:  # file pages count as used, but the kernel gives the inactive ones back
            available = min(available, max(0, limit - used + _inactive_file_bytes(folder, v2)))
    return Memory(total, min(total, available))


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return the tightest CPU quota of the control groups above this process, in cores; None without one."""
    quotas = []
    for folder, v2 in _groups("cpu", root):
        if v2:
            words = (_read_text(folder / "cpu.max") or "max").split()
            quota, period = (_to_int(words[0]), _to_int(words[1])) if len(words) == 2 else (None, None)
        else:
            quota, period = _read_int(folder / "cpu.cfs_quota_us"), _read_int(folder / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            quotas.append(quota / period)
    return min(quotas, default=None)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS or Windows
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _groups(controller: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield (folder, is version 2) of each control group from ours up to the mount, whose limits all hold.

    Inside a container the path in /proc may not exist below the mount; then only the folders that do are read.
    """
    mounts = root / "sys/fs/cgroup"
    for line in (_read_text(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if names and controller not in names.split(","):
            continue
        top = mounts / controller if names else mounts
        parts = Path(path.strip("/")).parts
        for depth in range(len(parts), -1, -1):
            folder = top.joinpath(*parts[:depth])
            if folder.is_dir():
                yield folder, not names


def _inactive_file_bytes(folder: Path, v2: bool) -> int:
    name = "inactive_file" if v2 else "total_inactive_file"
    for line in (_read_text(folder / "memory.stat") or "").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return _to_int(value) or 0
    return 0


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:  # no such limit on this system, or not ours to read: then it does not bind us
        return None


def _read_int(path: Path) -> int | None:
    return _to_int(_read_text(path) or "")


def _to_int(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.removeprefix("-").isdecimal() else None
