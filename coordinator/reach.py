"""What is known about who can dial whom: asked once for every pair of workers, remembered until one of them restarts.

Knows nothing of sockets. A pair is (from, to), with the incarnation of both, so what a dead process could reach says
nothing about its successor.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.events import Effect, SendControl
from coordinator.links import probe_targets
from coordinator.registry import Registry
from protocol.ids import WorkerId
from protocol.messages import Probe
from protocol.plans import Plan

Pair = tuple[WorkerId, WorkerId]
Incarnations = tuple[int, int]


class ReachBook:
    """Answers of probes. One probe is under way at a time; `unanswered` are the workers it still waits for."""

    def __init__(self, registry: Registry, timeout_s: float) -> None:
        self._registry = registry
        self._timeout_s = timeout_s
        self._until = 0.0
        self._known: dict[Pair, tuple[Incarnations, bool]] = {}
        self._asked: dict[WorkerId, tuple[WorkerId, ...]] = {}
        self.probe = 0

    @property
    def unanswered(self) -> frozenset[WorkerId]:
        """Workers that have not answered the probe under way."""
        return frozenset(self._asked)

    @property
    def pairs(self) -> frozenset[Pair]:
        """The pairs that work, as far as known."""
        return frozenset(pair for pair, (_, works) in self._known.items() if works and self._is_known(pair))

    def begin(self, plan: Plan, now: float) -> list[Effect]:
        """Probe the links that a plan may need and that are not known; nothing to do: no effects."""
        wanted = {
            worker: tuple(partner for partner in partners if not self._is_known((worker, partner)))
            for worker, partners in probe_targets(plan).items()
        }
        self._asked = {worker: partners for worker, partners in wanted.items() if partners}
        self._until = now + self._timeout_s
        self.probe += bool(self._asked)
        peers = {member.worker: member.peer for member in self._registry}
        return [
            SendControl(worker=worker, message=Probe(probe=self.probe, peers=tuple(peers[name] for name in partners)))
            for worker, partners in self._asked.items()
        ]

    def is_over(self, now: float) -> bool:
        """Say whether all have answered, or had their time: what was not answered counts as unknown."""
        if now >= self._until:
            self._asked = {}
        return not self._asked

    def answer(self, worker: WorkerId, probe: int, reached: Iterable[WorkerId]) -> None:
        """Take a worker's answer in; one to an older probe, or a second one, is ignored."""
        if probe != self.probe or worker not in self._asked:
            return
        found = set(reached)
        for partner in self._asked.pop(worker):
            self._note((worker, partner), works=partner in found)

    def give_up(self) -> None:
        """End the probe; nobody wants to know any more."""
        self._asked = {}

    def broke(self, one: WorkerId, other: WorkerId) -> None:
        """The link between two workers failed although both are here: neither counts as reached any more."""
        self._note((one, other), works=False)
        self._note((other, one), works=False)

    def forget(self, worker: WorkerId) -> None:
        """A worker is gone."""
        self._known = {pair: found for pair, found in self._known.items() if worker not in pair}
        self._asked.pop(worker, None)

    def _note(self, pair: Pair, *, works: bool) -> None:
        incarnations = self._incarnations(pair)
        if incarnations is not None:
            self._known[pair] = (incarnations, works)

    def _is_known(self, pair: Pair) -> bool:
        found = self._known.get(pair)
        return found is not None and found[0] == self._incarnations(pair)

    def _incarnations(self, pair: Pair) -> Incarnations | None:
        one, other = self._registry.get(pair[0]), self._registry.get(pair[1])
        return None if one is None or other is None else (one.incarnation, other.incarnation)
