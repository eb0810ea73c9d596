"""(h) Churn: a worker joins or leaves every few seconds while clients ask without pause; nothing wrong, nothing leaked.

    python -m benchmarks.churn --minutes 5 --every 3 --seed 0

Two workers stay, up to four more come and go: killed, told to stop (SIGTERM), drained, and back again with their tiles.
Ends with 1 when an answer was wrong, a request failed without a typed error, or something was left over.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil

from benchmarks.fleet import Fleet, members
from benchmarks.nursery import Nursery
from benchmarks.report import table, where
from manyhands import AsyncClient, ManyhandsError
from manyhands.cluster import DEMO_MODEL

STAYING = ("worker-1", "worker-2")
COMING = ("worker-3", "worker-4", "worker-5", "worker-6")
NUM_CLIENTS = 4
CALM_S = 20.0
REST_S = 30.0
LOOK_S = 0.05
MORE_BYTES = 32 * 2**20  # of resident memory: what an allocator may keep; a leak grows with the minutes
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = tuple(
    (prompt, {"max_tokens": length, "ignore_eos": True, "temperature": heat, "seed": 3})
    for prompt, length, heat in (
        ("def read(self):\n", 24, 0.0),
        ("import os\n\nclass ", 16, 0.9),
        ("for name in ", 32, 0.0),
        ("x = [1, 2, 3]\n" * 12, 12, 0.7),
    )
)


@dataclass(slots=True)
class Tally:
    """What became of the requests."""

    right: int = 0
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    longest_pause_s: float = 0.0
    num_plans: int = 0
    largest_plan: int = 0


class Footprint(NamedTuple):
    """What a process holds."""

    memory_bytes: int
    files: int
    sockets: int
    threads: int


def footprint(pid: int) -> Footprint:
    """Look at a process."""
    process = psutil.Process(pid)
    with process.oneshot():
        sockets = len(process.net_connections())
        return Footprint(process.memory_info().rss, process.num_fds(), sockets, process.num_threads())


async def ask_on(link: str, number: int, expected: list[tuple[int, ...]], tally: Tally, stop: asyncio.Event) -> None:
    """One client: a request after the other until told to stop."""
    dice = random.Random(number)
    async with AsyncClient(link) as client:
        while not stop.is_set():
            which = dice.randrange(len(REQUESTS))
            prompt, options = REQUESTS[which]
            began = time.monotonic()
            tokens: list[int] = []
            try:
                async for piece in await client.generate(prompt, stream=True, **options):
                    tally.longest_pause_s = max(tally.longest_pause_s, time.monotonic() - began)
                    began = time.monotonic()
                    tokens += piece.token_ids
                    tally.tokens += len(piece.token_ids)
            except ManyhandsError as error:
                tally.errors[type(error).__name__] += 1
                continue
            if tuple(tokens) == expected[which]:
                tally.right += 1
            else:
                tally.wrong.append(f"request {which}: {tokens}, not {expected[which]}")


async def watch_on(link: str, tally: Tally, stop: asyncio.Event) -> None:
    """Count the plans and their workers until told to stop."""
    epochs: set[int] = set()
    async with AsyncClient(link) as client:
        while not stop.is_set():
            status = await client.status()
            if status["phase"] == "ready":
                epochs.add(status["epoch"])
                tally.largest_plan = max(tally.largest_plan, len(members(status)))
            tally.num_plans = len(epochs)
            await asyncio.sleep(LOOK_S)


async def change_on(fleet: Fleet, every_s: float, dice: random.Random, did: Counter[str], stop: asyncio.Event) -> None:
    """Let somebody come or go every `every_s` seconds until told to stop."""
    async with AsyncClient(fleet.coordinator.link) as client:
        while not stop.is_set():
            here = [name for name in COMING if name in fleet.running]
            away = [name for name in COMING if name not in fleet.running]
            if away and (not here or dice.random() < 0.5):
                await asyncio.to_thread(fleet.start, dice.choice(away))
                did["join"] += 1
            else:
                name, how = dice.choice(here), dice.choice(("kill", "stop", "drain"))
                if how == "drain":
                    await drain(client, name, did)
                else:
                    fleet.signal(name, signal.SIGKILL if how == "kill" else signal.SIGTERM)
                    did[how] += 1
            try:
                await asyncio.wait_for(stop.wait(), every_s)
            except TimeoutError:
                continue


async def drain(client: AsyncClient, name: str, did: Counter[str]) -> None:
    """Ask for a worker to be drained; that it is already gone is no failure."""
    try:
        await client.drain(name)
        did["drain"] += 1
    except ManyhandsError:
        did["drain refused"] += 1


async def ask_for(
    fleet: Fleet, seconds: float, expected: list[tuple[int, ...]], every_s: float, seed: int
) -> tuple[Tally, Counter[str]]:
    """Ask with all clients for a while, with changes every `every_s` seconds (0: none)."""
    tally, did, stop = Tally(), Counter[str](), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for number in range(NUM_CLIENTS):
            group.create_task(ask_on(fleet.coordinator.link.format(), number, expected, tally, stop))
        group.create_task(watch_on(fleet.coordinator.link.format(), tally, stop))
        if every_s:
            group.create_task(change_on(fleet, every_s, random.Random(seed), did, stop))
        await asyncio.sleep(seconds)
        stop.set()
    return tally, did


def look(fleet: Fleet) -> dict[str, Footprint]:
    """Look at those who stay."""
    pids = {"coordinator": fleet.coordinator.child.pid} | {name: fleet.workers[name].pid for name in STAYING}
    return {name: footprint(pid) for name, pid in pids.items()}


def come_to_rest(fleet: Fleet) -> None:
    """Send all home who came, and wait until those who stay have nothing to do."""
    for name in COMING:
        if name in fleet.running:
            fleet.signal(name, signal.SIGTERM)
    for name in COMING:
        if name in fleet.workers:
            fleet.workers[name].process.wait(REST_S)
    fleet.until_ready(len(STAYING))
    fleet.until(lambda status: not status["kv"]["used"] and not any(one["kv_bytes"] for one in status["workers"]))


def left_over(fleet: Fleet, before: dict[str, Footprint]) -> list[str]:
    """Name what the processes hold beyond what they held; what only takes its time gets some."""
    deadline = time.monotonic() + REST_S
    while True:
        found = []
        for name, now in look(fleet).items():
            was = before[name]
            if now.memory_bytes > was.memory_bytes + MORE_BYTES:
                found.append(f"{name}: {(now.memory_bytes - was.memory_bytes) / 2**20:.0f} MiB")
            found += [
                f"{name}: {getattr(now, what) - getattr(was, what)} {what}"
                for what in ("files", "sockets", "threads")
                if getattr(now, what) > getattr(was, what)
            ]
        found += [
            str(path) for name in STAYING for path in fleet.folder_of(name).glob("*/spool/**/*") if path.is_file()
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)


class Soaked(NamedTuple):
    """What a soak brought."""

    minutes: float
    every_s: float
    calm: Tally
    churned: Tally
    did: Counter[str]
    before: dict[str, Footprint]
    after: dict[str, Footprint]
    leaks: list[str]

    @property
    def problems(self) -> list[str]:
        """All that should not be."""
        return [*self.calm.wrong, *self.churned.wrong, *self.leaks]


def soak(minutes: float, every_s: float, seed: int, calm_s: float = CALM_S) -> Soaked:
    """Measure calm, then churn, then what is left of it."""
    with (
        Nursery() as nursery,
        Fleet(nursery, DEMO_MODEL, {"plan": "auto", "workers": "2", "probation_s": "0"}) as fleet,
    ):
        for name in STAYING:
            fleet.start(name)
        fleet.until_ready(len(STAYING))
        expected = [fleet.client.generate(prompt, **options).token_ids for prompt, options in REQUESTS]
        # Everything that is only built up once has been when we look: all were here, and all clients asked.
        for name in COMING:
            fleet.start(name)
        fleet.until(lambda status: len(status["workers"]) == len(STAYING + COMING))
        asyncio.run(ask_for(fleet, calm_s / 4, expected, 0.0, seed))
        come_to_rest(fleet)
        calm, _ = asyncio.run(ask_for(fleet, calm_s, expected, 0.0, seed))
        come_to_rest(fleet)
        before = look(fleet)
        churned, did = asyncio.run(ask_for(fleet, 60 * minutes, expected, every_s, seed))
        come_to_rest(fleet)
        leaks = left_over(fleet, before)
        return Soaked(minutes, every_s, calm, churned, did, before, look(fleet), leaks)


def report(soaked: Soaked, calm_s: float = CALM_S) -> None:
    """Print the tables."""
    rows = []
    for name, tally, seconds in (
        ("calm, 2 workers", soaked.calm, calm_s),
        ("churn, 2 to 6", soaked.churned, 60 * soaked.minutes),
    ):
        errors = ", ".join(f"{count} {what}" for what, count in tally.errors.items()) or 0
        rate = f"{tally.tokens / seconds:.1f}"
        pause = f"{tally.longest_pause_s:.1f}"
        rows.append((name, tally.right, len(tally.wrong), errors, rate, pause, tally.num_plans, tally.largest_plan))
    changes = ", ".join(f"{count} {what}" for what, count in sorted(soaked.did.items()))
    table(
        f"(h) {soaked.minutes:g} minutes of churn, a change every {soaked.every_s:g} s: {changes}",
        ("", "right", "wrong", "typed errors", "tokens/s", "longest pause, s", "plans", "largest"),
        rows,
    )
    held = []
    for name, was in soaked.before.items():
        now = soaked.after[name]
        memory = f"{was.memory_bytes / 2**20:.0f} -> {now.memory_bytes / 2**20:.0f}"
        held.append((name, memory, *(f"{a} -> {b}" for a, b in zip(was[1:], now[1:], strict=True))))
    table("(h) What those who stay hold, before and after", ("", "MiB", "files", "sockets", "threads"), held)


def main() -> int:
    """Read the flags and run."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--minutes", type=float, default=5.0)
    flags.add_argument("--every", type=float, default=3.0)
    flags.add_argument("--seed", type=int, default=0)
    chosen = flags.parse_args()
    if not chosen.minutes > 0:
        return 0
    print(f"Measured on {where()}: python -m benchmarks.churn --minutes {chosen.minutes:g} --seed {chosen.seed}")
    soaked = soak(chosen.minutes, chosen.every, chosen.seed)
    report(soaked)
    for problem in soaked.problems:
        print(f"WRONG: {problem}")
    return 1 if soaked.problems else 0


if __name__ == "__main__":
    sys.exit(main())
