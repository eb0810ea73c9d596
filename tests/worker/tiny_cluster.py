"""A tiny random model, and real workers' compute threads around a coordinator that the test itself pumps."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq

from protocol.batches import Sampling, SessionRows
from protocol.frames import decode, encode
from protocol.ids import SessionId, WorkerId
from protocol.messages import LinkMode, LinkOrder, Peer, Relay, SessionSampling, Step, StepDone
from protocol.plans import Plan, Share, Stage
from protocol.security import Gate, KeyPair
from protocol.specs import NO_LAYERS, ActivationFormat, ModelSpec, RopeSpec, Span, WeightFormat
from protocol.tiles import TileEntry, TileId, all_tiles, tile_bytes, tile_parts
from protocol.transport import bind_router, envelope_of
from worker.commands import NO_ORDERS, Attach, Begin, KvOrders, LoadTiles, Ready, Report, Stop
from worker.executor import Executor
from worker.forming import ExecutorSettings
from worker.links import Links
from worker.spool import Spool
from worker.store import TileStore

SPEC = ModelSpec(
    name="tiny", family="llama", hidden=32, layers=4, heads=4, kv_heads=2, head_dim=8, intermediate=96, vocab=97,
    max_positions=128, norm_eps=1e-5, rope=RopeSpec(theta=10_000.0), ffn_tiles=3, weights=WeightFormat.FLOAT32,
    activations=ActivationFormat.FLOAT32,
)  # fmt: skip
GREEDY = Sampling()
DEADLINE_S = 20.0
NOTHING: Mapping[str, KvOrders] = {}
LOOPBACK = "tcp://127.0.0.1:*"


def make_tiles(spec: ModelSpec = SPEC, seed: int = 1) -> dict[TileId, bytes]:
    """Random weights, big enough that greedy choices are no near-ties; norms near one."""
    dice = np.random.default_rng(seed)
    tiles: dict[TileId, bytes] = {}
    for tile in all_tiles(spec):
        data = bytearray(tile_bytes(spec, tile))
        for part in tile_parts(spec, tile):
            count = part.rows * max(part.cols, 1)
            values = dice.uniform(0.5, 1.5, count) if "norm" in part.name else dice.normal(0, 0.3, count)
            data[part.offset : part.offset + part.num_bytes] = values.astype(np.float32).tobytes()
        tiles[tile] = bytes(data)
    return tiles


def entry_of(tile: TileId, data: bytes) -> TileEntry:
    return TileEntry(tile, len(data), hashlib.sha256(data).digest())


def put(store: TileStore, entry: TileEntry, data: bytes) -> None:
    part = store.open_part(entry)
    part.append(data)
    assert part.finish()


def plan_of(stages: Sequence[tuple[Span, Sequence[tuple[str, Span, Span]], int]], head: str, epoch: int = 1) -> Plan:
    """A plan from (layers, [(worker, groups, ffn)], hub) lines."""
    return Plan(
        epoch=epoch,
        model=SPEC,
        head=WorkerId(head),
        stages=tuple(
            Stage(
                layers=layers,
                members=tuple(Share(worker=WorkerId(name), groups=groups, ffn=ffn) for name, groups, ffn in members),
                hub=hub,
            )
            for layers, members, hub in stages
        ),
        wire=ActivationFormat.FLOAT32,
    )


@dataclass
class Hand:
    """One worker's compute thread."""

    name: WorkerId
    keys: KeyPair
    links: Links
    executor: Executor
    store: TileStore
    reports: list[Report] = field(default_factory=list)


