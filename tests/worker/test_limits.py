"""The owner's limits: when a worker pauses, when it goes on, and what the sensors' words mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.errors import ConfigInvalid
from worker.config import WorkerConfig
from worker.limits import LEAST_PAUSE_S, LEAST_WORK_S, Guard, Hours, Limits, Readings, parse_hours
from worker.owner import Owner, require_measurable
from worker.sensors import CpuTimes, Sensors, busy_with_others, gpu_busy_with_others, hottest

NOON = Readings(minute=12 * 60, on_battery=False, battery_percent=80.0, temperature_c=40.0, cpu_busy=0.0, gpu_busy=0.0)
MAINS, BATTERY = NOON, replace(NOON, on_battery=True)


def told(limits: Limits, seen: Iterable[tuple[float, Readings]]) -> list[str]:
    guard = Guard(limits)
    return [guard.look(readings, now) for now, readings in seen]


def test_without_limits_nothing_is_a_reason() -> None:
    worst = Readings(minute=0, on_battery=True, battery_percent=1.0, temperature_c=120.0, cpu_busy=100.0, gpu_busy=100)
    assert told(Limits(), [(0, worst), (1000, worst)]) == ["", ""]


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("22:00-07:00", (22 * 60, 0, 6 * 60 + 59), (7 * 60, 12 * 60, 21 * 60 + 59)),
        ("09:30-17:00", (9 * 60 + 30, 16 * 60 + 59), (9 * 60 + 29, 17 * 60, 0)),
        ("18:00-24:00", (18 * 60, 23 * 60 + 59), (0, 17 * 60 + 59)),
    ],
)
def test_hours(text: str, inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
    hours = parse_hours(text)
    assert all(hours.holds(minute) for minute in inside)
    assert not any(hours.holds(minute) for minute in outside)
    guard = Guard(Limits(hours=(hours, Hours(1, 2))))
    assert guard.look(replace(NOON, minute=outside[0]), 0.0) == "it is outside its hours"


@pytest.mark.parametrize(
    "text", ["", "22-7", "25:00-07:00", "10:00-24:30", "10:00-10:00", "10:60-11:00", "10:00-11:00x"]
)
def test_bad_hours_are_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="span of the day"):
        WorkerConfig(hours=(text,))


def test_heat_pauses_at_once_and_work_goes_on_when_it_is_clearly_cooler() -> None:
    def at(degrees: float | None) -> Readings:
        return replace(NOON, temperature_c=degrees)

    hot = "it is hotter than 70 degrees"
    assert told(
        Limits(max_temperature_c=70),
        [
            (0, at(70.0)), (3, at(70.1)), (6, at(66.0)), (9, at(None)), (50, at(66.0)), (53, at(64.9)), (60, at(64.9)),
            (63, at(64.9)), (66, at(75.0)),
        ],
    ) == ["", hot, hot, hot, hot, hot, hot, "", hot]  # fmt: skip


def test_unplugged_for_a_moment_is_no_reason() -> None:
    limits = Limits(pause_on_battery=True)
    assert told(limits, [(0, BATTERY), (9, BATTERY), (9.5, MAINS), (10, BATTERY), (19, BATTERY)]) == [""] * 5
    assert told(limits, [(0, BATTERY), (10, BATTERY), (11, MAINS), (39, MAINS), (40, MAINS)]) == [
        "", "it runs on battery", "it runs on battery", "it runs on battery", "",
    ]  # fmt: skip


def test_a_low_battery_matters_only_on_battery() -> None:
    def at(percent: float) -> Readings:
        return replace(BATTERY, battery_percent=percent)

    low = "its battery is below 30 percent"
    seen = [(0, at(30.0)), (3, at(29.0)), (60, at(34.0)), (100, at(36.0)), (110, at(36.0))]
    assert told(Limits(battery_below=30), seen) == ["", low, low, low, ""]
    plugged = replace(at(29.0), on_battery=False)
    assert told(Limits(battery_below=30), [(0, at(29.0)), (40, plugged), (50, plugged)]) == [low, low, ""]
    assert told(Limits(battery_below=30), [(0, plugged), (40, plugged)]) == ["", ""]


def test_others_use_of_the_machine_must_last_and_work_is_not_chopped() -> None:
    def at(percent: float) -> Readings:
        return replace(NOON, cpu_busy=percent)

    busy = "other programs use more than 50 percent of its processors"
    guard = Guard(Limits(max_cpu_busy=50))
    for now in range(0, 9, 3):
        assert guard.look(at(90), now) == ""
    assert guard.look(at(40), 9) == ""  # a short peak
    assert [guard.look(at(90), now) for now in (12, 15, 18, 21, 24)] == ["", "", "", "", busy]
    assert [guard.look(at(36), now) for now in range(27, 90, 3)] == [busy] * 21  # between the two thresholds
    calm = [guard.look(at(10), now) for now in range(90, 124, 3)]
    assert calm == [busy] * 10 + [""] * 2  # after 30 s
    again = [guard.look(at(90), now) for now in range(126, 190, 3)]
    assert again.index(busy) * 3 + 126 >= 120 + LEAST_WORK_S


def test_the_gpu_is_told_apart() -> None:
    busy = replace(NOON, gpu_busy=80.0)
    expected = ["", "other programs use more than 20 percent of its GPU"]
    assert told(Limits(max_gpu_busy=20), [(0, busy), (10, busy)]) == expected


@given(st.lists(st.tuples(st.floats(0.1, 20), st.floats(0, 100), st.floats(20, 100), st.booleans()), max_size=80))
def test_whatever_is_read_a_pause_lasts_its_least_time(seen: list[tuple[float, float, float, bool]]) -> None:
    limits = Limits(max_cpu_busy=50, max_temperature_c=70, pause_on_battery=True)
    for single in (replace(limits, max_temperature_c=0, pause_on_battery=False), replace(limits, max_cpu_busy=0)):
        guard, now, paused_at = Guard(single), 0.0, -1.0
        for passed_s, busy, degrees, on_battery in seen:
            now += passed_s
            reason = guard.look(replace(NOON, cpu_busy=busy, temperature_c=degrees, on_battery=on_battery), now)
            if reason and paused_at < 0:
                paused_at = now
            elif not reason and paused_at >= 0:
                assert now - paused_at >= LEAST_PAUSE_S
                paused_at = -1.0


# ---------------------------------------------------------------- sensors


def test_what_others_use_of_the_processors() -> None:
    before = CpuTimes(total_s=1000.0, busy_s=400.0, own_s=100.0)
    assert busy_with_others(before, CpuTimes(1010.0, 408.0, 105.0)) == pytest.approx(30.0)
    assert busy_with_others(before, CpuTimes(1010.0, 401.0, 105.0)) == 0.0  # the counters don't run in step
    assert busy_with_others(before, before) is None


PMON = """# gpu         pid   type     sm    mem    enc    dec    jpg    ofa    command
# Idx           #    C/G      %      %      %      %      %      %    name
    0       4242     C     61     20      -      -      -      -    python
    0       1000     C     25      5      -      -      -      -    blender
    0       1001     G      -      -      -      -      -      -    Xorg
    1       1002     C     30      5      -      -      -      -    blender
