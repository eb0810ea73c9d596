"""When the owner lets this device compute: limits and readings in, the reason for a pause out.

Knows nothing of sensors or clocks. A pause costs the cluster a hand-over, so each limit has two thresholds and each
state a least length: what hovers around a limit must not make the worker come and go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

COOLER_C: Final = 5.0  # below the limit before work goes on
FULLER_PERCENT: Final = 5.0  # above the limit before work goes on
CALMER: Final = 0.7  # of the limit before work goes on
LEAST_PAUSE_S: Final = 30.0
LEAST_WORK_S: Final = 60.0  # between two pauses for the sake of other processes
SUSTAINED_S: Final = 10.0  # what lasts less is no reason
MINUTES_A_DAY: Final = 24 * 60
_HOURS: Final = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)-([01]?\d|2[0-3]|24):([0-5]\d)")


class Hours(NamedTuple):
    """A span of the day in minutes since midnight, half-open; one that ends before it starts goes over midnight."""

    start: int
    end: int

    def holds(self, minute: int) -> bool:
        """Whether a minute of the day lies in the span."""
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


def parse_hours(text: str) -> Hours:
    """Read "22:00-07:00"; raises ValueError."""
    found = _HOURS.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r:.40} is no span of the day like 22:00-07:00")
    first, second, third, fourth = (int(part) for part in found.groups())
    hours = Hours(first * 60 + second, third * 60 + fourth)
    if hours.end > MINUTES_A_DAY or hours.start == hours.end:
        raise ValueError(f"{text!r:.40} is no span of the day: it ends after midnight or is empty")
    return hours


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the owner has set; 0, False and () mean no limit. Percentages are of the whole machine, 0 to 100."""

    pause_on_battery: bool = False
    battery_below: float = 0.0
    max_temperature_c: float = 0.0
    max_cpu_busy: float = 0.0  # by other processes
    max_gpu_busy: float = 0.0  # by other processes
    hours: tuple[Hours, ...] = ()

    def __post_init__(self) -> None:
        for name in ("battery_below", "max_cpu_busy", "max_gpu_busy"):
            if not 0 <= getattr(self, name) <= 100:
                raise ValueError(f"{name} {getattr(self, name):g} is outside [0, 100]")
        if not 0 <= self.max_temperature_c <= 150:
            raise ValueError(f"max_temperature_c {self.max_temperature_c:g} is outside [0, 150]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Readings:
    """How the machine is; None: it can't be told. `minute`: of the day, local time."""

    minute: int
    on_battery: bool | None = None
    battery_percent: float | None = None
    temperature_c: float | None = None
    cpu_busy: float | None = None  # percent, by other processes
    gpu_busy: float | None = None  # percent, by other processes


class _Rule(NamedTuple):
    """One limit. Between `is_over` and `is_clear` nothing changes; each must hold so long before it counts."""

    reason: str
    is_over: Callable[[Readings], bool]
    is_clear: Callable[[Readings], bool]
    over_for_s: float
    clear_for_s: float
    least_work_s: float = 0.0


@dataclass(slots=True)
class _Watched:
    rule: _Rule
    is_on: bool = False
    turning_since: float | None = None  # since when the readings speak for the other state
    turned_at: float | None = field(default=None)

    def look(self, readings: Readings, now: float) -> None:
        rule = self.rule
        if not (rule.is_clear(readings) if self.is_on else rule.is_over(readings)):
            self.turning_since = None
            return
        self.turning_since = now if self.turning_since is None else self.turning_since
        least_s = LEAST_PAUSE_S if self.is_on else rule.least_work_s
        is_settled = self.turned_at is None or now - self.turned_at >= least_s
        lasts_s = rule.clear_for_s if self.is_on else rule.over_for_s
        if is_settled and now - self.turning_since >= lasts_s:
            self.is_on, self.turning_since, self.turned_at = not self.is_on, None, now


class Guard:
    """Says whether this device may compute now. A reading that fails for a while changes nothing."""

    def __init__(self, limits: Limits) -> None:
        self._watched = [_Watched(rule) for rule in _rules(limits)]

    def look(self, readings: Readings, now: float) -> str:
        """Take in readings at monotonic time `now` (seconds); returns why to pause, empty when it may compute."""
        for watched in self._watched:
            watched.look(readings, now)
        return next((watched.rule.reason for watched in self._watched if watched.is_on), "")


def _rules(limits: Limits) -> Iterable[_Rule]:
    """Return the rules of the limits that are set, the one to be told first first."""
    if limits.hours:
        hours = limits.hours

        def is_free(readings: Readings) -> bool:
            return any(span.holds(readings.minute) for span in hours)

        yield _Rule("it is outside its hours", lambda seen: not is_free(seen), is_free, 0.0, 0.0)
    if limits.max_temperature_c:
        hot = limits.max_temperature_c
        yield _Rule(
            f"it is hotter than {hot:g} degrees", lambda seen: _above(seen.temperature_c, hot),
            lambda seen: _below(seen.temperature_c, hot - COOLER_C), 0.0, SUSTAINED_S,
        )  # fmt: skip
    if limits.pause_on_battery:
        yield _Rule(
            "it runs on battery", lambda seen: seen.on_battery is True, lambda seen: seen.on_battery is False,
            SUSTAINED_S, SUSTAINED_S,
        )  # fmt: skip
    if limits.battery_below:
        low = limits.battery_below
        yield _Rule(
            f"its battery is below {low:g} percent",
            lambda seen: seen.on_battery is True and _below(seen.battery_percent, low),
            lambda seen: seen.on_battery is False or _above(seen.battery_percent, low + FULLER_PERCENT),
            0.0, SUSTAINED_S,
        )  # fmt: skip
    yield from _busy("processors", limits.max_cpu_busy, lambda seen: seen.cpu_busy)
    yield from _busy("GPU", limits.max_gpu_busy, lambda seen: seen.gpu_busy)


def _busy(what: str, most: float, of: Callable[[Readings], float | None]) -> Iterable[_Rule]:
    if most:
        yield _Rule(
            f"other programs use more than {most:g} percent of its {what}", lambda seen: _above(of(seen), most),
            lambda seen: _below(of(seen), most * CALMER), SUSTAINED_S, LEAST_PAUSE_S, LEAST_WORK_S,
        )  # fmt: skip


def _above(value: float | None, bound: float) -> bool:
    return value is not None and value > bound


def _below(value: float | None, bound: float) -> bool:
    return value is not None and value < bound