class TinyCluster:
    """A coordinator ROUTER pumped by the test, which relays and keeps every frame it saw, and compute threads."""

    def __init__(self, folder: Path) -> None:
        self.tiles = make_tiles()
        self.entries = {tile: entry_of(tile, data) for tile, data in self.tiles.items()}
        self._folder = folder
        self._context: zmq.Context[Any] = zmq.Context()
        self._keys = KeyPair.generate()
        self._known: set[bytes] = set()
        self._gate = Gate(self._context, lambda key: key in self._known)
        self._gate.start()
        self._router, self._address = bind_router(self._context, self._keys, LOOPBACK, 2**24)
        self.hands: dict[str, Hand] = {}
        self.done: list[StepDone] = []
        self.relayed: list[tuple[WorkerId, WorkerId, list[bytes]]] = []

    def add(self, name: str, **settings: Any) -> Hand:
        keys = KeyPair.generate()
        self._known.add(keys.public)
        links, store = Links(keys, LOOPBACK), TileStore(self._folder / name, 2**30)
        reports: list[Report] = []
        chosen = {"device": torch.device("cpu"), "num_threads": 1, "budget_bytes": 2**40, **settings}
        spool = Spool(self._folder / name, 2**30)
        executor = Executor(links, store, reports.append, ExecutorSettings(**chosen), spool)
        hand = Hand(WorkerId(name), keys, links, executor, store, reports)
        executor.start()
        executor.submit(Attach(worker=hand.name, address=self._address, server_key=self._keys.public))
        self.hands[name] = hand
        return hand

    def begin(
        self,
        plan: Plan,
        modes: Callable[[str, str], bool] = lambda one, other: True,
        kv: Mapping[str, KvOrders] = NOTHING,
    ) -> None:
        """Hand out a plan; `modes(hub side, other)` says whether a link is direct (the second dials).

        Workers that have keys and values to give are told too, and linked to those who get them.
        """
        everybody = tuple(dict.fromkeys([*plan.workers, *(self.hands[name].name for name in kv)]))
        travels = [
            (move.peer, self.hands[name].name) for name, one in kv.items() for move in (*one.gives, *one.mirrors)
        ]
        pairs = {frozenset(pair): pair for pair in [*travels, *plan.links()]}
        orders: dict[str, list[LinkOrder]] = {name: [] for name in everybody}
        for listener, dialler in pairs.values():
            direct = modes(listener, dialler)
            for name, other, mode in ((listener, dialler, LinkMode.LISTEN), (dialler, listener, LinkMode.DIAL)):
                hand = self.hands[other]
                address = hand.links.address.removeprefix("tcp://")
                peer = Peer(worker=hand.name, public_key=hand.keys.public, addresses=(address,))
                orders[name].append(LinkOrder(peer=peer, mode=mode if direct else LinkMode.RELAY))
        for name in everybody:
            hand = self.hands[name]
            entries = tuple(self.entries[tile] for tile in plan.tiles_of(hand.name))
            for entry in hand.store.missing(entries):
                put(hand.store, entry, self.tiles[entry.tile])
            hand.links.admit(order.peer.public_key for order in orders[name])
            hand.executor.submit(Begin(plan=plan, links=tuple(orders[name]), kv=kv.get(name, NO_ORDERS)))
            hand.executor.submit(LoadTiles(epoch=plan.epoch, entries=entries))

    def form(
        self,
        plan: Plan,
        modes: Callable[[str, str], bool] = lambda one, other: True,
        kv: Mapping[str, KvOrders] = NOTHING,
    ) -> None:
        self.begin(plan, modes, kv)
        self.pump(lambda: all(self.ready(name, plan.epoch) for name in {*plan.workers, *kv}))

    def ready(self, name: str, epoch: int) -> Ready | None:
        reports = self.hands[name].reports
        return next((one for one in reports if isinstance(one, Ready) and one.epoch == epoch), None)

    def pump(self, until: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
        """Relay and collect until something is true; fails when it never is."""
        deadline = time.monotonic() + deadline_s
        while not until():
            if time.monotonic() > deadline:
                reports = {name: hand.reports for name, hand in self.hands.items()}
                raise TimeoutError(f"not reached: {reports}")
            if self._router.poll(20):
                self._take()

    def step(
        self,
        plan: Plan,
        number: int,
        rows: Sequence[SessionRows],
        ids: Sequence[int],
        *,
        history: int | None = None,
        sampling: Sampling = GREEDY,
        layers: Span = NO_LAYERS,
    ) -> None:
        """Send a step to the head; `history` of the ids come before the rows of a session that it does not know yet."""
        fresh = tuple(
            SessionSampling(session=one.session, sampling=sampling, history=history)
            for one in rows
            if history is not None
        )
        message = Step(epoch=plan.epoch, step=number, rows=tuple(rows), opens=fresh, layers=layers)
        route = f"{plan.head}/data".encode()
        self._router.send_multipart([route, *encode(message, np.asarray(ids, "<i4").tobytes())])

    def greedy(self, plan: Plan, prompt: Sequence[int], count: int, session: int = 1) -> list[int]:
        """Return `count` tokens after the prompt."""
        return self.go_on(plan, prompt, count, capacity=len(prompt) + count, session=session)[len(prompt) :]

    def go_on(
        self,
        plan: Plan,
        log: Sequence[int],
        count: int,
        *,
        capacity: int,
        computed: int = 0,
        session: int = 1,
        at: int = 0,
        sampling: Sampling = GREEDY,
    ) -> list[int]:
        """Return a session's log with `count` more tokens, of which `computed` positions need not be computed again."""
        tokens, start = list(log), computed
        for number in range(count):
            ids = tokens[start:]
            part = SessionRows(
                session=SessionId(session), start=start, count=len(ids), capacity=capacity, at=at, sample=True
            )
            self.done.clear()
            known = tokens[:start] if number == 0 else []
            self.step(plan, number, [part], known + ids, history=len(known) if number == 0 else None, sampling=sampling)
            self.pump(lambda: bool(self.done))
            start = len(tokens)
            tokens.append(self.done[0].tokens[0].token)
        return tokens

    def remove(self, name: str) -> None:
        """End a worker."""
        hand = self.hands.pop(name)
        hand.executor.submit(Stop())
        assert hand.executor.join(DEADLINE_S)
        hand.store.close()

    def close(self) -> None:
        for hand in self.hands.values():
            hand.executor.submit(Stop())
        for hand in self.hands.values():
            assert hand.executor.join(DEADLINE_S)
            hand.store.close()
        self._router.close(linger=0)
        self._gate.close()
        self._context.term()

    def _take(self) -> None:
        envelope = envelope_of(self._router.recv_multipart(copy=False))
        sender = next(hand for hand in self.hands.values() if hand.keys.public == envelope.public_key)
        header = bytes(envelope.frames[0])
        if header[1] == 37:
            relay = decode(envelope.frames[:1]).message
            assert isinstance(relay, Relay)
            assert relay.source == sender.name
            frames = [bytes(frame) for frame in envelope.frames[1:]]
            self.relayed.append((relay.source, relay.target, frames))
            try:
                self._router.send_multipart([f"{relay.target}/data".encode(), header, *frames])
            except zmq.ZMQError as error:
                assert error.errno == zmq.EHOSTUNREACH  # not connected yet: the hello is repeated
            return
        message = decode(envelope.frames).message
        assert isinstance(message, StepDone)
        self.done.append(message)
