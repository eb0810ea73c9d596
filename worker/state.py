"""What a worker's control side does about each thing that happens: events in, effects out.

Knows nothing of sockets, threads or clocks. A newer `Load` takes the place of an older one in any phase; what an older
epoch still reports is dropped.

    IDLE --Ordered--> FETCHING --Fetched--> LOADING --Ready--> READY
                          ^----TilesSpoiled----'
    any of these --FetchFailed, Failed--> FAILED
    any of these, FAILED too --Unloaded, Silent--> HELD --Ordered--> FETCHING
                                                    '---HoldOver---> IDLE
    any of these --LetGo, StopAsked--> ENDING

A plan that is over leaves tiles, blocks, keys and values behind for the next one, which may come from a coordinator
that has just been started again. Only when none has come for long is everything freed. A worker that has a part in a
plan asks to leave first (`LeaveWanted`), and goes when the coordinator lets it, or falls silent.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from protocol.errors import CoordinatorStale, ManyhandsError
from protocol.ids import WorkerId
from protocol.messages import ErrorReport, Fault, Holder, Loaded, WorkerPhase
from protocol.tiles import TileEntry
from worker.commands import Failed, Ready, TilesSpoiled
from worker.events import (
    AskToLeave,
    BeginPlan,
    DropPlan,
    Effect,
    End,
    Event,
    Fetched,
    FetchFailed,
    HoldOver,
    HoldPlan,
    LeaveWanted,
    LetGo,
    News,
    Ordered,
    Silent,
    StartFetch,
    StartLoad,
    StopAsked,
    StopFetch,
    Tell,
    Unloaded,
    Welcomed,
)

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


def require_current(term: int, highest: int) -> None:
    """Raise CoordinatorStale for a coordinator of a lower term than the highest that this worker has obeyed.

    A coordinator takes a higher term at every start, so whoever has a lower one was replaced and does not know: two
    must never drive one worker.
    """
    if term < highest:
        raise CoordinatorStale(f"it is of term {term}, and this worker has obeyed one of term {highest}", phase="hello")


class WorkerState:
    """The worker's side of forming; heartbeats tell `phase` and `epoch`, `worker` is its name once it is welcomed.

    `held_epoch`: the plan whose leavings are kept, or the one under way; 0 when nothing is. `leaves_for`: why it has
    asked to leave; empty when it has not.
    """

    def __init__(self) -> None:
        self.phase = Phase.IDLE
        self.epoch = 0
        self.held_epoch = 0
        self.leaves_for = ""
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
                return self._end(self.leaves_for) if self.leaves_for else self._hold()
            case HoldOver():
                return self._drop() if self.phase is Phase.HELD else []
            case LeaveWanted(reason=reason) if self.epoch:
                self.leaves_for = reason
                return [AskToLeave(reason=reason)]
            case LeaveWanted(reason=reason) | LetGo(reason=reason) | StopAsked(reason=reason):
                return self._end(reason)
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
            knows_layers=True,
        )

    def _fail(self, error: ManyhandsError, lost: str) -> list[Effect]:
        effects: list[Effect] = [StopFetch()] if self.phase is Phase.FETCHING else []
        self.phase = Phase.FAILED
        report = ErrorReport.of(error, node=self.worker)
        return [*effects, Tell(message=Fault(epoch=self.epoch, error=report, lost=lost))]

    def _end(self, reason: str) -> list[Effect]:
        effects = [*self._hold(), *self._drop()]
        self.phase = Phase.ENDING
        return [*effects, End(reason=reason)]

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
