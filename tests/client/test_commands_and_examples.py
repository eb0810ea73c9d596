"""The demo, `up` with `join` and `ask`, and the examples, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from protocol import exits

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parent.parent.parent
MANYHANDS = [sys.executable, "-m", "manyhands"]
DEADLINE_S = 120


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A user with an empty home and no terminal."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MANYHANDS_", "XDG_"))}
    homes = {f"XDG_{kind}_HOME": str(tmp_path / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG")}
    return own | homes | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def run(argv: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, env=environ, cwd=environ["XDG_STATE_HOME"].rpartition("/")[0], stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=DEADLINE_S, check=False,
    )  # fmt: skip


def test_the_demo_shows_who_did_what(environ: dict[str, str]) -> None:
    done = run([*MANYHANDS, "demo", "--max-tokens", "16"], environ)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "ready: plan 1,1/1 (3 workers in 2 stages)" in done.stderr
    rows = re.findall(r"^(worker-\d)\s+(\d+)\s+(\S.*?)\s\s+(\d\.\.\d)\s", done.stdout, re.MULTILINE)
    assert sorted(name for name, *_ in rows) == ["worker-1", "worker-2", "worker-3"]
    assert rows[0][2].startswith("head")
    assert not [pid for _, pid, *_ in rows if psutil.pid_exists(int(pid))]
    for words in ("class Stack:", "time to first token", "tokens/s", "16 out", "encrypted            yes"):
        assert words in done.stdout
    assert "worker-3 is killed after 8 tokens" in done.stdout
    assert done.stdout.endswith("with the same tokens\n")


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_run(example: Path, environ: dict[str, str]) -> None:
    assert len(example.read_text().splitlines()) < 60
    done = run([sys.executable, str(example)], environ)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "tokens" in done.stdout or "same answers: yes" in done.stdout


def read_until(lines: Iterator[str], pattern: str) -> str:
    """Return what the first line with the pattern holds in its group."""
    read = []
    for line in lines:
        read.append(line)
        if found := re.search(pattern, line):
            return found.group(found.lastindex or 0)
    raise AssertionError(f"{pattern!r} never came: {''.join(read)}")


@pytest.mark.usefixtures("ctrl_c")
def test_up_join_and_ask(environ: dict[str, str]) -> None:
    up = subprocess.Popen(
        [*MANYHANDS, "up", "demo", "--port", "0", "--plan", "1/1", "--worker-name", "here", "--worker-threads", "1"],
        env=environ, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        lines = iter(up.stderr.readline, "")  # type: ignore[union-attr]
        link = read_until(lines, r"(manyhands://\S+/join/\S+)")
        joined = subprocess.Popen(
            [*MANYHANDS, "join", link, "--name", "there", "--threads", "1"], env=environ, stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            read_until(lines, r"ready: plan 1/1")
            asked = run([*MANYHANDS, "ask", "import os\n", "--max-tokens", "6", "--json"], environ)
            assert asked.returncode == 0, asked.stderr
            assert '"completion_tokens": 6' in asked.stdout
            status = run([*MANYHANDS, "status"], environ)
            assert re.search(r"^there +worker +ready +cpu", status.stdout, re.MULTILINE), status.stdout
            assert re.search(r"ago +planned over here, there \(1/1\)", status.stdout), status.stdout
            head = next(child for child in psutil.Process(up.pid).children() if "worker" in child.cmdline())
            head.kill()
            read_until(lines, r"the local worker was killed by SIGKILL; it is started again in 1 s")
            read_until(lines, r"ready: plan 1/1")
            again = run([*MANYHANDS, "ask", "import os\n", "--max-tokens", "6", "--json"], environ)
            assert json.loads(again.stdout)["token_ids"] == json.loads(asked.stdout)["token_ids"]
        finally:
            joined.send_signal(signal.SIGINT)
            assert joined.wait(30) in (0, exits.INTERRUPTED)
        children = psutil.Process(up.pid).children()
    finally:
        up.send_signal(signal.SIGINT)
        up.communicate(timeout=30)
    assert up.returncode == exits.INTERRUPTED
    assert len(children) == 2
    assert not [child for child in children if child.is_running()]
