"""What a worker of the world loads, holds and computes: the side of it that has keys and values.

Knows nothing of how the coordinator is reached. It follows the newest epoch, keeps rows from one plan to the next, and
checks at every step that the rows it is asked to compute continue exactly what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from core_cases import done, faulted, loaded, progressed

from coordinator.events import StepFinished
from protocol.ids import SessionId, WorkerId
from protocol.messages import Cells, KvMove, Load, Step, WorkerPhase
from protocol.plans import Plan
from protocol.specs import Span
from world.model import FoldedLog
from world.shelf import Shelf, cells_in

if TYPE_CHECKING:
    from world.coordinator import Connection
    from world.worker import SimWorker

POLL_S = 0.1
TAKES_S = 2.0  # without progress; then it goes on with what is there
HOLD_S = 30.0


class Compute:
    """One process' tiles, links, keys and values. `epoch` 0: no plan; `newest`: orders up to here are ignored."""

    def __init__(self, worker: SimWorker) -> None:
        self.worker = worker
        self.world = worker.world
        self.name = worker.worker
        self.shelf = Shelf()
        self.epoch = self.newest = self.held_epoch = self.progress = 0
        self.plan: Plan | None = None
        self.is_loaded = self.has_failed = False  # fetched and read; told the coordinator that it can't go on
        self.is_ready = False
        self._load: Load | None = None
        self._linked: set[WorkerId] = set()
        self._awaited: set[WorkerId] = set()  # who still has rows for us
        self._moved_at = 0.0
        self._logs: dict[SessionId, FoldedLog] = {}
        self._last_step = -1
        self._parts: dict[int, int] = {}  # step: members of this star that have not sent their part
        self._mirrored: dict[tuple[WorkerId, SessionId], int] = {}

    @property
    def told_phase(self) -> WorkerPhase:
        if not self.epoch or self.has_failed:
            return WorkerPhase.IDLE
        return WorkerPhase.READY if self.is_ready else WorkerPhase.LOADING

    # ------------------------------------------------------------ the life of an epoch

    def forget_epoch(self) -> None:
        self.epoch, self.plan, self._load = 0, None, None
        self.is_loaded = self.is_ready = self.has_failed = False
        self._linked, self._awaited, self._logs, self._parts, self._mirrored = set(), set(), {}, {}, {}
        self._last_step = -1

    def hold(self) -> None:
        """End the epoch and keep what it left, for a while."""
        if not self.epoch:
            return
        held = self.epoch
        self.links_end()
        self.forget_epoch()

        def drop() -> None:
            if not self.epoch and self.held_epoch == held:
                self.shelf, self.held_epoch = Shelf(), 0

        self.worker.later(HOLD_S, drop)

    def on_unload(self, epoch: int) -> None:
        self.newest = max(self.newest, epoch)
        if self.epoch <= epoch:
            self.hold()

    def on_release(self, sessions: Iterable[SessionId]) -> None:
        for session in sessions:
            self._logs.pop(session, None)
            self.shelf.release(session)

    def on_load(self, load: Load) -> None:
        """Take a newer plan in place of the one before."""
        epoch = load.plan.epoch
        if epoch <= self.newest:
            return
        self.world.obeyed(self.name, epoch)
        self.links_end()
        self.forget_epoch()
        self.epoch = self.newest = self.held_epoch = epoch
        self.plan, self._load = load.plan, load
        self._awaited = {take.peer for take in load.takes}
        kept = tuple(carry for carry in load.carries if not self.world.chance(self.world.scenario.spool_loss))
        self.shelf.turn_to(load.plan, self.name, kept)
        for carry in kept:
            if self.world.chance(self.world.scenario.spool_loss):
                self.shelf.truncate(carry.session, self.world.dice.randint(0, carry.computed))
            if self.world.chance(self.world.scenario.spool_loss):
                self.shelf.lose_inputs(carry.session)
        self._fetch(self.world.dice.randint(0, 4))
        self._link()

    def _soon(self, most_s: float, act: Callable[[], None]) -> None:
        """Do something within so many seconds, if this epoch still goes on then."""
        epoch = self.epoch
        self.worker.later(
            self.world.dice.uniform(0.001, most_s),
            lambda: act() if self.epoch == epoch and not self.has_failed else None,
        )

    def _fetch(self, left: int) -> None:
        def go_on() -> None:
            world = self.world
            if world.chance(world.scenario.load_hang):
                return
            if world.chance(world.scenario.load_failure):
                self._fail()
                return
            self.progress += 1
            if left:
                self.worker.say(progressed(self.name, self.epoch, 100 - left))
                self._fetch(left - 1)
                return
            self.is_loaded = True
            self._check_ready()

        self._soon(0.6, go_on)

    def _fail(self, lost: str = "", code: str = "step-failed") -> None:
        """Tell, and wait for the coordinator's word."""
        if self.has_failed or not self.epoch:
            return
        self.has_failed, self.is_ready = True, False
        self.worker.say(faulted(self.name, self.epoch, lost=lost, code=code))

    # ------------------------------------------------------------ links

    def _link(self) -> None:
        """Dial the neighbours until all have answered; then say so, once rows that travel have come."""
        load, world = self._load, self.world
        if load is None:
            return
        for order in load.links:
            name = order.peer.worker
            if name not in self._linked and world.are_linked(self.name, name, self.epoch):
                self._linked.add(name)
                self._moved_at = world.now
                self._give(name, [give for give in load.gives if give.peer == name])
        self._check_ready()
        if not self.is_ready:
            self._soon(POLL_S, self._link)

    def links_end(self) -> None:
        """The neighbours see their links to this worker break."""
        load, epoch = self._load, self.epoch
        if load is None:
            return
        for order in load.links:
            other = self.world.workers[order.peer.worker]
            self._send(other.worker, lambda other=other: other.compute.on_break(self.name, epoch))  # type: ignore[misc]

    def on_break(self, peer: WorkerId, epoch: int) -> None:
        """A neighbour's link broke: fatal, unless that neighbour only had rows to give."""
        if epoch != self.epoch or peer not in self._linked or self.plan is None:
            return
        self._linked.discard(peer)
        self._awaited.discard(peer)
        if peer in self.plan.workers and self.name in self.plan.workers:
            self._fail(lost=peer)

    def lose_link(self, peer: WorkerId) -> None:
        """A cable is pulled, or reset, between two that live."""
        if peer in self._linked and self.plan is not None:
            self._fail(lost=peer)

    def _send(self, peer: WorkerId, act: Callable[[], None]) -> None:
        world, other = self.world, self.world.workers[peer]
        life = other.life
        connection = (self.name, self.worker.life, peer, life, self.epoch)
        world.network.send(self.name, peer, connection, lambda: other.take(life, act), may_double=False)

    def _to_peer(self, peer: WorkerId, act: Callable[[Compute], None]) -> None:
        """Let a neighbour do something, if it follows the same epoch then."""
        epoch, other = self.epoch, self.world.workers[peer]

        def arrive() -> None:
            compute = other.compute
            if compute.epoch == epoch and not compute.has_failed:
                act(compute)

        self._send(peer, arrive)

    # ------------------------------------------------------------ keys and values on their way

    def _give(self, peer: WorkerId, gives: list[KvMove]) -> None:
        """Send a neighbour the rows of all carried sessions, and an end mark."""
        load, shelf = self._load, self.shelf
        if load is None or not gives:
            return
        for carry in load.carries:
            for layer, give in [(layer, one) for one in gives for layer in one.cells.layers]:
                cells = Cells(layers=Span(layer, layer + 1), groups=give.cells.groups)
                length = min(shelf.length(carry.session, cell) for cell in cells_in(cells))
                self._rows(peer, carry.session, cells, 0, min(length, carry.computed))
        own = self.name

        def end(other: Compute) -> None:
            other._awaited.discard(own)
            other._moved_at = other.world.now
            other._check_ready()

        self._to_peer(peer, end)

    def _rows(self, peer: WorkerId, session: SessionId, cells: Cells, start: int, end: int) -> None:
        def take(other: Compute) -> None:
            other._moved_at = other.world.now
            other.shelf.take(session, cells, start, end)

        if end > start:
            self._to_peer(peer, take)

    def _check_ready(self) -> None:
        """Once all is here, bring back the rows of carried sessions and say that this worker is ready."""
        load, plan = self._load, self.plan
        if load is None or plan is None or self.is_ready or self.has_failed or not self.is_loaded:
            return
        wanted = {order.peer.worker for order in load.links}
        if not wanted <= self._linked | (wanted - set(plan.workers)):
            return
        if self._awaited and self.world.now - self._moved_at < TAKES_S:
            return
        self._awaited = set()
        self.is_ready = True
        held = self.shelf.restore(load.carries) if self.name in plan.workers else ()
        self.worker.say(loaded(self.name, self.epoch, held))

    # ------------------------------------------------------------ steps

    def on_step(self, connection: Connection, step: Step, tokens: list[int]) -> None:
        """Head: take a step of the coordinator and send it through the stages."""
        plan = self.plan
        if connection is not self.worker.connection or step.epoch != self.epoch or plan is None or not self.is_ready:
            return
        assert self.name == plan.head, f"{self.name} is given token ids"
        if step.step <= self._last_step:  # doubled on its way
            return
        self._last_step = step.step
        for new in step.opens:
            self._logs[new.session] = log = FoldedLog()
            log.extend(tokens[: new.history])
            tokens = tokens[new.history :]
        answer = []
        for part in step.rows:
            log = self._logs.setdefault(part.session, FoldedLog())
            assert log.length == part.start, f"the head knows {log.length} ids, rows: {part}"
            log.extend(tokens[: part.count])
            tokens = tokens[part.count :]
            if part.sample:
                answer.append(log.next_token)
        self._into(0, step, answer, is_filled=not step.layers.start)

    def _into(self, stage: int, step: Step, answer: list[int], *, is_filled: bool) -> None:
        """Hand a batch to the hub of a stage, or, after the last, back to the head; `is_filled`: with hidden states."""
        plan = self.plan
        if plan is None:
            return
        target = plan.head if stage == len(plan.stages) else plan.stages[stage].hub_worker
        self._to_peer(target, lambda other: other._take_batch(stage, step, answer, is_filled=is_filled))

    def _take_batch(self, stage: int, step: Step, answer: list[int], *, is_filled: bool) -> None:
        plan = self.plan
        if plan is None or not self.is_loaded:
            return
        if stage == len(plan.stages):
            assert is_filled or not answer, f"{step} is sampled from nothing"
            event = StepFinished(worker=self.name, done=done(step, *answer))
            self.worker.say(event, "data")
            return
        own, first = plan.stages[stage].layers, step.layers.start
        is_filled = is_filled or (
            plan.enters_after(stage, first) and all(self.shelf.can_put_in(part, first) for part in step.rows)
        )
        if len(step.layers) and not len(step.layers & own):
            self._into(stage + 1, step, answer, is_filled=is_filled)
            return
        assert is_filled, f"nobody before {self.name} kept what enters layer {first}"
        is_over = len(step.layers) > 0 and step.layers.end <= own.end
        others = [share.worker for share in plan.stages[stage].members if share.worker != self.name]
        self._parts[step.step] = len(others) + 1

        def part_came(hub: Compute) -> None:
            if step.step not in hub._parts:
                return
            hub._parts[step.step] -= 1
            if not hub._parts[step.step]:
                del hub._parts[step.step]
                if own.end < plan.model.layers and (not len(step.layers) or step.layers.end >= own.end):
                    for part in step.rows:
                        hub.shelf.keep(part, own.end)
                hub._into(stage + 1, step, answer, is_filled=not is_over)

        for other in others:
            self._to_peer(other, lambda member: member._compute(step, lambda: member._to_peer(self.name, part_came)))
        self._compute(step, lambda: part_came(self))

    def _compute(self, step: Step, then: Callable[[], None]) -> None:
        def act() -> None:
            world = self.world
            if world.chance(world.scenario.step_hang):
                return
            poison = any(part.session == world.scenario.poison for part in step.rows)
            if poison or world.chance(world.scenario.step_failure):
                self._fail()
                return
            self.progress += 1
            layers = step.layers & self.shelf.layers if len(step.layers) else self.shelf.layers
            for part in step.rows:
                self.shelf.compute(part, layers)
            self._mirror(step)
            then()

        if self.is_loaded:
            self._soon(0.03, act)

    def _mirror(self, step: Step) -> None:
        """Send the rows that a peer keeps a copy of, from the first one that it was not sent yet."""
        for move in self._load.mirrors if self._load is not None else ():
            for part in step.rows:
                end = self.shelf.least(part.session)
                start = self._mirrored.get((move.peer, part.session), 0)
                self._rows(move.peer, part.session, move.cells, start, end)
                self._mirrored[move.peer, part.session] = max(start, end)
