"""Carries a scenario out on a cluster of real processes, and says what became of its streams.

Knows nothing of what is right: it brings back tokens and texts. No moment is chosen by a clock that the outcome depends
on; the sleeps below only vary where in a step or a recovery the trouble falls.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from house import DEADLINE_S, House
from scenario import COORDINATOR, HEAD, LINES, WORKERS, Harm, Line, Moment, Scenario, Trouble, Until
from wires import Way, Wire, Wires

from benchmarks.nursery import Nursery
from manyhands import AsyncClient, CoordinatorLost
from manyhands.connection import Status
from manyhands.processes import ChildProcess
from protocol.security import Link

RUN_S = 90.0  # for all streams of a scenario; generous, as everything shares few cores
POLL_S = 0.02
NOTICE_S = 6.0  # a trouble that nobody need notice, such as a cut line that is laid again, is over after this
Order = tuple[Any, dict[str, Any]]


class Answer(NamedTuple):
    """What a stream brought."""

    token_ids: tuple[int, ...]
    text: str


class ChurnHouse(House):
    """Three workers that start fast; some of their lines run over wires that can go wrong."""

    def __init__(self, folder: Path, model: Path, plan: str, nursery: Nursery, wires: Wires, **settings: str) -> None:
        self._nursery, self._wires = nursery, wires
        self.wires: dict[tuple[str, Line], Wire] = {}
        self._ports: dict[str, int] = {}
        self._lock = threading.RLock()  # one hand at a time on the processes
        super().__init__(folder, model, plan, **settings)
        try:
            port = int(self.coordinator.link.addresses[0].rpartition(":")[2])
            for name, line in LINES:
                self._ports[name] = _free_port()
                self.wires[name, line] = wires.lay(port if line is Line.CONTROL else self._ports[name])
            for name in WORKERS:
                self.start(name)
            self.until_whole()
        except BaseException:
            self.close()
            raise

    def start(self, name: str, link: str | None = None, **settings: str) -> ChildProcess:
        """Start a worker unless it runs."""
        with self._lock:
            if name in self.workers and self.workers[name].is_alive:
                return self.workers[name]
            if link is None and name not in self.links:
                link = self.links[name] = self._joined_by(name)
            chosen = {
                "name": name,
                "threads": "1",
                "listen": f"tcp://127.0.0.1:{self._ports.get(name, '*')}",
                "state_dir": str(self.folder / name / "state"),
                "cache_dir": str(self.cache_of(name)),
                "connect_timeout_s": "10",
                "redial_most_s": "1",
                "step_timeout_s": "5",
                "exit_on_stdin_close": "true",
                "link": link or "",
                **settings,
            }
            if (name, Line.PEERS) in self.wires:
                chosen["advertise"] = self.wires[name, Line.PEERS].address
            child = self._nursery.start(chosen, self.folder / name / "log")
            self.workers[name] = child
            self._all.append(child)
            return child

    def _joined_by(self, name: str) -> str:
        text = self.client.invite(trusted=name == HEAD)
        if (name, Line.CONTROL) not in self.wires:
            return text
        link = Link.parse(text)
        wire = self.wires[name, Line.CONTROL]
        return Link(role=link.role, addresses=(wire.address,), server_key=link.server_key, secret=link.secret).format()

    def hurt(self, trouble: Trouble) -> None:
        """Do the harm."""
        with self._lock:
            if trouble.line is not None:
                self._spoil(self.wires[trouble.victim, trouble.line], trouble)
            elif trouble.harm is Harm.FREEZE:
                self._process(trouble.victim).send_signal(signal.SIGSTOP)
            else:
                self._process(trouble.victim).kill()
                self._process(trouble.victim).wait(DEADLINE_S)

    def relieve(self, trouble: Trouble) -> None:
        """Put it right again."""
        with self._lock:
            if trouble.line is not None:
                self.wires[trouble.victim, trouble.line].heal()
            elif trouble.harm is Harm.FREEZE:
                self._process(trouble.victim).send_signal(signal.SIGCONT)
            elif trouble.victim != COORDINATOR:
                self.start(trouble.victim)
            elif not self.coordinator.child.is_alive:
                self.restart_coordinator()

    def until_whole(self) -> Status:
        """Put everything right, and wait until all workers compute and nothing else is left over."""
        with self._lock:
            for wire in self.wires.values():
                wire.heal()
            if not self.coordinator.child.is_alive:
                self.restart_coordinator()
            for child in (self.coordinator.child, *self.workers.values()):
                child.process.send_signal(signal.SIGCONT)
            for name in WORKERS:
                self.start(name)
        return self.until(_is_whole_and_at_rest)

    def leftovers(self) -> list[str]:
        """Name what should not be there while nothing runs: processes beyond ours, sessions in spools."""
        ours = {child.pid for child in self.workers.values()}
        strays = [f"process {pid}" for pid in self._nursery.living() if pid not in ours]
        spools = [str(path) for path in self.folder.glob("*/*/spool/**/*") if path.is_file()]
        return strays + spools

    def logs(self, lines: int = 40) -> str:
        """The ends of all logs."""
        children = {COORDINATOR: self.coordinator.child, **self.workers}
        return "\n".join(f"--- {name}\n{child.log_tail(lines)}" for name, child in children.items())

    def _process(self, name: str) -> Any:
        return (self.coordinator.child if name == COORDINATOR else self.workers[name]).process

    def _spoil(self, wire: Wire, trouble: Trouble) -> None:
        way = Way.THERE if int(1e6 * trouble.jitter_s) % 2 else Way.BACK
        match trouble.harm:
            case Harm.RESET:
                wire.reset()
            case Harm.HALF_OPEN:
                wire.leave_half_open()
            case Harm.ONE_WAY:
                wire.silence(way)
            case Harm.SLOW:
                wire.slow(0.05 if trouble.line is Line.CONTROL else 0.003)
            case Harm.CORRUPT:
                wire.corrupt(way)


def _is_whole_and_at_rest(status: Status) -> bool:
    plan = status["plan"]
    if status["phase"] != "ready" or plan is None:
        return False
    members = {member["worker"] for stage in plan["stages"] for member in stage["members"]}
    return (
        members == set(WORKERS)
        and status["sessions"] == {"running": 0, "waiting": 0}
        and not status["kv"]["used"]
        and not any(worker["kv_bytes"] for worker in status["workers"])
    )


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


class Run:
    """One scenario on one house."""

    def __init__(self, house: ChurnHouse, scenario: Scenario, orders: list[Order]) -> None:
        self._house, self._scenario, self._orders = house, scenario, orders
        self._num_tokens = 0  # of the first stream; how many come in one piece depends on who is busy
        self._epoch = 0
        self._changed = asyncio.Condition()
        self._asked, self._over = asyncio.Event(), asyncio.Event()
        self.befell: list[Trouble] = []  # what really happened: a stream may be over before its trouble's moment

    async def answers(self) -> list[Answer]:
        """Ask all streams, let everything go wrong, and return what they brought; raises what a stream raised."""
        house, scenario = self._house, self._scenario
        async with asyncio.timeout(RUN_S), AsyncClient(house.coordinator.link) as client:
            self._epoch = (await client.status())["epoch"]
            if scenario.first_loss:
                await asyncio.to_thread(house.kill, scenario.first_loss)
            if scenario.first_loss == HEAD:
                await asyncio.to_thread(house.start, HEAD)
            async with asyncio.TaskGroup() as group:
                before = self._asked
                for trouble in scenario.troubles:
                    done = asyncio.Event()
                    group.create_task(self._befall(trouble, before, done))
                    before = done
                streams = [
                    group.create_task(self._read(client, self._orders[order], is_first=number == 0))
                    for number, order in enumerate(scenario.orders)
                ]
                self._asked.set()
                answers = await asyncio.gather(*streams)
                await self._wake(self._over.set)
            return answers

    async def _read(self, client: AsyncClient, order: Order, *, is_first: bool) -> Answer:
        prompt, options = order
        stream = await client.generate(prompt, stream=True, **options)
        token_ids: list[int] = []
        async for piece in stream:
            token_ids += piece.token_ids
            if is_first:
                self._num_tokens = len(token_ids)
                await self._wake()
        assert tuple(token_ids) == stream.result.token_ids
        return Answer(stream.result.token_ids, stream.result.text)

    async def _befall(self, trouble: Trouble, before: asyncio.Event, done: asyncio.Event) -> None:
        """Wait for the moment, do the harm, wait, undo it."""
        try:
            async with AsyncClient(self._house.coordinator.link) as client:  # one of its own: it waits for nobody
                await before.wait()
                if trouble.moment in (Moment.LOAD, Moment.RECOVERY):
                    await self._until_dealt_with(client, self._epoch)
                else:
                    await self._until_it_has(trouble.tokens)
                await self._a_little_later(trouble)
                if self._over.is_set() and trouble.moment in (Moment.LOAD, Moment.RECOVERY):
                    return
                epoch = await _epoch(client)
                await asyncio.to_thread(self._house.hurt, trouble)
                self.befell.append(trouble)
                done.set()
                await self._while_it_lasts(trouble, client, epoch)
                await asyncio.to_thread(self._house.relieve, trouble)
        finally:
            done.set()

    async def _until_it_has(self, num_tokens: int) -> None:
        """Wait until the first stream has brought so many tokens, or all is over."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._num_tokens >= num_tokens or self._over.is_set())

    async def _a_little_later(self, trouble: Trouble) -> None:
        """Let the jitter pass, but not the moment: a fast machine may be through with it before."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(trouble.jitter_s):
                await self._until_it_has(trouble.last_tokens)

    async def _while_it_lasts(self, trouble: Trouble, client: AsyncClient, epoch: int) -> None:
        match trouble.until:
            case Until.SOON:
                await asyncio.sleep(trouble.jitter_s)
            case Until.NOTICED:
                await self._until_dealt_with(client, epoch)
            case Until.THE_END:
                await self._over.wait()

    async def _until_dealt_with(self, client: AsyncClient, epoch: int) -> None:
        """Wait until the cluster has another plan than this, or is about to make one; or all is over, or it is late."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(NOTICE_S):
                while not self._over.is_set():
                    try:
                        status = await client.status()
                    except CoordinatorLost:
                        return
                    if status["phase"] != "ready" or status["epoch"] != epoch:
                        return
                    await asyncio.sleep(POLL_S)

    async def _wake(self, change: Callable[[], object] = lambda: None) -> None:
        async with self._changed:
            change()
            self._changed.notify_all()


async def _epoch(client: AsyncClient) -> int:
    try:
        return int((await client.status())["epoch"])
    except CoordinatorLost:
        return 0
