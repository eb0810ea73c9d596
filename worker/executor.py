"""The compute thread: owns torch and the data sockets, and does one thing at a time.

Knows nothing of the coordinator's control messages or of fetching: it obeys `worker.commands` and reports back. Between
two sums of a step there is no event loop, only a poll that the control side can end.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
import torch

from protocol.errors import CoordinatorLost, InvariantBroken, ManyhandsError, PeerLost, TileUnavailable
from protocol.ids import SessionId
from protocol.messages import Activation, Step
from protocol.plans import Plan
from runtime.allocator import give_back
from runtime.shelf import BlockShelf
from runtime.stream import StreamCounts
from worker.commands import (
    URGENT,
    Attach,
    Begin,
    Command,
    Drop,
    Failed,
    Forget,
    LineBroke,
    LoadTiles,
    Report,
    Rest,
    TilesSpoiled,
)
from worker.forming import Bench, ExecutorSettings, Forming, LoadCount
from worker.kv_shelf import KvShelf
from worker.links import COORDINATOR, Links
from worker.loading import WorkerPart
from worker.post import DataPost, Superseded
from worker.spool import Spool
from worker.star import Star
from worker.steps import Parts, StepRunner, Work
from worker.store import TileStore
from worker.wire import Arrival

IDLE_S: Final = 1.0
_log = logging.getLogger(__name__)


class Executor:
    """The thread and its mailbox. `submit`, `join` and the properties may be used from other threads."""

    def __init__(
        self,
        links: Links,
        store: TileStore,
        report: Callable[[Report], None],
        settings: ExecutorSettings,
        spool: Spool,
    ) -> None:
        """`report` is called in the compute thread; it takes links and spool over and closes them at the end."""
        self._links = links
        self._report = report
        self._settings = settings
        self._count = LoadCount()
        self._kv = KvShelf(spool)
        self._blocks = BlockShelf()
        self._bench = Bench(links, store, self._kv, self._blocks, settings, self._count)
        self._commands: deque[Command] = deque()
        self._lock = threading.Lock()
        self._num_urgent = 0
        self._post = DataPost(links, lambda: self._num_urgent > 0)
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._own = COORDINATOR
        self._nonce = ""  # of the connection that the data connection belongs to
        self._plan: Plan | None = None
        self._forming: Forming | None = None
        self._runner: StepRunner | None = None
        self._star: Star | None = None
        self._held: WorkerPart | None = None
        self._failed_epoch = 0
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
        """A number that grows with every operation computed and every byte loaded."""
        star = self._star
        return self._count.bytes + (star.num_ops if star is not None else 0)

    @property
    def load_progress(self) -> tuple[int, int]:
        """Bytes read so far of the load under way, and those it will read at least."""
        count = self._count
        return count.bytes - count.before, count.to_read

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
    def sums_s(self) -> float:
        """Return how many of these seconds went into sums with other members."""
        star = self._star
        return star.seconds if star is not None else 0.0

    @property
    def kv_bytes(self) -> int:
        """Bytes reserved for KV caches."""
        return self._kv.reserved_bytes

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        torch.set_num_threads(self._settings.num_threads)
        np.seterr(over="ignore", invalid="ignore")  # sums of infinities are the model's own, here as in torch
        while True:
            try:
                if not self._obey():
                    break
                self._work()
            except Superseded:
                continue
            except ManyhandsError as error:
                self._fail(error)
            except Exception as error:  # noqa: BLE001  the edge of the loop: whatever went wrong becomes a report
                _log.exception("the compute thread failed")
                self._fail(InvariantBroken(f"{type(error).__name__}: {error}", node=self._own, phase="compute"))
        self._drop()
        self._kv.close()
        self._links.close()

    def _work(self) -> None:
        """Take one message, if one comes, and go on with the plan that is being loaded."""
        forming = self._forming
        arrival = self._post.next(IDLE_S if forming is None else forming.wait_s)
        if arrival is not None:
            self._take(arrival)
        if forming is not None:
            self._form(forming)
        elif self._post.traffic is not None:
            self._post.traffic.push()

    def _obey(self) -> bool:
        """Carry out the commands that wait; False at `Stop`."""
        while self._commands:
            with self._lock:
                command = self._commands.popleft()
                self._num_urgent -= isinstance(command, URGENT)
            match command:
                case Attach(worker=worker, address=address, server_key=server_key, nonce=nonce):
                    self._own, self._nonce = worker, nonce
                    self._links.attach(worker, address, server_key, nonce)
                case Begin(plan=plan, links=orders):
                    self._rest()
                    self._let_go()
                    self._plan = plan
                    self._links.begin(plan.epoch, orders)
                    self._forming = Forming(command, self._own, self._bench, self._post)
                    self._post.traffic = self._forming.traffic
                case LoadTiles(epoch=epoch, entries=entries):
                    if self._forming is not None and self._forming.plan.epoch == epoch:
                        self._forming.tiles_are_here(entries)
                case Rest(epoch=epoch):
                    if self._plan is not None and self._plan.epoch <= epoch:
                        self._rest()
                case Drop():
                    self._drop()
                case Forget(sessions=sessions):
                    self._forget(sessions)
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
                raise InvariantBroken(f"{arrival.sender} sent a part or a sum outside of a step", node=arrival.sender)

    def _form(self, forming: Forming) -> None:
        """Go on with a plan that is not ready; once it is, steps may come."""
        try:
            ready = forming.advance()
        except TileUnavailable as error:
            self._report(TilesSpoiled(epoch=forming.plan.epoch, error=error))
            return
        finally:
            self._held = forming.held
        if self._runner is None and forming.held is not None:
            self._weight_bytes = forming.held.weight_bytes
            self._runner = self._runner_of(forming.plan, forming.held)
        if ready is not None:
            self._forming = None
            self._report(ready)

    def _runner_of(self, plan: Plan, held: WorkerPart) -> StepRunner:
        stage, settings = held.part.stage, self._settings
        self._star = (
            Star(plan, self._own, self._post, settings.device, timeout_s=settings.step_timeout_s)
            if stage is not None
            else None
        )
        parts = Parts(stage=stage, star=self._star, head=held.part.head, device=settings.device, inputs=self._kv.inputs)
        return StepRunner(plan, self._own, parts, self._post)

    def _fail(self, error: ManyhandsError) -> None:
        """Report, and wait for the coordinator's word. The links stay: a break would hide the cause from the others."""
        epoch = self._plan.epoch if self._plan is not None else 0
        self._forming = self._runner = None
        self._post.clear()
        if isinstance(error, CoordinatorLost):  # one connection in three parts: the control side dials them all anew
            self._report(LineBroke(nonce=self._nonce, error=error))
            return
        if epoch == 0:
            _log.warning("on the data sockets, without a plan: %s", error)
            return
        if epoch == self._failed_epoch:  # what follows from the first failure is no news
            return
        self._failed_epoch = epoch
        lost = error.node if isinstance(error, PeerLost) else ""
        self._report(Failed(epoch=epoch, error=error, lost=lost))

    def _rest(self) -> None:
        """End the epoch; what was loaded and computed stays for the next."""
        self._plan = self._forming = self._runner = None
        self._post.clear()
        self._links.end()

    def _drop(self) -> None:
        """End the epoch and free everything."""
        self._rest()
        self._let_go()
        self._blocks.clear()
        self._kv.clear()
        give_back()

    def _forget(self, sessions: Iterable[SessionId]) -> None:
        for session in sessions:
            if self._runner is not None:
                self._runner.release((session,))
            self._kv.release(session)

    def _let_go(self) -> None:
        """Free what was loaded for the plan alone; blocks stay on their shelf, keys and values on theirs."""
        self._star = self._held = None
        self._weight_bytes = 0
