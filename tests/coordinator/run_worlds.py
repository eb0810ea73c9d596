"""Runs seeded worlds: `run_worlds.py --seeds 10000`, or one with its story: `run_worlds.py --seed 17`."""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from world.scenario import scenario_of  # noqa: E402
from world.world import World  # noqa: E402  found by the line above

CHUNK = 50
FEW = 2  # worlds of many workers at a time


def make_world(seed: int, num_workers: int) -> World:
    """Return the world of a seed, with so many workers (0: a few)."""
    return World(seed, scenario_of(random.Random(seed), num_workers) if num_workers else None)


def run_some(seeds: range, num_workers: int) -> list[tuple[int, str]]:
    """Run these worlds; return the seeds that fail, and why."""
    failures = []
    for seed in seeds:
        try:
            world = make_world(seed, num_workers)
            world.run()
            world.check()
        except Exception as error:  # noqa: BLE001  whatever it was, it is a finding
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = str(error).splitlines()[0][:160] if str(error) else where.line
            failures.append((seed, f"{type(error).__name__} {Path(where.filename).name}:{where.lineno} {text}"))
    return failures


def tell_story(seed: int, num_workers: int) -> None:
    """Run one world and print what happened in it, then how it ended."""
    world = make_world(seed, num_workers)
    print(world.scenario)
    try:
        world.run()
        world.check()
    except Exception:  # noqa: BLE001  the story comes first
        failure = traceback.format_exc()
    else:
        failure = "all is well"
    for now, who, what in world.trace:
        print(f"{now:9.3f} {who:12} {in_short(what)}")
    print(failure)


def in_short(what: object) -> str:
    """Return an event or effect without what is as usual."""
    text = repr(what) if is_dataclass(what) else str(what)
    if is_dataclass(what) and not isinstance(what, type):
        text = f"{type(what).__name__} " + " ".join(
            f"{one.name}={_value(getattr(what, one.name))}" for one in fields(what)
        )
    return text


def _value(value: object) -> str:
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    text = repr(value)
    return text if len(text) < 300 else text[:300] + "..."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="tell the story of this one")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="so many in each world, instead of a few")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    given = parser.parse_args()
    if given.seed is not None:
        tell_story(given.seed, given.workers)
        return 0
    began = time.monotonic()
    end, size = given.first + given.seeds, FEW if given.workers else CHUNK
    chunks = [range(first, min(first + size, end)) for first in range(given.first, end, size)]
    num_failed = 0
    with ProcessPoolExecutor(given.processes) as pool:
        for failures in pool.map(partial(run_some, num_workers=given.workers), chunks):
            for seed, why in failures:
                num_failed += 1
                print(f"seed {seed}: {why}", flush=True)
    print(f"{given.seeds} worlds in {time.monotonic() - began:.0f} s, {num_failed} failed")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
