"""Children: their environment, their end, and the words with which they end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from manyhands import processes
from manyhands.cluster import LocalCluster
from manyhands.processes import ChildProcess, child_error, stop_all
from protocol.errors import AccessRefused, ConfigInvalid, CoordinatorLost, ManyhandsError, PeerLost

SAY = """
import os, sys
print(sorted(name for name in os.environ if name.startswith("MANYHANDS_")), flush=True)
sys.stdin.read()
"""
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
FAIL = """
import sys
print("error: the link is spent\\nremedy: get another", file=sys.stderr)
sys.exit({code})
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module `child_under_test` that a child process can run; write its code to the path."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "child_under_test.py"


def started(module: Path, code: str, settings: dict[str, str] | None = None) -> ChildProcess:
    module.write_text(code)
    return ChildProcess("child_under_test", settings or {}, module.parent / "child.log")


def wait_for_log(child: ChildProcess) -> str:
    while child.is_alive and not child.log_bytes():
        os.sched_yield()
    return child.log_tail()


def test_settings_travel_in_the_environment_and_nothing_else_does(
    module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYHANDS_PLAN", "9,9")
    child = started(module, SAY, {"link": "secret", "name": "w1"})
    assert wait_for_log(child) == "['MANYHANDS_LINK', 'MANYHANDS_NAME']"
    assert "secret" not in Path(f"/proc/{child.pid}/cmdline").read_text()
    assert child.log_path.stat().st_mode & 0o777 == 0o600
    stop_all([child])
    assert not child.is_alive


def test_a_child_that_does_not_stop_is_killed(module: Path) -> None:
    child = started(module, STUBBORN)
    wait_for_log(child)
    stop_all([child], grace_s=0.1)
    assert child.process.returncode == -9


ENDS = [(78, ConfigInvalid), (77, AccessRefused), (69, PeerLost), (1, PeerLost), (0, PeerLost)]


@pytest.mark.parametrize(("code", "kind"), ENDS)
def test_the_end_of_a_child_is_told_in_its_own_words(code: int, kind: type[ManyhandsError], module: Path) -> None:
    child = started(module, FAIL.format(code=code))
    child.process.wait()
    error = child_error(child, "worker-2")
    assert type(error) is kind
    assert error.message == f"worker-2 ended with code {code}: the link is spent"
    assert error.remedy == "get another"
    stop_all([child])


def test_a_child_without_last_words_shows_its_log(module: Path) -> None:
    child = started(module, "raise SystemExit('Killed by something')")
    child.process.wait()
    assert "Killed by something" in child_error(child, "w").remedy
    stop_all([child])


def test_secrets_in_a_log_are_blacked_out(module: Path) -> None:
    child = started(module, "print('join: manyhands://h:1/join/abc.SECRET')")
    child.process.wait()
    assert "SECRET" not in child.log_tail()
    stop_all([child])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"workers": 0}, "workers 0"), ({"workers": 2, "plan": "1,1/1"}, "3 shares, but there are only 2 workers")],
)
def test_impossible_clusters_are_refused_before_anything_starts(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        LocalCluster(**arguments)  # type: ignore[arg-type]


def test_a_coordinator_that_ends_at_start_is_reported_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises((ConfigInvalid, CoordinatorLost), match=r"coordinator ended with code 78: .*no-such-model"):
        LocalCluster(model="./no-such-model")
    assert list(tmp_path.iterdir()) == []
    assert processes.PACKAGES.joinpath("manyhands").is_dir()
    assert sys.executable