"""


def test_what_others_use_of_the_gpu() -> None:
    assert gpu_busy_with_others(PMON, own_pid=4242) == 30.0
    assert gpu_busy_with_others(PMON, own_pid=7) == 86.0
    assert gpu_busy_with_others("", own_pid=7) is None
    assert gpu_busy_with_others("No devices were found", own_pid=7) is None


def test_the_processors_temperature_counts_if_it_is_known() -> None:
    def entry(degrees: float | None) -> SimpleNamespace:
        return SimpleNamespace(current=degrees)

    assert hottest({"nvme": [entry(80.0)], "coretemp": [entry(50.0), entry(55.5)]}) == 55.5
    assert hottest({"nvme": [entry(40.0)], "acpitz": [entry(None)]}) == 40.0
    assert hottest({}) is None


def test_this_machine_can_be_read() -> None:
    sensors = Sensors(wants_gpu=False)
    assert sensors.read().cpu_busy is None
    second = sensors.read()
    assert 0 <= second.minute < 24 * 60
    assert second.cpu_busy is None or 0 <= second.cpu_busy <= 100


def test_a_limit_that_cannot_be_measured_is_refused_by_name() -> None:
    blind = Readings(minute=0)
    for limits, words in (
        (Limits(max_temperature_c=70), "max_temperature_c"),
        (Limits(max_gpu_busy=5), "max_gpu_busy"),
    ):
        with pytest.raises(ConfigInvalid, match=f"{words} is set"):
            require_measurable(limits, blind)
    require_measurable(Limits(pause_on_battery=True, battery_below=30, max_cpu_busy=50), blind)


def test_the_owner_takes_a_first_look_at_once() -> None:
    class Dark(Sensors):
        def read(self) -> Readings:
            return replace(NOON, minute=0)

    assert Owner(Limits(hours=(parse_hours("08:00-20:00"),)), Dark(wants_gpu=False)).reason == "it is outside its hours"
    assert Owner(Limits(hours=(parse_hours("20:00-08:00"),)), Dark(wants_gpu=False)).reason == ""


@pytest.mark.parametrize("name", ["battery_below", "max_cpu_busy", "max_gpu_busy", "max_temperature_c"])
def test_limits_out_of_range_are_refused_by_name(name: str) -> None:
    for value in (-1.0, 151.0):
        with pytest.raises(ValueError, match=name):
            Limits(**{name: value})  # type: ignore[arg-type]
