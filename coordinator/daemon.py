"""The coordinator's life: open state and model, listen, serve until told to stop, say goodbye, close everything.

Knows nothing of single messages (`coordinator.switchboard`) or decisions (`coordinator.state`).

    receive -> switchboard -> events -> core -> effects -> actor -> send
    tick ----------------------^
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final

import psutil

from coordinator.actor import Actor
from coordinator.addresses import advertised, reachable_here
from coordinator.client_side import ClientSide
from coordinator.config import CoordinatorConfig, with_port
from coordinator.desk import Desk
from coordinator.events import Stopping, Tick
from coordinator.exchange import Broken, Exchange
from coordinator.invitations import Invitations
from coordinator.startup import TOKENS_FILE, Home, Model, Progress, open_model, told_progress
from coordinator.state import ClusterState
from coordinator.status import RimCounts, render_status
from coordinator.switchboard import Switchboard
from coordinator.takeover import take_over
from coordinator.tile_service import TileService
from coordinator.token_log import TokenLog
from coordinator.worker_side import WorkerSide
from protocol.errors import Cancelled, ConfigInvalid, InvariantBroken, ManyhandsError, Overloaded
from protocol.messages import VERSION, Welcome
from protocol.version import SOFTWARE

TICK_S: Final = 0.1
MESSAGES_A_TURN: Final = 64  # after so many without a pause, let timers and tile reads have their turn
PROMPT_THREADS: Final = 2
GOODBYE_S: Final = 0.2
STOP_GRACE_S: Final = 2.0
SESSIONS_PER_TERM: Final = 1 << 24  # a number is never used twice: workers may still hold what they computed for it

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Where a coordinator listens. `client_link` holds a secret, so it does not show in repr."""

    addresses: tuple[str, ...]
    client_link: str = field(repr=False)
    cluster: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Callbacks:
    """How the coordinator tells who started it. All are called in the event loop, but `on_progress` in a thread.

    `on_join_link` gets the first join link, and a new one whenever the last was spent or has expired.
    """

    on_progress: Progress | None = None
    on_ready: Callable[[Ready], None] = lambda ready: None
    on_join_link: Callable[[str], None] = lambda link: None


async def serve(config: CoordinatorConfig, stop: asyncio.Event, callbacks: Callbacks | None = None) -> None:
    """Run a coordinator until `stop` is set; then every client and worker is told, and everything closed.

    Raises what opening state, model and socket raise (ConfigInvalid, CheckpointInvalid, ModelUnsupported, StorageFull,
    PlanImpossible), and Cancelled when it is stopped before it listens.
    """
    callbacks = callbacks or Callbacks()
    with ExitStack() as opened:
        home = Home.open(config, time.time())
        opened.callback(home.close)
        # A rehearsal: that the port is taken should be told before minutes of hashing, not after.
        Exchange(with_port(config.host, config.port), home.server_keys, home.book.knows).close()
        model = await _open_model(config, stop, callbacks.on_progress)
        tiles = TileService(model.catalogue)
        opened.callback(tiles.close)
        prompt_pool = ThreadPoolExecutor(PROMPT_THREADS, "prompt")
        opened.callback(prompt_pool.shutdown, cancel_futures=True)
        log = TokenLog.open(home.folder / TOKENS_FILE, model.identity())
        opened.callback(log.close)
        exchange = _listen(config, home)
        opened.callback(exchange.close)
        daemon = Daemon(config=config, home=home, model=model, exchange=exchange, log=log, callbacks=callbacks)
        daemon.connect(tiles, prompt_pool)
        await daemon.run(stop)


def _listen(config: CoordinatorConfig, home: Home) -> Exchange:
    """Listen; with port 0 where the last start listened, so that workers and clients find this one, if that is free."""
    ports = [config.port] if config.port else [home.journal.port(), 0]
    for port in ports:
        try:
            exchange = Exchange(with_port(config.host, port), home.server_keys, home.book.knows)
        except ConfigInvalid as error:
            if port == ports[-1]:
                raise
            _log.warning("the port of the last start can't be used again, so it will be another one: %s", error)
        else:
            home.journal.put_port(exchange.port)
            return exchange
    raise InvariantBroken("no port was tried")


async def _open_model(config: CoordinatorConfig, stop: asyncio.Event, on_progress: Progress | None) -> Model:
    """Open the model in a thread; raises Cancelled when `stop` is set before it is open.

    Hashing ends at the next tile. A download can't be ended: after a grace its thread is left to die with the process.
    """
    tell, result = told_progress(on_progress), Future[Model]()

    def progress(done: int, total: int) -> None:
        if stop.is_set():
            raise Cancelled("stopped while the model was being read", phase="start")
        tell(done, total)

    def work() -> None:
        try:
            result.set_result(open_model(config, progress))
        except BaseException as error:  # noqa: BLE001  carried to who waits for the result
            result.set_exception(error)

    threading.Thread(target=work, name="open-model", daemon=True).start()
    opened, stopped = asyncio.wrap_future(result), asyncio.ensure_future(stop.wait())
    opened.add_done_callback(lambda late: late.cancelled() or late.exception())  # maybe nobody waits for it any more
    try:
        either: set[asyncio.Future[Any]] = {opened, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)  # minutes: as long as it takes
        if opened.done():
            return opened.result()
        await asyncio.wait({opened}, timeout=STOP_GRACE_S)
    finally:
        stopped.cancel()
    if opened.done() and opened.exception() is None:
        opened.result().catalogue.close()
    raise Cancelled("stopped before the model was open", phase="start")


