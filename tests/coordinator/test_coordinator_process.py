"""`python -m coordinator` as a real process: what it prints, and that it ends on a signal and with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.startup import READY_FILE
from protocol import exits
from protocol.security import Link
from tests.coordinator.byte_model import write_model

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "coordinator", "--port", "0", *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MANYHANDS_")},
    )  # fmt: skip


@pytest.mark.parametrize("way", ["stdin", "SIGTERM", "SIGINT"])
def test_it_listens_until_told_to_end(tmp_path: Path, way: str) -> None:
    model, state = write_model(tmp_path / "model"), tmp_path / "state"
    process = start(
        "--model", str(model), "--state-dir", str(state), "--cache-dir", str(tmp_path / "cache"),
        "--exit-on-stdin-close",
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    lines = [process.stdout.readline() for _ in range(3)]
    assert lines[0].startswith("ready: 127.0.0.1:")
    link = Link.parse(lines[2].removeprefix("join: "))
    assert (state / READY_FILE).exists()
    if way == "stdin":
        process.stdin.close()
    else:
        process.send_signal(signal.Signals[way])
    assert process.wait(30) == exits.OK
    assert process.stderr is not None
    log = process.stderr.read()
    assert "stopped" in log and link.secret.decode() not in log and lines[2].strip() not in log
    assert not (state / READY_FILE).exists()
    for stream in (process.stdin, process.stdout, process.stderr):
        stream.close()


@pytest.mark.parametrize(
    ("flags", "code", "told"),
    [
        (("--model", "/no/such/folder"), exits.CONFIG, "neither a folder"),
        (("--model", ".", "--plan", "0"), exits.CONFIG, "no share"),
        (("--model", "protocol"), exits.DATA, "config.json"),
        (("--modle", "x"), exits.USAGE, "unrecognized"),
    ],
)
def test_failures_have_a_code_a_reason_and_no_traceback(
    tmp_path: Path, flags: tuple[str, ...], code: int, told: str
) -> None:
    process = start("--state-dir", str(tmp_path), *flags)
    _, log = process.communicate(timeout=30)
    assert process.returncode == code
    assert told in log and "Traceback" not in log
