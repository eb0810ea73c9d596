"""The compute thread: owns torch and the data sockets, and does one thing at a time.

Knows nothing of the coordinator's control messages or of fetching: it obeys `worker.commands` and reports back. Between
two sums of a step there is no event loop, only a poll that the control side can end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from protocol.errors import DeadlineExceeded, InvariantBroken, ManyhandsError, PeerLost, TileUnavailable
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import Activation, Partial, Step, Sum
from protocol.plans import Plan
from protocol.tiles import TileEntry, TileId
from runtime.kernels import Kernels
from runtime.stream import StreamCounts
from worker.commands import URGENT, Attach, Begin, Command, Drop, Failed, Forget, LoadTiles, Ready, Report, TilesSpoiled
from worker.links import COORDINATOR, Arrival, Links
from worker.loading import WorkerPart, load_worker, resident_bytes
from worker.star import Star, StarFrame
from worker.steps import Parts, StepRunner, Work
from worker.store import TileStore

IDLE_S: Final = 1.0
LINKING_S: Final = 0.05
MAX_INBOX: Final = 1024
_log = logging.getLogger(__name__)


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


class _Superseded(Exception):
    """A command waits that ends what is under way."""


class Executor:
    """The thread and its mailbox. `submit`, `join` and the properties may be used from other threads."""

    def __init__(
        self, links: Links, store: TileStore, report: Callable[[Report], None], settings: ExecutorSettings
    ) -> None:
        """`report` is called in the compute thread; it takes the links over and closes them at the end."""
        self._links = links
        self._store = store
        self._report = report
        self._settings = settings
        self._commands: deque[Command] = deque()
        self._lock = threading.Lock()
        self._num_urgent = 0
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._own = COORDINATOR
        self._plan: Plan | None = None
        self._runner: StepRunner | None = None
        self._parts: Parts | None = None
        self._held: WorkerPart | None = None
        self._inbox: deque[Arrival] = deque()
        self._pending: Ready | None = None
        self._link_deadline = 0.0
        self._failed_epoch = 0
        self._loaded_bytes = 0
        self._loaded_before = 0
        self._to_load_bytes = 0
        self._weight_bytes = 0

    # ------------------------------------------------------------ from any thread

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, command: Command) -> None:
        """Give a command; one of a new epoch ends the step or load under way."""
        with self._lock:
            self._commands.append(command)
            self._num_urgent += isinstance(command, URGENT)
        self._links.wake()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread to end after `Stop`; False when it is still in a long computation."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def progress(self) -> int:
        """A number that grows with every operation computed and every byte loaded or exchanged."""
        parts = self._parts
        star = parts.star if parts is not None else None
        return self._loaded_bytes + (star.num_ops + star.num_bytes if star is not None else 0)

    @property
    def load_progress(self) -> tuple[int, int]:
        """Bytes read so far of the load under way, and those it will read at least."""
        return self._loaded_bytes - self._loaded_before, self._to_load_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of tiles held."""
        return self._weight_bytes

    def streamed(self) -> StreamCounts:
        """Return what the window has read under this plan."""
        held = self._held
        return held.part.blocks.counts() if held is not None else StreamCounts(0, 0.0, 0.0)

    @property
    def work(self) -> Work:
        """Return how many steps were computed under this plan, and the seconds they took."""
        runner = self._runner
        return runner.work if runner is not None else Work(0, 0.0)

    @property
    def kv_bytes(self) -> int:
        """Bytes reserved for KV caches."""
        parts = self._parts
        return parts.kv_bytes if parts is not None else 0

    # ------------------------------------------------------------ Post, for the star and the steps

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer) -> None:
        """Send to neighbours."""
        self._links.send(targets, message, payload)

    def send_up(self, message: object) -> None:
        """Send to the coordinator."""
        self._links.send_up(message)

    def give_way(self) -> None:
        """End what is under way when a command waits that is about another epoch."""
        if self._num_urgent:
            raise _Superseded

    def next_star_frame(self, timeout_s: float) -> StarFrame | None:
        """Return the next `Partial` or `Sum`; what else arrives waits for its turn."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.give_way()
            arrival = self._links.receive(deadline - time.monotonic())
            if arrival is None:
                if time.monotonic() >= deadline:
                    return None
            elif isinstance(arrival.message, Partial | Sum):
                return StarFrame(*arrival)
            else:
                self._keep(arrival)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        torch.set_num_threads(self._settings.num_threads)
        while True:
            try:
                if not self._obey():
                    break
                self._work()
            except _Superseded:
                continue
            except ManyhandsError as error:
                self._fail(error)
            except Exception as error:  # noqa: BLE001  the edge of the loop: whatever went wrong becomes a report
                _log.exception("the compute thread failed")
                self._fail(InvariantBroken(f"{type(error).__name__}: {error}", node=self._own, phase="compute"))
        self._drop()
        self._links.close()

    def _work(self) -> None:
        """Take one message, if one comes, and see whether the links are complete."""
        wait_s = IDLE_S if self._pending is None else LINKING_S  # a link that gets complete is no message
        arrival = self._inbox.popleft() if self._inbox else self._links.receive(wait_s)
        if arrival is not None:
            self._take(arrival)
        if self._pending is not None:
            self._watch_links(self._pending)

    def _obey(self) -> bool:
        """Carry out the commands that wait; False at `Stop`."""
        while self._commands:
            with self._lock:
                command = self._commands.popleft()
                self._num_urgent -= isinstance(command, URGENT)
            match command:
                case Attach(worker=worker, address=address, server_key=server_key, nonce=nonce):
                    self._own = worker
                    self._links.attach(worker, address, server_key, nonce)
                case Begin(plan=plan, links=orders):
                    self._drop()
                    self._plan = plan
                    self._links.begin(plan.epoch, orders)
                case LoadTiles(epoch=epoch, entries=entries):
                    if self._plan is not None and self._plan.epoch == epoch:
                        self._load(self._plan, entries)
                case Drop(epoch=epoch):
                    if self._plan is not None and self._plan.epoch <= epoch:
                        self._drop()
                case Forget(sessions=sessions):
                    if self._runner is not None:
                        self._runner.release(sessions)
                case _:
                    return False
        return True

    def _take(self, arrival: Arrival) -> None:
        runner = self._runner
        if runner is None:  # not loaded yet, or failed already: the coordinator has been or will be told
            return
        match arrival.message:
            case Step():
                runner.on_step(arrival.message, arrival.payload)
            case Activation():
                runner.on_activation(arrival.sender, arrival.message, arrival.payload)
            case _:
                name = type(arrival.message).__name__
                raise InvariantBroken(f"{arrival.sender} sent a {name} outside of a step", node=arrival.sender)

    def _keep(self, arrival: Arrival) -> None:
        if len(self._inbox) >= MAX_INBOX:
            raise InvariantBroken(f"{MAX_INBOX} messages wait to be computed", node=arrival.sender)
        self._inbox.append(arrival)

    def _load(self, plan: Plan, entries: tuple[TileEntry, ...]) -> None:
        started = time.monotonic()
        try:
            self._parts = self._build(plan, entries)
        except TileUnavailable as error:
            self._report(TilesSpoiled(epoch=plan.epoch, error=error))
            return
        self._weight_bytes = sum(entry.num_bytes for entry in entries)
        self._runner = StepRunner(plan, self._own, self._parts, self)
        held = self._held
        self._pending = Ready(
            epoch=plan.epoch,
            weight_bytes=self._weight_bytes,
            resident_bytes=resident_bytes(),
            load_s=time.monotonic() - started,
            predicted_bytes=held.predicted_bytes if held else 0,
            pinned_bytes=held.pinned_bytes if held else 0,
            window_bytes=held.window_bytes if held else 0,
        )
        self._link_deadline = time.monotonic() + self._settings.link_timeout_s

    def _build(self, plan: Plan, entries: tuple[TileEntry, ...]) -> Parts:
        by_tile = {entry.tile: entry for entry in entries}
        self._loaded_before, self._to_load_bytes = self._loaded_bytes, sum(entry.num_bytes for entry in entries)

        def read(num_bytes: int) -> None:
            self.give_way()
            self._loaded_bytes += num_bytes

        def source(tile: TileId) -> memoryview:
            self.give_way()
            if (arrival := self._links.receive(0)) is not None:  # neighbours say hello while this loads
                self._keep(arrival)
            data = self._store.read(by_tile[tile])
            read(len(data))
            return data

        settings = self._settings
        self._held = load_worker(
            plan,
            self._own,
            source=source,
            store=self._store,
            entries=by_tile,
            kernels=settings.kernels,
            device=settings.device,
            budget_bytes=settings.budget_bytes,
            base_bytes=settings.base_bytes,
            on_read=read,
        )
        stage, head = self._held.part.stage, self._held.part.head
        star = Star(plan, self._own, self, settings.device, settings.step_timeout_s) if stage is not None else None
        return Parts(stage=stage, star=star, head=head, device=settings.device)

    def _watch_links(self, ready: Ready) -> None:
        missing = self._links.unlinked
        if not missing:
            self._pending = None
            self._report(ready)
        elif time.monotonic() >= self._link_deadline:
            names = ", ".join(name or "the coordinator" for name in missing)
            raise DeadlineExceeded(
                f"no link to {names} within {self._settings.link_timeout_s:g} s after loading",
                remedy="check that the devices reach each other, or let the coordinator relay",
                node=missing[0],
                phase="link",
            )

    def _fail(self, error: ManyhandsError) -> None:
        """Report, and wait for the coordinator's word. The links stay: a break would hide the cause from the others."""
        epoch = self._plan.epoch if self._plan is not None else 0
        self._let_go()
        self._inbox.clear()
        if epoch == 0:
            _log.warning("on the data sockets, without a plan: %s", error)
            return
        if epoch == self._failed_epoch:  # what follows from the first failure is no news
            return
        self._failed_epoch = epoch
        lost = error.node if isinstance(error, PeerLost) else ""
        self._report(Failed(epoch=epoch, error=error, lost=lost))

    def _drop(self) -> None:
        self._plan = None
        self._let_go()
        self._weight_bytes = 0
        self._inbox.clear()
        self._links.end()

    def _let_go(self) -> None:
        """Free what was loaded, and end its loader."""
        self._runner = self._pending = self._parts = None
        held, self._held = self._held, None
        if held is not None:
            held.part.blocks.close()