class Daemon:
    """A coordinator that has opened everything: wires the parts, and runs the loops."""

    def __init__(
        self, *, config: CoordinatorConfig, home: Home, model: Model, exchange: Exchange, log: TokenLog,
        callbacks: Callbacks,
    ) -> None:  # fmt: skip
        self._config = config
        self._home = home
        self._model = model
        self._exchange = exchange
        self._callbacks = callbacks
        self._tasks: set[asyncio.Task[None]] = set()
        interfaces = psutil.net_if_addrs()
        self._addresses = advertised(config.host, exchange.port, config.advertise, interfaces)
        self._invitations = Invitations(
            home.journal, home.book, server_key=home.server_keys.public, addresses=self._addresses,
            good_for_s=config.invite_hours * 3600,
        )  # fmt: skip
        desk = Desk(
            model.codec, eos=model.eos, client_silence_s=config.client_silence_s,
            client_return_s=config.client_return_s, first_session=home.term * SESSIONS_PER_TERM,
        )  # fmt: skip
        taken = take_over(log.entries(), desk, model=model.identity(), now=time.monotonic(), unix_now=time.time())
        state = ClusterState(
            model.spec, config.policy(), term=home.term, seats=home.journal.seats(), saved=taken.sessions
        )
        self._actor = Actor(
            state=state, desk=desk, exchange=exchange, log=log, journal=home.journal,
            entries=model.catalogue.entries, clock=time.monotonic, unix_time=time.time, patience_s=config.lease_s,
        )  # fmt: skip
        self._actor.act(taken.acts)
        self._group: asyncio.TaskGroup | None = None

    def connect(self, tiles: TileService, prompt_pool: ThreadPoolExecutor) -> None:
        """Wire the sides of workers and clients."""
        welcome = Welcome(
            version=VERSION, software=SOFTWARE, cluster=self._home.cluster, term=self._home.term,
            heartbeat_s=self._config.heartbeat_s, lease_s=self._config.lease_s,
        )  # fmt: skip
        actor = self._actor
        self._workers = WorkerSide(actor, tiles, self._invitations, welcome, self._spawn)
        clients = ClientSide(
            actor=actor, codec=self._model.codec, prompt_pool=prompt_pool, status=self._status, invite=self._invite,
            spawn=self._spawn,
        )  # fmt: skip
        self._switchboard = Switchboard(
            book=self._home.book, actor=actor, workers=self._workers, clients=clients, welcome=welcome,
            unix_time=time.time,
        )  # fmt: skip

    async def run(self, stop: asyncio.Event) -> None:
        """Tell that we are ready, serve until `stop`, say goodbye."""
        here = reachable_here(self._config.host, self._exchange.port, self._addresses)
        self._home.tell_ready(here)
        _log.info("cluster %s listens on %s", self._home.cluster, ", ".join(self._addresses))
        self._callbacks.on_ready(
            Ready(
                addresses=self._addresses, client_link=self._home.client_link(here).format(), cluster=self._home.cluster
            )
        )
        self._tell_join_link()
        try:
            async with asyncio.TaskGroup() as self._group:
                self._spawn(self._receive())
                self._spawn(self._tick())
                await stop.wait()  # for ever: this is the life of the process
                for task in self._tasks:
                    task.cancel()
        except ExceptionGroup as errors:  # the edge of the loop; one bug is enough to end, the first is the one to tell
            _log.critical("the coordinator ends because of a bug", exc_info=errors)
            self._hang_up(InvariantBroken("the coordinator ended because of a bug", phase="stop"))
            raise errors.exceptions[0] from errors
        else:
            stopping = Stopping()
            self._actor.run(stopping)
            self._hang_up(Overloaded(stopping.reason, remedy="ask again when it is back", phase="stop"))
            _log.info("stopped")
        finally:
            self._group = None
            # A peer drops what it has not read yet when the connection ends; give it the time to read.
            await asyncio.sleep(GOODBYE_S)

    async def _receive(self) -> None:
        num_taken = 0
        while True:
            arrived = await self._exchange.receive()
            if isinstance(arrived, Broken):
                self._switchboard.broke(arrived.routing_id)
            else:
                self._switchboard.take(arrived)
            num_taken += 1
            if num_taken % MESSAGES_A_TURN == 0:
                await asyncio.sleep(0)  # messages that lie ready are received without giving way

    async def _tick(self) -> None:
        tick_s = min(TICK_S, self._config.lease_s / 4)
        while True:
            await asyncio.sleep(tick_s)
            actor = self._actor
            actor.run(Tick())
            actor.retry_held()
            actor.act(actor.desk.tick(actor.clock(), actor.state.session_phase))
            self._tell_join_link()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        if self._group is None:
            work.close()
            return
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell_join_link(self) -> None:
        link = self._invitations.renew_standing(time.time())
        if link is not None:
            self._callbacks.on_join_link(link)

    def _invite(self, trusted: bool) -> str:
        return self._invitations.make(trusted=trusted, now=time.time())

    def _status(self) -> bytes:
        complaints, relay = self._switchboard.complaints, self._workers.counts
        counts = RimCounts(
            violations=complaints.violations, refusals=complaints.refusals, relayed=relay.relayed, dropped=relay.dropped
        )
        actor = self._actor
        now = actor.clock()
        status = actor.state.status(now)
        return render_status(status, cluster=self._home.cluster, spec=self._model.spec, counts=counts)

    def _hang_up(self, error: ManyhandsError) -> None:
        """Tell the clients whose requests the core has not ended itself."""
        self._actor.act(self._actor.desk.close(error))
