"""Keeps asking whether the owner's limits let this worker compute now.

Knows nothing of the coordinator: heartbeats carry `reason` to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from protocol.errors import ConfigInvalid
from worker.limits import Guard, Limits, Readings
from worker.sensors import Sensors

LOOK_EVERY_S: Final = 3.0
_log = logging.getLogger(__name__)


class Owner:
    """The owner's limits at work; `reason` says why not to compute now, empty: it may."""

    def __init__(self, limits: Limits, sensors: Sensors | None = None) -> None:
        """Take a first look; raises ConfigInvalid when a limit is set that can't be measured here."""
        self.reason = ""
        self._limits = limits
        self._guard = Guard(limits)
        self._sensors = sensors or Sensors(wants_gpu=limits.max_gpu_busy > 0)
        if limits != Limits():
            first = self._sensors.read()
            require_measurable(limits, first)
            self._take(first)

    async def watch(self) -> None:
        """Look every few seconds, for ever; returns at once when there is nothing to look at."""
        if self._limits == Limits():
            return
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._take(await asyncio.to_thread(self._sensors.read))

    def _take(self, readings: Readings) -> None:
        before, self.reason = self.reason, self._guard.look(readings, time.monotonic())
        if self.reason and not before:
            _log.info("pausing: %s", self.reason)
        elif before and not self.reason:
            _log.info("going on: it is no longer so that %s", before)


def require_measurable(limits: Limits, readings: Readings) -> None:
    """Raise ConfigInvalid, naming the limit, when the owner counts on one that can't be measured on this machine."""
    for name, reading in (("max_temperature_c", readings.temperature_c), ("max_gpu_busy", readings.gpu_busy)):
        if getattr(limits, name) and reading is None:
            raise ConfigInvalid(
                f"{name} is set, but this machine does not tell",
                remedy=f"leave {name} out" + ("; it needs nvidia-smi" if name == "max_gpu_busy" else ""),
                phase="start",
            )
