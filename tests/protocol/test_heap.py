"""A heap in one piece: what the environment must say, and that a worker's process starts anew to have it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.heap import TUNABLE, VARIABLE, is_glibc, steady_environment

ROOT = Path(__file__).parent.parent.parent
OTHER = "glibc.malloc.check=0"
DEADLINE_S = 60.0


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (None, f"{TUNABLE}=0"),
        ("", f"{TUNABLE}=0"),
        (OTHER, f"{OTHER}:{TUNABLE}=0"),
        (f"{TUNABLE}=0", f"{TUNABLE}=0"),
        (f"{TUNABLE}=5:{OTHER}", f"{TUNABLE}=5:{OTHER}"),  # somebody knows better
    ],
)
def test_the_tunable_is_added_to_what_is_said(said: str | None, wanted: str) -> None:
    before = {"HOME": "/"} | ({VARIABLE: said} if said is not None else {})
    assert steady_environment(before) == {"HOME": "/", VARIABLE: wanted}


@pytest.mark.skipif(not is_glibc(), reason="another C library has no such heap")
@pytest.mark.parametrize("words", [("worker", "--link", "x"), ("manyhands", "join", "x"), ("manyhands", "-h", "join")])
@pytest.mark.parametrize("said", ["", f"{TUNABLE}=0", f"{TUNABLE}=5"])
def test_a_worker_starts_anew_once_and_keeps_its_process_id(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    """What is imported as torch tells what the process was started with, and ends it."""
    (tmp_path / "torch.py").write_text(
        f"import os, sys; print(os.getpid(), os.environ.get({VARIABLE!r}, ''), sys.argv[1:], flush=True); os._exit(3)"
    )
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MANYHANDS_", VARIABLE))}
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        env=others | {"PYTHONPATH": paths, VARIABLE: said, "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=tmp_path, text=True,
    )  # fmt: skip
    out, _ = process.communicate(timeout=DEADLINE_S)
    if "-h" in words:
        assert process.returncode == 0 and "join" in out
        return
    assert process.returncode == 3
    assert out.split(maxsplit=2) == [str(process.pid), said or f"{TUNABLE}=0", f"{list(words[1:])}\n"]
