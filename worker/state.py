"""What a worker's control side does about each thing that happens: events in, effects out.

Knows nothing of sockets, threads or clocks. A newer `Load` takes the place of an older one in any phase; what an older
epoch still reports is dropped.

    IDLE --Ordered--> FETCHING --Fetched--> LOADING --Ready--> READY
                          ^----TilesSpoiled----'
    any of these --FetchFailed, Failed--> FAILED
    any of these, FAILED too --Unloaded, Silent--> HELD --Ordered--> FETCHING
                                                    '---HoldOver---> IDLE

A plan that is over leaves tiles, blocks, keys and values behind for the next one, which may come from a coordinator
that has just been started again. Only when none has come for long is everything freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from protocol.errors import ManyhandsError
from protocol.ids import WorkerId
from protocol.messages import ErrorReport, Fault, Holder, LinkOrder, Load, Loaded, WorkerPhase
from protocol.plans import Plan
from protocol.tiles import TileEntry
from worker.commands import NO_ORDERS, Failed, KvOrders, Ready, TilesSpoiled

MAX_FETCHES: Final = 3


class Phase(StrEnum):
    """Where this worker stands with the plan."""

    IDLE = "idle"
    FETCHING = "fetching"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"  # told the coordinator, which will unload or load anew
    HELD = "held"  # no plan; what the last one left is kept for the next
    ENDING = "ending"


TOLD_AS: Final = {
    Phase.IDLE: WorkerPhase.IDLE,
    Phase.FETCHING: WorkerPhase.LOADING,
    Phase.LOADING: WorkerPhase.LOADING,
    Phase.READY: WorkerPhase.READY,
    Phase.FAILED: WorkerPhase.IDLE,
    Phase.HELD: WorkerPhase.IDLE,
    Phase.ENDING: WorkerPhase.LEAVING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcomed:
    """The coordinator has let us in; another `term` than before means that it has restarted and counts anew."""

    worker: WorkerId
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """A `Load` came."""

    plan: Plan
    links: tuple[LinkOrder, ...]
    entries: tuple[TileEntry, ...]
    kv: KvOrders = NO_ORDERS
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """All tiles of this epoch are on disk."""

    epoch: int
    fetched_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailed:
    """The tiles of this epoch can't be had."""

    epoch: int
    error: ManyhandsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """An `Unload` came."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """The coordinator was not heard for the length of its lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldOver:
    """No plan has come for as long as the last one's leavings are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """The owner wants this worker to end."""

    reason: str


News = Fetched | FetchFailed | Ready | TilesSpoiled | Failed
Event = Welcomed | Ordered | Unloaded | Silent | HoldOver | StopAsked | News


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginPlan:
    """Tell the compute thread of the plan, and admit its neighbours."""

    plan: Plan
    links: tuple[LinkOrder, ...]
    kv: KvOrders = NO_ORDERS


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFetch:
    """Fetch what is missing of these tiles, from these holders if they can, in place of any fetch under way."""

    epoch: int
    entries: tuple[TileEntry, ...]
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StopFetch:
    """Give up the fetch under way; what came stays on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartLoad:
    """Have the compute thread load the tiles."""

    epoch: int
    entries: tuple[TileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldPlan:
    """Have the compute thread end this epoch and keep what it left; say `HoldOver` when that has been long."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPlan:
    """Have the compute thread free everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Send this to the coordinator."""

    message: Loaded | Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Say goodbye and end."""

    reason: str


Effect = BeginPlan | StartFetch | StopFetch | StartLoad | HoldPlan | DropPlan | Tell | End


def ordered_by(load: Load, entries: tuple[TileEntry, ...]) -> Ordered:
    """Return the event of a `Load` whose payload is the manifest lines `entries`."""
    kv = KvOrders(carries=load.carries, gives=load.gives, takes=load.takes, mirrors=load.mirrors)
    return Ordered(plan=load.plan, links=load.links, entries=entries, kv=kv, holders=load.holders)


class WorkerState:
    """The worker's side of forming; heartbeats tell `phase` and `epoch`, `worker` is its name once it is welcomed.

    `held_epoch`: the plan whose leavings are kept, or the one under way; 0 when nothing is.
    """

    def __init__(self) -> None:
        self.phase = Phase.IDLE
        self.epoch = 0
        self.held_epoch = 0
        self._newest = 0
        self._term = 0
        self.worker = WorkerId("")
        self._entries: tuple[TileEntry, ...] = ()
        self._holders: tuple[Holder, ...] = ()
        self._num_fetches = 0
        self._fetched_bytes = 0

    def handle(self, event: Event) -> list[Effect]:
        """Take an event and return what to do, in order."""
        if self.phase is Phase.ENDING:
            return []
        match event:
            case Welcomed(worker=worker, term=term):
                return self._welcomed(worker, term)
            case Ordered():
                return self._ordered(event)
            case Unloaded(epoch=epoch):
                self._newest = max(self._newest, epoch)
                return self._hold() if self.epoch <= epoch else []
            case Silent():
                return self._hold()
            case HoldOver():
                return self._drop() if self.phase is Phase.HELD else []
            case StopAsked(reason=reason):
                effects = [*self._hold(), *self._drop()]
                self.phase = Phase.ENDING
                return [*effects, End(reason=reason)]
            case _:
                return self._advance(event) if event.epoch == self.epoch != 0 else []

    def _welcomed(self, worker: WorkerId, term: int) -> list[Effect]:
        effects = self._hold()
        if term != self._term:
            self._newest = 0
        self.worker, self._term = worker, term
        return effects

    def _ordered(self, event: Ordered) -> list[Effect]:
        if event.plan.epoch <= self._newest:  # a repeated or overtaken order
            return []
        effects: list[Effect] = [StopFetch()] if self.phase is Phase.FETCHING else []
        self.epoch = self.held_epoch = self._newest = event.plan.epoch
        self.phase = Phase.FETCHING
        self._entries, self._holders = event.entries, event.holders
        self._num_fetches, self._fetched_bytes = 1, 0
        return [
            *effects,
            BeginPlan(plan=event.plan, links=event.links, kv=event.kv),
            self._start_fetch(),
        ]

    def _advance(self, event: News) -> list[Effect]:
        """Take news of the current epoch."""
        match event:
            case Fetched(fetched_bytes=fetched_bytes) if self.phase is Phase.FETCHING:
                self.phase = Phase.LOADING
                self._fetched_bytes += fetched_bytes
                return [StartLoad(epoch=self.epoch, entries=self._entries)]
            case TilesSpoiled(error=error) if self.phase is Phase.LOADING:
                if self._num_fetches >= MAX_FETCHES:
                    return self._fail(error, "")
                self._num_fetches += 1
                self.phase = Phase.FETCHING
                return [self._start_fetch()]
            case Ready() if self.phase is Phase.LOADING:
                self.phase = Phase.READY
                return [Tell(message=self._loaded(event))]
            case FetchFailed(error=error) if self.phase is Phase.FETCHING:
                return self._fail(error, "")
            case Failed(error=error, lost=lost) if self.phase is not Phase.FAILED:
                return self._fail(error, lost)
            case _:
                return []

    def _start_fetch(self) -> StartFetch:
        return StartFetch(epoch=self.epoch, entries=self._entries, holders=self._holders)

    def _loaded(self, ready: Ready) -> Loaded:
        return Loaded(
            epoch=self.epoch,
            weight_bytes=ready.weight_bytes,
            fetched_bytes=self._fetched_bytes,
            resident_bytes=ready.resident_bytes,
            load_s=ready.load_s,
            predicted_bytes=ready.predicted_bytes,
            pinned_bytes=ready.pinned_bytes,
            window_bytes=ready.window_bytes,
            held=ready.held,
        )

    def _fail(self, error: ManyhandsError, lost: str) -> list[Effect]:
        effects: list[Effect] = [StopFetch()] if self.phase is Phase.FETCHING else []
        self.phase = Phase.FAILED
        report = ErrorReport.of(error, node=self.worker)
        return [*effects, Tell(message=Fault(epoch=self.epoch, error=report, lost=lost))]

    def _hold(self) -> list[Effect]:
        """End the plan under way, if there is one, and keep what it leaves."""
        if not self.epoch:
            return []
        effects: list[Effect] = [StopFetch()] if self.phase is Phase.FETCHING else []
        effects.append(HoldPlan(epoch=self.epoch))
        self.phase = Phase.HELD
        self.epoch = 0
        self._entries, self._holders = (), ()
        return effects

    def _drop(self) -> list[Effect]:
        """Let go of what is held."""
        effects: list[Effect] = [DropPlan()] if self.phase is Phase.HELD else []
        self.phase = Phase.IDLE
        self.held_epoch = 0
        return effects
