"""The settings of a worker.

Knows nothing of how they are used; imports no torch, so that they can be shown without it.
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from protocol.settings import NumBytesText, setting
from runtime.page_cache import PageCache
from worker.limits import Limits, parse_hours

POSITIVE = ("connect_timeout_s", "redial_first_s", "step_timeout_s", "link_timeout_s", "hold_s", "leave_timeout_s")
DEVICE_WORDS = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What the owner of a device decides; defaults suit a laptop that joins by link."""

    link: str = setting("", "join link; not needed where this worker was let in before", secret=True)
    name: str = setting("", "this worker's name; default: the host's name")
    state_dir: Path | None = setting(None, "folder of keys and identities; default: $XDG_STATE_HOME/manyhands/worker")
    cache_dir: Path | None = setting(None, "folder of tiles; default: $XDG_CACHE_HOME/manyhands/worker")
    cache_limit: NumBytesText = setting("20GB", "most that tiles may take on disk")
    spool_limit: NumBytesText = setting(
        "4GB", "most on disk for keys and values between plans, and inputs kept for later stages"
    )
    page_cache: PageCache = setting(
        PageCache.USE,
        "what streaming does with the page cache: use what is there, fill it and compute in it, or off",
    )
    memory: NumBytesText = setting(
        "80%", "budget of weights, caches and process together; % is of what is available now"
    )
    device: str = setting("auto", "where to compute: auto, cpu, cuda, cuda:N or mps")
    threads: int = setting(0, "threads to compute with; 0: one for each core we may use")
    listen: str = setting("tcp://0.0.0.0:*", "where neighbours may connect to")
    tile_listen: str = setting(
        "auto", "where other workers may fetch tiles from; auto: any port of listen's host; none: nowhere"
    )
    advertise: tuple[str, ...] = setting((), "HOST or HOST:PORT to tell neighbours; default: this machine's addresses")
    connect_timeout_s: float = setting(30.0, "how long the first connection may take")
    redial_first_s: float = setting(0.5, "first wait before dialling a lost coordinator again")
    redial_most_s: float = setting(10.0, "longest wait before dialling a lost coordinator again")
    step_timeout_s: float = setting(30.0, "how long a step may wait for a neighbour that sends nothing")
    link_timeout_s: float = setting(60.0, "how long neighbours may take to connect once all is loaded")
    hold_s: float = setting(600.0, "how long to keep what a plan left in memory while no new one comes")
    pause_on_battery: bool = setting(False, "compute nothing while this machine runs on battery")
    battery_below: float = setting(0.0, "compute nothing on battery below this charge, in percent; 0: no limit")
    max_temperature_c: float = setting(0.0, "compute nothing while the processor is hotter, in Celsius; 0: no limit")
    max_cpu_busy: float = setting(
        0.0, "compute nothing while other programs use more of the processors, in percent; 0: no limit"
    )
    max_gpu_busy: float = setting(
        0.0, "compute nothing while other programs use more of the GPU (NVIDIA), in percent; 0: no limit"
    )
    hours: tuple[str, ...] = setting((), "when to compute, local time, e.g. 22:00-07:00; default: always")
    leave_timeout_s: float = setting(20.0, "how long handing over may take before this worker ends all the same")
    exit_on_stdin_close: bool = setting(False, "end when standard input is closed (for a parent process)")

    def __post_init__(self) -> None:
        for name in (
            "connect_timeout_s",
            "redial_first_s",
            "step_timeout_s",
            "link_timeout_s",
            "hold_s",
            "leave_timeout_s",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if self.redial_most_s < self.redial_first_s:
            raise ValueError(f"redial_most_s {self.redial_most_s} is below redial_first_s {self.redial_first_s}")
        if not DEVICE_WORDS.fullmatch(self.device):
            raise ValueError(f"device {self.device!r:.40} is not auto, cpu, cuda, cuda:N or mps")
        if not 0 <= self.threads <= 1024:
            raise ValueError(f"threads {self.threads} is outside [0, 1024]")
        self.limits()  # checks the rest

    def limits(self) -> Limits:
        """Return when the owner lets this device compute; raises ValueError for values that make no sense."""
        return Limits(
            pause_on_battery=self.pause_on_battery,
            battery_below=self.battery_below,
            max_temperature_c=self.max_temperature_c,
            max_cpu_busy=self.max_cpu_busy,
            max_gpu_busy=self.max_gpu_busy,
            hours=tuple(parse_hours(text) for text in self.hours),
        )

    @property
    def worker_name(self) -> str:
        """The name to ask for: as set, or the host's, cut to what a name may hold."""
        if self.name:
            return self.name
        short = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname().split(".")[0]).strip("-._")
        return short[:48] or "worker"

    @property
    def tile_address(self) -> str:
        """Where the tile server listens; empty when there is to be none."""
        if self.tile_listen == "auto":
            return f"{self.listen.rpartition(':')[0]}:*"
        return "" if self.tile_listen == "none" else self.tile_listen

    @property
    def state_folder(self) -> Path:
        """Where keys and identities are kept."""
        return self.state_dir or _xdg("XDG_STATE_HOME", ".local/state") / "manyhands" / "worker"

    @property
    def cache_folder(self) -> Path:
        """Where tiles are kept."""
        return self.cache_dir or _xdg("XDG_CACHE_HOME", ".cache") / "manyhands" / "worker"


def _xdg(variable: str, fallback: str) -> Path:
    given = os.environ.get(variable, "")
    return Path(given) if given.startswith("/") else Path.home() / fallback
