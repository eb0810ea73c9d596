"""Whom to ask for which bytes, in a seeded world in virtual time: loss, slow peers, liars, peers that vanish."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from test_fetch import entries_of

from protocol.errors import DeadlineExceeded, FrameMalformed, Overloaded, TileUnavailable
from protocol.ids import WorkerId
from protocol.messages import Holder, Peer, TileRequest
from protocol.specs import Span
from protocol.tiles import TileEntry, TileId, TileKind
from worker.fetch_actions import Action, Append, Ask, Finish, HangUp, Open
from worker.fetch_plan import HELD_BYTES, FetchPlan
from worker.fetch_sources import COORDINATOR, MAX_PIECES, holdings

TICK_S = 0.1
LONGEST_S = 600.0


@dataclass
class FakeSource:
    """A source in virtual time: answers one request after the other at its rate."""

    rate: float = 1e6  # bytes a second
    delay_s: float = 0.005
    lies: float = 0.0  # how often a chunk is wrong
    cuts: float = 0.0  # how often a chunk has another length
    loses: float = 0.0  # how often an answer is lost
    is_busy: float = 0.0  # how often it says that it has too much to do
    lacks: frozenset[bytes] = frozenset()
    gone_at: float = 1e9  # from then on it says nothing
    breaks: bool = True  # and its connection breaks at once, so that this is known
    free_at: float = 0.0
    asked: list[TileRequest] = field(default_factory=list)
    is_final: bool = False


class World:
    """One fetch against fake sources; the invariants are checked as it goes."""

    def __init__(
        self,
        tiles: dict[TileEntry, bytes],
        sources: dict[WorkerId, FakeSource],
        seed: int = 0,
        *,
        holds: dict[WorkerId, set[bytes]] | None = None,
        have: int = 0,
        chunk_bytes: int = 64,
    ) -> None:
        self.dice = random.Random(seed)
        self.tiles = {entry.digest: data for entry, data in tiles.items()}
        self.sources = sources
        self.now = 100.0
        self.have = have
        held = {one: set(self.tiles) for one in sources if one != COORDINATOR} | (holds or {})
        self.plan = FetchPlan(tiles, held, now=self.now, chunk_bytes=chunk_bytes)
        self.disk: dict[bytes, bytearray] = {}
        self.done: set[bytes] = set()
        self.events: list[tuple[float, int, Callable[[], list[Action]]]] = []
        self.hung_up: list[HangUp] = []
        self.lost: Counter[tuple[WorkerId, bytes, int]] = Counter()

    def run(self) -> None:
        """Until all tiles are verified, or an error."""
        started = self.now
        while not self.plan.is_done:
            assert self.now - started < LONGEST_S
            self.carry_out(self.plan.next_actions(self.now))
            if self.events and self.events[0][0] <= self.now + TICK_S:
                self.now, _, event = heapq.heappop(self.events)
                self.carry_out(event())
            else:
                self.now += TICK_S
        assert self.done == set(self.tiles)
        assert {digest: bytes(data) for digest, data in self.disk.items()} == self.tiles

    def carry_out(self, actions: list[Action]) -> None:
        todo = list(actions)
        while todo:
            match todo.pop(0):
                case Open(entry):
                    self.disk[entry.digest] = bytearray(self.tiles[entry.digest][: min(self.have, entry.num_bytes)])
                    todo += self.plan.opened(entry.digest, len(self.disk[entry.digest]))
                case Ask(source, request):
                    self.ask(source, request)
                case Append(entry, data):
                    self.disk[entry.digest] += data
                    assert len(self.disk[entry.digest]) <= entry.num_bytes
                case Finish(entry):
                    assert entry.digest not in self.done
                    if self.disk[entry.digest] == self.tiles[entry.digest]:
                        self.done.add(entry.digest)
                        self.plan.verified(entry.digest)
                    else:
                        self.have = 0
                        todo += self.plan.spoiled(entry.digest)
                case HangUp() as hang_up:
                    self.hung_up.append(hang_up)
                    self.sources[hang_up.source].is_final |= hang_up.is_final
                    self.sources[hang_up.source].free_at = self.now

    def ask(self, name: WorkerId, request: TileRequest) -> None:
        source = self.sources[name]
        assert not source.is_final
        assert request.offset + request.length <= len(self.tiles[request.digest])
        source.asked.append(request)
        assert len(self.plan._sources[name].under_way) <= MAX_PIECES
        assert self.plan._held_bytes() <= HELD_BYTES + request.length
        if self.now >= source.gone_at:
            if source.breaks:
                self.later(0.001, lambda: self.plan.failed(name, "gone", self.now))
            return
        if self.happens(source.loses):
            self.lost[name, request.digest, request.offset] += 1
            return
        source.free_at = max(self.now, source.free_at) + request.length / source.rate
        answer_s = source.free_at - self.now + source.delay_s * self.dice.uniform(0.5, 1.5)
        if self.now + answer_s >= source.gone_at:
            if source.breaks:
                self.later(source.gone_at - self.now, lambda: self.plan.failed(name, "gone", self.now))
            return
        self.later(answer_s, lambda: self.answer(name, source, request))

    def answer(self, name: WorkerId, source: FakeSource, request: TileRequest) -> list[Action]:
        if request.digest in source.lacks:
            return self.plan.refused(name, request.digest, TileUnavailable("not here"), self.now)
        if self.happens(source.is_busy):
            return self.plan.refused(name, request.digest, Overloaded("busy"), self.now)
        data = self.tiles[request.digest][request.offset : request.offset + request.length]
        if self.happens(source.lies):
            data = bytes(len(data) - 1) + bytes([data[-1] ^ 1])
        if self.happens(source.cuts):
            data = data[:-1]
        actions = self.plan.received(name, request.digest, request.offset, memoryview(data), self.now)
        assert self.plan.received(name, request.digest, request.offset, memoryview(data), self.now) == []  # repeated
        return actions

    def happens(self, chance: float) -> bool:
        return chance > 0 and self.dice.random() < chance

    def later(self, delay_s: float, event: Callable[[], list[Action]]) -> None:
        heapq.heappush(self.events, (self.now + delay_s, self.dice.getrandbits(62), event))


A, B = WorkerId("a"), WorkerId("b")


def random_source(dice: random.Random) -> FakeSource:
    source = FakeSource(rate=10 ** dice.uniform(2, 6), delay_s=10 ** dice.uniform(-3, -0.5))
    match dice.randrange(8):
        case 0:
            source.lies = dice.choice([0.05, 1.0])
        case 1:
            source.loses = dice.choice([0.1, 1.0])
        case 2:
            source.gone_at, source.breaks = 100 + dice.uniform(0, 5), dice.random() < 0.5
        case 3:
            source.cuts = 0.1
        case 4:
            source.is_busy = 0.2
    return source


FOUND = [4038]  # two in turn silent, each of whom kept all others from a doubtful tile


@pytest.mark.parametrize("seeds", [FOUND, *(range(first, first + 40) for first in range(0, 160, 40))])
def test_any_peers_and_a_coordinator_that_lives_give_every_byte(seeds: Sequence[int]) -> None:
    for seed in seeds:
        dice = random.Random(seed)
        tiles = entries_of([dice.randrange(1, 2000) for _ in range(dice.randrange(1, 25))])
        sources = {WorkerId(f"peer{number}"): random_source(dice) for number in range(dice.randrange(5))}
        for source in sources.values():
            source.lacks = frozenset(entry.digest for entry in tiles if dice.random() < 0.1)
        sources[COORDINATOR] = FakeSource(rate=10 ** dice.uniform(3, 6), loses=dice.choice([0, 0, 0.1]))
        world = World(tiles, sources, seed, have=dice.choice([0, 0, 50]), chunk_bytes=dice.choice([16, 300]))
        try:
            world.run()
        except Exception as error:
            again = max((times for (name, *_), times in world.lost.items() if name == COORDINATOR), default=0)
            if isinstance(error, DeadlineExceeded) and again >= 3:  # about as often as there is time to ask
                continue
            raise AssertionError(f"seed {seed}") from error
        liars = {name for name, source in sources.items() if source.lies or source.cuts}
        dropped = {one.source for one in world.hung_up if one.is_final}
        blamed = {one.source for one in world.hung_up if "altered" in one.reason}
        assert not blamed or blamed & liars, seed
        assert COORDINATOR not in dropped


def test_peers_share_the_work_as_fast_as_they_are_and_spare_the_coordinator() -> None:
    tiles = entries_of([4000] * 200)
    sources = {A: FakeSource(rate=600_000.0), B: FakeSource(rate=200_000.0), COORDINATOR: FakeSource(rate=100_000.0)}
    world = World(tiles, sources, chunk_bytes=2**20)
    world.run()
    fetched = world.plan.fetched_bytes
    assert 2 < fetched[A] / fetched[B] < 4.5
    assert fetched[COORDINATOR] < 0.05 * fetched.total()
    assert world.now - 100 < 2 * 800_000 / 800_000


def test_the_coordinator_gives_what_no_peer_has_and_helps_where_it_is_faster() -> None:
    tiles = entries_of([4000] * 100)
    entries = list(tiles)
    half = {entry.digest for entry in entries[:50]}
    sources = {A: FakeSource(), COORDINATOR: FakeSource()}
    world = World(tiles, sources, holds={A: half}, chunk_bytes=4096)
    world.run()
    assert world.plan.fetched_bytes[A] > 190_000  # the coordinator helps once, until it is known how fast the peer is
    slow = World(tiles, {A: FakeSource(rate=10_000.0), COORDINATOR: FakeSource(rate=100_000.0)}, chunk_bytes=4096)
    slow.run()
    assert slow.plan.fetched_bytes[COORDINATOR] > slow.plan.fetched_bytes[A] > 0
    assert slow.now - 100 < 8


def test_what_a_slow_peer_still_owes_is_asked_of_a_fast_one_at_the_end() -> None:
    tiles = entries_of([30_000] * 4)
    sources = {A: FakeSource(rate=1e6), B: FakeSource(rate=500.0), COORDINATOR: FakeSource(rate=1e6)}
    world = World(tiles, sources, chunk_bytes=8192)
    world.run()
    assert world.now - 100 < 3  # the slow one alone would take 16 s for its first bite


def test_a_liar_is_found_by_its_first_tile_and_never_asked_again() -> None:
    tiles = entries_of([50] * 40)
    sources = {A: FakeSource(lies=1.0), B: FakeSource(), COORDINATOR: FakeSource()}
    world = World(tiles, sources)
    world.run()
    (hang_up,) = world.hung_up
    assert (hang_up.source, hang_up.is_final) == (A, True)
    assert "arrived altered" in hang_up.reason
    assert world.plan.num_altered == {A: 1}
    assert world.plan.fetched_bytes[COORDINATOR] == 0


def test_of_two_who_gave_an_altered_tile_the_liar_is_found() -> None:
    tiles = entries_of([200_000] * 3)
    sources = {A: FakeSource(lies=0.5, rate=1e5), B: FakeSource(rate=1e5), COORDINATOR: FakeSource(rate=1e3)}
    for seed in range(20):
        world = World(tiles, sources, seed, chunk_bytes=4096)
        world.run()
        assert [one.source for one in world.hung_up if one.is_final] == [A]
        assert world.plan.num_altered[B] <= 1
        sources[A].is_final = False


@pytest.mark.parametrize("breaks", [True, False])
def test_when_all_peers_are_gone_the_coordinator_gives_the_rest(breaks: bool) -> None:
    tiles = entries_of([5000] * 20)
    gone = {one: FakeSource(rate=20_000.0, gone_at=101.0, breaks=breaks) for one in (A, B)}
    world = World(tiles, gone | {COORDINATOR: FakeSource(rate=10_000.0)}, chunk_bytes=1000)
    world.run()
    assert all(world.plan.fetched_bytes[one] > 5000 for one in (A, B, COORDINATOR))


def test_peers_alone_are_enough() -> None:
    tiles = entries_of([5000] * 20)
    nothing = frozenset(entry.digest for entry in tiles)
    mute = FakeSource(loses=1.0)
    for coordinator in (FakeSource(lacks=nothing), mute, FakeSource(is_busy=1.0)):
        world = World(tiles, {A: FakeSource(rate=10_000.0), COORDINATOR: coordinator})
        world.run()
        assert world.plan.fetched_bytes[A] == sum(map(len, tiles.values()))


def test_a_tile_that_nobody_has_ends_the_fetch_with_what_the_coordinator_said() -> None:
    tiles = entries_of([500] * 4)
    lacks = frozenset([list(tiles)[2].digest])
    sources = {A: FakeSource(lacks=lacks), COORDINATOR: FakeSource(lacks=lacks)}
    with pytest.raises(TileUnavailable, match="not here"):
        World(tiles, sources).run()


def test_silence_of_all_ends_the_fetch_and_names_tiles() -> None:
    tiles = entries_of([500] * 4)
    world = World(tiles, {A: FakeSource(loses=1.0), COORDINATOR: FakeSource(loses=1.0)})
    with pytest.raises(DeadlineExceeded, match=r"layer \d ffn\.0"):
        world.run()
    assert 114 < world.now < 116
    world = World(tiles, {COORDINATOR: FakeSource(rate=20.0, delay_s=0)}, chunk_bytes=64)  # slow, and never silent
    world.run()
    assert world.now > 200


def test_a_coordinator_whose_bytes_are_altered_has_three_tries_and_then_peers_may() -> None:
    tiles = entries_of([100])
    with pytest.raises(TileUnavailable, match=r"layer 0 ffn\.0 arrived altered 3 times"):
        World(tiles, {COORDINATOR: FakeSource(lies=1.0)}).run()
    late = FakeSource(is_busy=0.9)
    world = World(tiles, {A: late, COORDINATOR: FakeSource(lies=1.0)}, seed=3)
    world.run()
    assert world.plan.fetched_bytes[A] == len(next(iter(tiles.values())))


def test_a_chunk_of_another_length_names_its_tile_and_ends_a_peer() -> None:
    tiles = entries_of([100])
    with pytest.raises(FrameMalformed, match=r"layer 0 ffn\.0"):
        World(tiles, {COORDINATOR: FakeSource(cuts=1.0)}).run()
    world = World(tiles, {A: FakeSource(cuts=1.0), COORDINATOR: FakeSource()})
    world.run()
    assert [(one.source, one.is_final) for one in world.hung_up] == [(A, True)]


def test_a_peer_that_can_not_be_reached_is_tried_three_times() -> None:
    tiles = entries_of([100_000])
    sources = {A: FakeSource(gone_at=0.0), COORDINATOR: FakeSource(rate=10_000.0)}
    world = World(tiles, sources, chunk_bytes=5000)
    world.run()
    assert [one.is_final for one in world.hung_up] == [False, False, True]


def test_who_is_said_to_have_which_tiles() -> None:
    def tile(layer: int, kind: TileKind, index: int = 0) -> TileEntry:
        return TileEntry(TileId(layer, kind, index), 1, bytes([layer + 2, len(kind), index, *bytes(29)]))

    def holder(name: str, layers: Span, groups: Span, ffn: Span, *addresses: str) -> Holder:
        peer = Peer(worker=WorkerId(name), public_key=name.encode() * 40, addresses=addresses)
        return Holder(peer=peer, layers=layers, groups=groups, ffn=ffn)

    norms, group, ffn = tile(1, TileKind.NORMS), tile(1, TileKind.ATTENTION, 1), tile(2, TileKind.FFN, 3)
    private = [tile(-1, kind) for kind in (TileKind.EMBEDDING, TileKind.FINAL_NORM, TileKind.LM_HEAD)]
    holders = [
        holder("a", Span(1, 2), Span(1, 2), Span(0, 9), "a:1"),
        holder("a", Span(2, 3), Span(0, 0), Span(3, 4), "a:1"),
        holder("b", Span(0, 9), Span(0, 1), Span(0, 3)),  # it serves none
        holder("c", Span(5, 9), Span(0, 9), Span(0, 9), "c:1"),  # nothing that is wanted
        holder("d", Span(0, 9), Span(0, 9), Span(0, 9), "d:1"),  # this worker itself
    ]
    peers, held = holdings(holders, [norms, group, ffn, *private], b"d" * 40)
    assert set(peers) == {"a"}
    assert held == {"a": {norms.digest, group.digest, ffn.digest}}
