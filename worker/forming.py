"""One plan on its way from `Begin` to `Ready`: links, keys and values that travel, tiles, keys and values brought back.

Knows nothing of commands or of steps; the compute thread calls `advance` at every turn until it is done.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

import torch

from protocol.errors import DeadlineExceeded
from protocol.ids import WorkerId
from protocol.plans import Plan
from protocol.tiles import TileEntry, TileId
from runtime.kernels import Kernels
from runtime.shelf import BlockShelf
from worker.commands import Begin, Ready
from worker.kv_shelf import KvShelf
from worker.kv_traffic import KvTraffic
from worker.links import COORDINATOR, Links
from worker.loading import WorkerPart, kv_positions, load_worker, resident_bytes, share_of
from worker.store import TileStore

TICK_S: Final = 0.02  # a link that gets complete is no message, nor is a socket that takes more
IDLE_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorSettings:
    """What the owner allows: device, threads of the compute library, bytes of memory, and how long to wait."""

    device: torch.device
    num_threads: int
    budget_bytes: int  # of the whole process
    base_bytes: int = 0  # what the process takes before it holds anything
    kernels: Kernels = field(default_factory=Kernels)
    step_timeout_s: float = 30.0
    link_timeout_s: float = 60.0


@dataclass(slots=True)
class LoadCount:
    """Bytes read since the start, and what the load under way began at and will read at least."""

    bytes: int = 0
    before: int = 0
    to_read: int = 0


class Host(Protocol):
    """What forming needs of the compute thread."""

    def give_way(self) -> None:
        """Raise what ends the load when something else is due."""
        ...

    def hear(self) -> None:
        """Take a message of a neighbour, if one is there: they say hello while this loads."""
        ...


class Bench(NamedTuple):
    """What a compute thread works with, under one plan after the other."""

    links: Links
    store: TileStore
    kv: KvShelf
    blocks: BlockShelf
    settings: ExecutorSettings
    read: LoadCount


class Forming:
    """One plan that is being loaded."""

    def __init__(self, begin: Begin, own: WorkerId, bench: Bench, host: Host) -> None:
        self.plan: Plan = begin.plan
        self.own = own
        self._kv_orders = begin.kv
        self._bench = bench
        self._host = host
        self._entries: tuple[TileEntry, ...] | None = None
        self._ready: Ready | None = None
        self._link_deadline = 0.0
        self.held: WorkerPart | None = None
        share, positions = share_of(self.plan, own), kv_positions(self.plan)
        bench.kv.turn_to(self.plan, share, positions, begin.kv.carries)
        self.traffic = KvTraffic(begin, own, bench.kv, bench.links, time.monotonic)

    @property
    def wait_s(self) -> float:
        """How long to wait for a message before `advance` is due."""
        if not self.traffic.handover.is_over or self._ready is not None:
            return TICK_S
        return IDLE_S if self._entries is None else 0.0

    def tiles_are_here(self, entries: tuple[TileEntry, ...]) -> None:
        """All tiles are on disk: the next `advance` loads them."""
        self._entries = entries

    def advance(self) -> Ready | None:
        """Do what is due; returns the report once the plan can be computed.

        Keys and values travel before tiles are loaded: until then there is time to hear every message. Raises
        TileUnavailable when tiles have to be fetched anew (then say `tiles_are_here` again), what loading raises, and
        DeadlineExceeded naming a neighbour that was not linked in time.
        """
        self.traffic.handover.advance()
        if self._ready is None and self._entries is not None and self.traffic.handover.is_over:
            self._load(self._entries)
        ready = self._ready
        if ready is None:
            return None
        needed = {COORDINATOR, *self.traffic.neighbours}
        unlinked = self._bench.links.unlinked
        missing = [peer for peer in unlinked if peer in needed]
        if not missing:
            for peer in set(unlinked).difference(self.plan.workers):  # it was to hand over, and is gone
                self._bench.links.forget(peer)
            self.traffic.serve()
            return ready
        if time.monotonic() >= self._link_deadline:
            names = ", ".join(name or "the coordinator" for name in missing)
            raise DeadlineExceeded(
                f"no link to {names} within {self._bench.settings.link_timeout_s:g} s after loading",
                remedy="check that the devices reach each other, or let the coordinator relay",
                node=missing[0],
                phase="link",
            )
        return None

    def _load(self, entries: tuple[TileEntry, ...]) -> None:
        self._entries = None
        began, bench = time.monotonic(), self._bench
        count = bench.read
        count.before, count.to_read = count.bytes, sum(entry.num_bytes for entry in entries)
        held = self.held = self._load_part(entries)
        stage = held.part.stage
        carried = bench.kv.restore(
            stage.kv if stage is not None else None,
            share_of(self.plan, self.own),
            self._kv_orders.carries,
            self._read,
        )
        self._ready = Ready(
            epoch=self.plan.epoch,
            weight_bytes=held.weight_bytes,
            resident_bytes=resident_bytes(),
            load_s=time.monotonic() - began,
            predicted_bytes=held.predicted_bytes,
            pinned_bytes=held.pinned_bytes,
            window_bytes=held.window_bytes,
            held=carried,
        )
        self._link_deadline = time.monotonic() + bench.settings.link_timeout_s

    def _load_part(self, entries: tuple[TileEntry, ...]) -> WorkerPart:
        by_tile = {entry.tile: entry for entry in entries}
        bench, settings = self._bench, self._bench.settings

        def source(tile: TileId) -> memoryview:
            self._host.hear()
            data = bench.store.read(by_tile[tile])
            self._read(len(data))
            return data

        return load_worker(
            self.plan,
            self.own,
            source=source,
            store=bench.store,
            entries=by_tile,
            kernels=settings.kernels,
            device=settings.device,
            budget_bytes=settings.budget_bytes,
            base_bytes=settings.base_bytes,
            on_read=self._read,
            kv=bench.kv.arena,
            shelf=bench.blocks,
        )

    def _read(self, num_bytes: int) -> None:
        self._host.give_way()
        self._bench.read.bytes += num_bytes
