"""Who is started again, when, and who is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyhands.keeper import Keeper, Waits
from manyhands.processes import ChildProcess, stop_all
from protocol.errors import ConfigInvalid


def test_waits_grow_and_begin_anew_after_a_minute_of_life() -> None:
    waits = Waits()
    assert [waits.after(0.0) for _ in range(7)] == [1, 2, 4, 8, 16, 30, 30]
    assert [waits.after(lived_s) for lived_s in (60.0, 59.9, 3600.0, 1.0)] == [1, 2, 1, 2]


class House:
    """One child under a keeper; `code` is what it runs."""

    def __init__(self, folder: Path, code: str) -> None:
        self.module, self.log = folder / "child_under_test.py", folder / "child.log"
        self.module.write_text(code)
        self.lines: list[str] = []
        self.children: list[ChildProcess] = []
        self.start()
        self.keeper = Keeper("the worker", lambda: self.children[-1], self.start, self.lines.append)

    def start(self) -> None:
        self.children.append(ChildProcess("child_under_test", {}, self.log, continues_log=bool(self.children)))

    def dies(self) -> None:
        self.children[-1].process.wait()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


FAIL = "import sys\nprint('error: life {code} was short', file=sys.stderr)\nsys.exit({code})\n"
STAY = "import sys\nprint('up', flush=True)\nsys.stdin.read()\n"


def test_one_that_dies_is_started_again_after_its_wait(folder: Path) -> None:
    house = House(folder, FAIL.format(code=70))
    house.dies()
    for now in (0.0, 0.5, 0.99):
        house.keeper.look(now)
    assert len(house.children) == 1
    house.keeper.look(1.0)
    assert len(house.children) == 2
    house.dies()
    house.keeper.look(1.1)
    house.keeper.look(3.0)
    assert len(house.children) == 2
    house.keeper.look(3.1)
    house.dies()
    said = "the worker ended with code 70: life 70 was short; it is started again in"
    assert house.lines == [f"{said} 1 s", f"{said} 2 s"]
    assert len(house.children) == 3
    assert house.children[-1].log_tail().count("short") == 1  # its own words only
    assert house.log.read_text().count("short") == 3
    stop_all(house.children)


def test_one_that_is_killed_is_told_with_the_signal(folder: Path) -> None:
    house = House(folder, STAY)
    house.keeper.look(0.0)
    house.children[-1].kill()
    house.keeper.look(100.0)
    assert house.lines == ["the worker was killed by SIGKILL; it is started again in 1 s"]
    house.start()  # somebody else was quicker
    house.keeper.look(200.0)
    assert len(house.children) == 2
    stop_all(house.children)


def test_what_a_new_start_cannot_mend_is_raised_once(folder: Path) -> None:
    house = House(folder, FAIL.format(code=78))
    house.dies()
    with pytest.raises(ConfigInvalid, match="life 78 was short"):
        house.keeper.look(0.0)
    house.keeper.look(1000.0)
    assert len(house.children) == 1
    stop_all(house.children)


def test_one_that_was_told_to_end_stays_away(folder: Path) -> None:
    house = House(folder, "")
    house.dies()
    for now in (0.0, 1000.0):
        house.keeper.look(now)
    assert house.lines == ["the worker has ended as it was told to; it is not started again"]
    assert len(house.children) == 1
    stop_all(house.children)
