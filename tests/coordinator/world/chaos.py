"""What goes wrong in a world, and when.

Knows nothing of what should follow from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from coordinator.events import LeaveAsked, WorkerGone
from world.scenario import Scenario, Trouble

if TYPE_CHECKING:
    from world.coordinator import SimCoordinator
    from world.worker import SimWorker
    from world.world import World


class Chaos:
    """Draws troubles until the world calms down."""

    def __init__(self, world: World, scenario: Scenario, dice: random.Random) -> None:
        self._world = world
        self._scenario = scenario
        self._dice = dice
        self._ways: dict[Trouble, Callable[[], None]] = {
            Trouble.KILL: lambda: self._on_worker(self._kill),
            Trouble.FLAP: lambda: self._on_worker(lambda worker: self._flap(worker, dice.randint(2, 6))),
            Trouble.FREEZE: lambda: self._on_worker(lambda worker: worker.freeze(dice.uniform(0.3, 8))),
            Trouble.PARTITION: self._partition,
            Trouble.RESET: lambda: self._on_worker(lambda worker: worker.break_connection()),
            Trouble.BLIP: lambda: self._on_worker(self._blip),
            Trouble.LINK: self._cut_link,
            Trouble.DRAIN: lambda: self._on_worker(self._drain),
            Trouble.SIGTERM: lambda: self._on_worker(lambda worker: worker.ask_to_leave()),
            Trouble.LEAVE: lambda: self._on_worker(self._leave),
            Trouble.PAUSE: lambda: self._on_worker(self._pause),
            Trouble.CRASH: lambda: world.crash_coordinator(world.primary),
            Trouble.STOP: lambda: world.primary.freeze(dice.choice([dice.uniform(0.1, 2), dice.uniform(2, 15)])),
            Trouble.JUMP: self._jump,
            Trouble.USURP: self._usurp,
        }

    def begin(self) -> None:
        """Let the first trouble come."""
        if self._scenario.troubles:
            self._world.after(self._dice.expovariate(1 / self._scenario.pause_s), self._strike)

    def _strike(self) -> None:
        world = self._world
        if not world.is_chaos:
            return
        (trouble,) = self._dice.choices(self._scenario.troubles, self._scenario.weights)
        world.note("chaos", trouble)
        self._ways[trouble]()
        self.begin()

    def _on_worker(self, act: Callable[[SimWorker], None]) -> None:
        worker = self._dice.choice(list(self._world.workers.values()))
        if worker.is_alive:
            act(worker)

    def _kill(self, worker: SimWorker) -> None:
        worker.die(is_seen=self._dice.random() < 0.6)
        self._world.come_back(worker)

    def _flap(self, worker: SimWorker, left: int) -> None:
        if not self._world.is_chaos:
            return
        if worker.is_alive:
            worker.die(is_seen=True)
            self._world.after(self._dice.uniform(0.01, 0.5), worker.start)
        if left:
            self._world.after(self._dice.uniform(0.3, 2.5), lambda: self._flap(worker, left - 1))

    def _partition(self) -> None:
        """Cut some workers off: from the coordinator, from the others or from both, one way or both ways."""
        dice, world = self._dice, self._world
        names = list(world.workers)
        some = dice.sample(names, dice.randint(1, len(names)))
        others = [name for name in names if name not in some]
        coordinators = [one.name for one in world.coordinators]
        rest = dice.choice([others, coordinators, [*others, *coordinators]])
        for_s = dice.choice([dice.uniform(0.1, 2), dice.uniform(2, 12)])
        ways = dice.choice(["out", "in", "both", "both"])
        if ways != "in":
            world.network.cut(some, rest, for_s)
        if ways != "out":
            world.network.cut(rest, some, for_s)

    def _blip(self, worker: SimWorker) -> None:
        """The coordinator believes that a worker is gone, which is not so."""
        coordinator = self._world.primary
        if coordinator.is_alive and not coordinator.is_frozen:
            coordinator.tell(WorkerGone(worker=worker.worker, reason="it seemed so"))

    def _cut_link(self) -> None:
        """The link of two that live breaks, and one of them or both say so."""
        dice, workers = self._dice, self._world.workers
        if len(workers) < 2:
            return
        one, other = dice.sample(list(workers.values()), 2)
        if dice.random() < 0.5:
            self._world.network.cut([one.name], [other.name], dice.uniform(0.5, 8))
        one.compute.lose_link(other.worker)
        if dice.random() < 0.5:
            other.compute.lose_link(one.worker)

    def _drain(self, worker: SimWorker) -> None:
        coordinator = self._world.primary
        if coordinator.is_alive and not coordinator.is_frozen:
            coordinator.tell(LeaveAsked(worker=worker.worker))

    def _leave(self, worker: SimWorker) -> None:
        worker.leave("no more")
        self._world.come_back(worker)

    def _pause(self, worker: SimWorker) -> None:
        worker.paused = "on battery"
        worker.later(self._dice.uniform(1, 8), lambda: setattr(worker, "paused", ""))

    def _jump(self) -> None:
        """The coordinator's clock jumps: it was suspended, or somebody set it."""
        coordinator = self._world.primary
        far_s = self._dice.choice([self._dice.uniform(0.1, 1.2), self._dice.uniform(2.0, 100.0)])
        coordinator.jump(far_s)

    def _usurp(self) -> None:
        """A second coordinator starts from a copy of the state; the first one lives on, cut off from some."""
        dice, world = self._dice, self._world
        old: SimCoordinator = world.primary
        if not old.is_alive or len(world.coordinators) >= 4:
            return
        names = [name for name in world.workers if dice.random() < 0.6]
        for_s = dice.uniform(0.5, 10)
        world.network.cut([old.name], names, for_s)
        world.network.cut(names, [old.name], for_s)
        world.usurp()
