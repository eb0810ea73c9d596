"""Memory that is held for steps: there from the start, enough for what comes and goes, gone when it is given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.contract import SLACK_BYTES
from protocol.heap import is_glibc, steady_environment

ROOT = Path(__file__).parent.parent.parent
MIB = 2**20
SCRIPT = """
import json, random
import psutil, torch
from runtime.allocator import give_back, hold, keep_steady

def resident():
    return psutil.Process().memory_info().rss

keep_steady()
torch.set_num_threads(1)
step = lambda rows: torch.ones(rows, 64) @ torch.ones(64, 2048)  # 256 B in and 8 KiB out for each row
step(64)
give_back()
seen, dice, kept = [resident()], random.Random(5), []
hold(48 * 2**20)
seen.append(resident())
for number in range(400):
    out = step(dice.randrange(1, 2048))
    if number % 8 == 0:
        kept.append(torch.ones(dice.randrange(1, 64)))  # small, and stays
    del out
seen.append(resident())
give_back()
seen.append(resident())
print(json.dumps(seen))
"""


def resident_after(*, is_steady: bool) -> list[int]:
    """Run the script; return what the process held at the start, with the memory held, after steps, and at the end."""
    others = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environment = (steady_environment(others) if is_steady else others) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen: list[int] = json.loads(done.stdout)
    return seen


@pytest.mark.skipif(not is_glibc(), reason="another C library's heap can't be held")
def test_what_is_held_is_there_at_once_is_enough_and_goes_back() -> None:
    start, held, after, end = resident_after(is_steady=True)
    assert 47 * MIB < held - start < 52 * MIB  # some of it may have been there
    assert after - held < 4 * MIB
    assert end - start < 4 * MIB


def test_a_heap_in_pieces_is_not_held() -> None:
    start, held, _, end = resident_after(is_steady=False)
    assert held - start < 4 * MIB
    assert end - start < 4 * MIB


@pytest.mark.skipif(not is_glibc(), reason="another C library's heap can't be held")
@pytest.mark.parametrize(
    ("weights", "activations", "blocks"),
    [
        ("float32", "float32", "pinned"),
        ("bfloat16", "bfloat16", "pinned"),
        ("int8", "float32", "pinned"),
        ("int8", "bfloat16", "streamed"),
        ("int4", "bfloat16", "pinned"),
    ],
)
def test_a_step_finds_room_in_what_the_contract_counts_for_it(weights: str, activations: str, blocks: str) -> None:
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("step_in_its_room.py"), weights, activations, blocks],
        env=steady_environment(os.environ) | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < SLACK_BYTES // 5  # code that is first used, holes between what comes and goes
