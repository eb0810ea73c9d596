"""The worker's control side: stays in touch with the coordinator and carries out what `worker.state` decides.

Knows nothing of tensors: the compute thread is `worker.executor`, told by commands and heard by reports. Nothing here
computes or reads a disk in the event loop, so heartbeats go out in time whatever else is under way.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import zmq.asyncio

from protocol.errors import (
    AccessRefused,
    CoordinatorLost,
    CoordinatorStale,
    InvariantBroken,
    LinkInvalid,
    VersionMismatch,
)
from protocol.frames import unpack_manifest
from protocol.ids import WorkerId
from protocol.liveness import Backoff, Lease
from protocol.messages import (
    ErrorReport,
    Goodbye,
    HeartbeatReply,
    Leave,
    LeaveAsk,
    Load,
    Probe,
    Reached,
    Release,
    Stock,
    Unload,
    Welcome,
)
from protocol.security import Link
from protocol.sizes import parse_bytes
from worker.addresses import best_first, data_addresses
from worker.commands import Attach, Begin, Drop, Forget, LineBroke, LoadTiles, Report, Rest, Stop
from worker.config import WorkerConfig
from worker.connection import Connection, find_home
from worker.device import executor_settings, profile_of
from worker.events import (
    AskToLeave,
    BeginPlan,
    DropPlan,
    Effect,
    End,
    Event,
    HoldOver,
    HoldPlan,
    LeaveWanted,
    LetGo,
    Silent,
    StartFetch,
    StartLoad,
    StopAsked,
    StopFetch,
    Tell,
    Unloaded,
    Welcomed,
    ordered_by,
)
from worker.executor import Executor
from worker.fetching import Fetching, StockOrder
from worker.groups import most_telling
from worker.identity import Home, Identity
from worker.links import Links
from worker.owner import Owner
from worker.prober import probe
from worker.pulse import heartbeat_of, hello_of, load_progress_of
from worker.spool import Spool
from worker.state import WorkerState, require_current
from worker.store import TileStore
from worker.tile_exchange import TileExchange

JOIN_S = 5.0
_log = logging.getLogger(__name__)


class Control:
    """One worker process. `serve` runs it; `stop` ends it from within the event loop."""

    def __init__(self, config: WorkerConfig) -> None:
        """Open state and cache, bind the listener; raises ConfigInvalid, LinkInvalid, StorageFull."""
        self._config = config
        self._link = Link.parse(config.link) if config.link else None
        if self._link is not None and self._link.role != "join":
            raise LinkInvalid(f"this is a link to {self._link.role}, not to join")
        self._settings = executor_settings(config)
        self._owner = Owner(config.limits())
        self._identity = Identity(config.state_folder)
        self._store = TileStore(config.cache_folder, parse_bytes(config.cache_limit), config.page_cache)
        self._links = Links(self._identity.keys, config.listen)
        spool = Spool(config.cache_folder / "spool", parse_bytes(config.spool_limit))
        self._executor = Executor(self._links, self._store, self._take_report, self._settings, spool)
        self._state = WorkerState()
        self._context = zmq.asyncio.Context()
        self._tiles = TileExchange(config, self._identity.keys, self._store, self._context)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self._group: asyncio.TaskGroup | None = None
        self._fetching = Fetching(self._tiles, self._store, self._apply)
        self._hold: asyncio.TimerHandle | None = None
        self._lease = Lease(3.0)
        self._reached_at: dict[WorkerId, str] = {}
        self._leaving: asyncio.TimerHandle | None = None
        self._end_reason = ""
        self._ending = asyncio.Event()

    def leave(self, reason: str) -> None:
        """Have what this worker does handed over, then end `serve`; asked a second time, end it at once."""
        self._apply(StopAsked(reason=reason) if self._state.leaves_for else LeaveWanted(reason=reason))

    def stop(self, reason: str) -> None:
        """End `serve` at once."""
        self._apply(StopAsked(reason=reason))

    async def serve(self) -> None:
        """Work until stopped; raises what makes going on senseless: AccessRefused, VersionMismatch, and the like."""
        self._loop = asyncio.get_running_loop()
        self._executor.start()
        try:
            work = asyncio.create_task(self._stay_connected())
            ended = asyncio.create_task(self._ending.wait())
            await asyncio.wait((work, ended), return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            if self._ending.is_set():
                if self._connection is not None:
                    await self._connection.farewell(Leave(reason=self._end_reason))
                work.cancel()
                await asyncio.gather(work, return_exceptions=True)
                return
            await work
        finally:
            self._hold_until(None)
            if self._leaving is not None:
                self._leaving.cancel()
            self._executor.submit(Stop())
            if not await asyncio.to_thread(self._executor.join, JOIN_S):
                _log.warning("the compute thread is still busy; it ends with the process")
            self._tiles.close()
            self._store.close()
            self._identity.close()
            self._context.destroy(linger=0)  # not term: one socket forgotten would hold the process for ever

    # ------------------------------------------------------------ being connected

    async def _stay_connected(self) -> None:
        home = await find_home(self._context, self._identity, self._link, self._config)
        waits = Backoff(self._config.redial_first_s, self._config.redial_most_s, random.Random())
        while True:
            try:
                await self._converse(home, waits.reset)
            except (CoordinatorLost, CoordinatorStale) as error:
                if isinstance(error, CoordinatorLost) and not self._state.worker:  # never welcomed: nobody is there
                    raise
                wait_s = waits.next_s()
                _log.warning("%s; dialling %s again in %.1f s", error.message, ", ".join(home.addresses), wait_s)
                await asyncio.sleep(wait_s)

    async def _converse(self, home: Home, on_welcome: Callable[[], None]) -> None:
        """One connection from hello to silence; raises CoordinatorLost at its end."""
        hello = hello_of(
            home.worker,
            self._state,
            profile_of(self._settings),
            data_addresses=data_addresses(self._links.address, self._config.advertise, home.addresses),
            tile_addresses=self._tiles.addresses(home.addresses),
        )
        connection, welcome = await Connection.open(
            self._context, home, self._identity.keys, hello, self._config.connect_timeout_s
        )
        try:
            require_current(welcome.term, self._identity.term_of(home))
            self._connection = connection
            on_welcome()
            self._identity.remember(replace(home, cluster=welcome.cluster, term=welcome.term))
            _log.info("welcome as %s in cluster %s at %s", home.worker, welcome.cluster, connection.address)
            self._executor.submit(
                Attach(
                    worker=home.worker,
                    address=connection.address,
                    server_key=home.server_key,
                    nonce=connection.nonce,
                )
            )
            self._apply(Welcomed(worker=home.worker, term=welcome.term))
            await self._run_connection(connection, welcome)
        finally:
            self._apply(Silent())
            self._connection = None
            connection.close()

    async def _run_connection(self, connection: Connection, welcome: Welcome) -> None:
        self._lease = Lease(welcome.lease_s)
        self._lease.heard(time.monotonic())
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(connection.write())
                group.create_task(connection.watch())
                group.create_task(self._fetching.serve(connection, self._state.worker))
                group.create_task(self._beat(connection, welcome))
                group.create_task(self._listen(connection))
                group.create_task(self._owner.watch())
        except BaseExceptionGroup as group_error:
            raise most_telling(group_error) from None
        finally:
            self._group = None

    async def _beat(self, connection: Connection, welcome: Welcome) -> None:
        """Send heartbeats; raises CoordinatorLost when the lease is over."""
        sequence = 0
        while True:
            silence_s = self._lease.silence_s(time.monotonic())
            if self._lease.is_over(time.monotonic()):
                raise CoordinatorLost(f"the coordinator was not heard for {silence_s:.1f} s")
            connection.say(heartbeat_of(self._state, self._executor, sequence, self._owner.reason))
            if (progress := load_progress_of(self._state, self._executor)) is not None:
                connection.say(progress)
            sequence += 1
            await asyncio.sleep(welcome.heartbeat_s)

    async def _listen(self, connection: Connection) -> None:
        while True:
            message, payload = await connection.hear()
            self._lease.heard(time.monotonic())
            self._take(connection, message, payload)

    def _take(self, connection: Connection, message: Any, payload: memoryview) -> None:
        match message:
            case HeartbeatReply() | Welcome():
                pass
            case Probe():
                self._spawn(self._answer_probe(connection, message))
            case Load():
                entries = unpack_manifest(payload)
                self._tiles.ordered(entries, message.links, message.holders)
                self._apply(ordered_by(message, entries))
            case Stock():
                entries = unpack_manifest(payload)
                self._tiles.ordered(entries, (), message.holders)
                self._fetching.stock(StockOrder(message, entries))
            case Unload():
                _log.info("epoch %d is over: %s", message.epoch, message.reason)
                self._apply(Unloaded(epoch=message.epoch))
            case Goodbye():
                self._apply(LetGo(reason=message.reason or "the coordinator lets it go"))
            case Release():
                self._executor.submit(Forget(sessions=message.sessions))
            case ErrorReport():
                error = message.error()
                if isinstance(error, AccessRefused | VersionMismatch):
                    raise error
                raise CoordinatorLost(f"the coordinator let us go: {error.message}", remedy=error.remedy)
            case _:
                _log.warning("a %s is not for a worker's control side", type(message).__name__)

    # ------------------------------------------------------------ events and effects

    def _take_report(self, report: Report) -> None:
        """Bring the compute thread's report into the event loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._consider, report)

    def _consider(self, report: Report) -> None:
        if not isinstance(report, LineBroke):
            self._apply(report)
        elif self._connection is not None and self._connection.nonce == report.nonce:
            self._connection.broke(report.error)

    def _apply(self, event: Event) -> None:
        for effect in self._state.handle(event):
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case BeginPlan(plan=plan, links=links, kv=kv):
                self._hold_until(None)
                self._links.admit(order.peer.public_key for order in links)
                self._executor.submit(
                    Begin(plan=plan, links=tuple(best_first(link, self._reached_at) for link in links), kv=kv)
                )
            case StartFetch(epoch=epoch):
                self._fetching.for_plan(effect)
                _log.info("epoch %d: %d tiles", epoch, len(effect.entries))
            case StopFetch():
                self._fetching.stop()
            case StartLoad(epoch=epoch, entries=entries):
                self._executor.submit(LoadTiles(epoch=epoch, entries=entries))
            case HoldPlan(epoch=epoch):
                self._executor.submit(Rest(epoch=epoch))
                self._hold_until(self._config.hold_s)
            case DropPlan():
                self._executor.submit(Drop())
            case Tell(message=message):
                _log.info("telling the coordinator: %s", message)
                if self._connection is not None:
                    self._connection.say(message)
            case AskToLeave(reason=reason):
                _log.info("%s: handing over before leaving; a second time ends at once", reason)
                self._ask_to_leave(reason)
            case End(reason=reason):
                _log.info("ending: %s", reason)
                self._end_reason = reason
                self._ending.set()

    def _ask_to_leave(self, reason: str) -> None:
        if self._connection is not None:
            self._connection.say(LeaveAsk(reason=reason))
        if self._loop is not None:
            late = LetGo(reason=f"{reason}; nobody took over within {self._config.leave_timeout_s:g} s")
            self._leaving = self._loop.call_later(self._config.leave_timeout_s, self._apply, late)

    def _hold_until(self, hold_s: float | None) -> None:
        """Start the time for which a plan's leavings are kept; None: a new plan has come."""
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        if hold_s is not None and self._loop is not None:
            self._hold = self._loop.call_later(hold_s, self._apply, HoldOver())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if self._group is None:
            work.close()
            raise InvariantBroken("there is no connection to work for")
        return self._group.create_task(work)

    async def _answer_probe(self, connection: Connection, asked: Probe) -> None:
        self._links.admit(peer.public_key for peer in asked.peers)
        self._tiles.met(asked.peers)
        own = self._state.worker
        reached = await probe(self._context, self._identity.keys, own, asked.peers)
        self._reached_at.update(reached)
        connection.say(Reached(probe=asked.probe, workers=tuple(reached)))
