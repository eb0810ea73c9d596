"""How this machine is, for its owner's limits: battery, heat, and what other programs use of it.

Knows nothing of limits. Reading may take a second; call it in a thread.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import psutil

from worker.limits import Readings

SMI_DEADLINE_S: Final = 10.0
# Chips whose temperature is that of the processor; where none of them is told, the hottest of all counts.
PROCESSOR_CHIPS: Final = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "cpu-thermal", "soc_thermal", "soc-thermal")
_log = logging.getLogger(__name__)


class CpuTimes(NamedTuple):
    """Seconds since the machine started, over all processors: in all, busy, and busy with this process."""

    total_s: float
    busy_s: float
    own_s: float


class Sensors:
    """Reads the sensors; one thread at a time. `wants_gpu`: NVIDIA's tool is asked too, which takes a second."""

    def __init__(self, *, wants_gpu: bool) -> None:
        self._own = psutil.Process()
        self._smi = shutil.which("nvidia-smi") if wants_gpu else None
        self._before: CpuTimes | None = None

    def read(self) -> Readings:
        """Return how the machine is now; processors: since the last call, unknown at the first one."""
        plugged, percent = _battery()
        clock = time.localtime()
        return Readings(
            minute=clock.tm_hour * 60 + clock.tm_min,
            on_battery=None if plugged is None else not plugged,
            battery_percent=percent,
            temperature_c=_temperature(),
            cpu_busy=self._cpu(),
            gpu_busy=self._gpu(),
        )

    def _cpu(self) -> float | None:
        before, self._before = self._before, _cpu_times(self._own)
        return None if before is None else busy_with_others(before, self._before)

    def _gpu(self) -> float | None:
        if self._smi is None:
            return None
        try:
            told = subprocess.run(
                [self._smi, "pmon", "-c", "1", "-s", "u"], capture_output=True, text=True, timeout=SMI_DEADLINE_S,
                check=True,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError) as error:
            _log.debug("nvidia-smi: %s", error)
            return None
        return gpu_busy_with_others(told.stdout, self._own.pid)


def busy_with_others(before: CpuTimes, after: CpuTimes) -> float | None:
    """Return the percentage of all processors that other processes used; None when no time has passed."""
    total_s = after.total_s - before.total_s
    if total_s <= 0:
        return None
    others_s = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return 100 * min(1.0, max(0.0, others_s / total_s))


def gpu_busy_with_others(told: str, own_pid: int) -> float | None:
    """Return the percentage of the busiest GPU that other processes use, from what `nvidia-smi pmon -s u` prints.

    None for a table without the columns for GPU, process id and use. A process that does not say how much it uses
    counts as idle.
    """
    lines = told.splitlines()
    columns = lines[0].lstrip("# ").split() if lines else []
    if not {"gpu", "pid", "sm"} <= set(columns):
        return None
    at_gpu, at_pid, at_use = (columns.index(name) for name in ("gpu", "pid", "sm"))
    used: dict[str, float] = {}
    for line in lines[1:]:
        cells = line.split()
        if line.startswith("#") or len(cells) <= max(at_gpu, at_pid, at_use):
            continue
        if cells[at_pid] != str(own_pid) and cells[at_use].isdigit():
            used[cells[at_gpu]] = used.get(cells[at_gpu], 0.0) + float(cells[at_use])
    return min(100.0, max(used.values(), default=0.0))


def hottest(chips: Mapping[str, Sequence[Any]]) -> float | None:
    """Return the temperature of the processor in degrees Celsius, from what psutil tells; None when it tells none."""
    named = [entry.current for name in PROCESSOR_CHIPS for entry in chips.get(name, ())]
    every = named or [entry.current for entries in chips.values() for entry in entries]
    return max((float(degrees) for degrees in every if degrees is not None), default=None)


def _battery() -> tuple[bool | None, float | None]:
    """Return whether the machine is on mains, and how full its battery is; without a battery it is on mains."""
    if not hasattr(psutil, "sensors_battery"):
        return None, None
    try:
        battery = psutil.sensors_battery()
    except (OSError, ValueError) as error:  # ValueError: a driver that tells nonsense
        _log.debug("battery: %s", error)
        return None, None
    return (True, None) if battery is None else (battery.power_plugged, battery.percent)


def _temperature() -> float | None:
    if not hasattr(psutil, "sensors_temperatures"):  # macOS, Windows
        return None
    try:
        return hottest(psutil.sensors_temperatures())
    except (OSError, ValueError) as error:
        _log.debug("temperature: %s", error)
        return None


def _cpu_times(own: psutil.Process) -> CpuTimes:
    """Guest time is part of user time on Linux, so it is not added again."""
    told, mine = psutil.cpu_times()._asdict(), own.cpu_times()
    total_s = sum(seconds for name, seconds in told.items() if not name.startswith("guest"))
    return CpuTimes(total_s, total_s - told["idle"] - told.get("iowait", 0.0), mine.user + mine.system)
