"""(b) One star allreduce over loopback: ours, encrypted, beside the pickle-over-TCP star of TPI-LLM.

Every member is a process of its own with the sockets of a worker's compute thread. The clock is the hub's: from handing
in its own part to holding the sum. "Bare": frames of the same size through ZeroMQ and CURVE, to the hub and back, and
nothing done with them. The second table has a link with a delay between the hub and every other member.
"""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
import zmq

from benchmarks import slow_link
from benchmarks.report import table
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import LinkMode, LinkOrder, Peer
from protocol.plans import Plan, Share, Stage
from protocol.security import KeyPair
from protocol.specs import ActivationFormat, ModelSpec, RopeSpec, Span, WeightFormat
from runtime.tensors import dtype_of
from worker.doors import Doors, Unread
from worker.due import Due
from worker.links import Links
from worker.seat import SUM
from worker.star import Star
from worker.wire import Arrival

ROUNDS, SLOW_ROUNDS = 2000, 200
WARM, SLOW_WARM = 300, 20
DELAY_MS = 2
TURNS = 3  # each star gets so many, in turn with the other: the machine is faster in some moments than in others
PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, not by every member anew
PROCESSES.set_forkserver_preload(["worker.links", "worker.star"])


class Case(NamedTuple):
    """What is added: so many bytes of this format by each of the members; how often, and how far apart they are."""

    num_bytes: int
    members: int
    wire: ActivationFormat = ActivationFormat.FLOAT32
    delay_ms: float = 0.0

    @property
    def values(self) -> int:
        """How many numbers that is."""
        return self.num_bytes // dtype_of(self.wire).itemsize

    @property
    def rounds(self) -> tuple[int, int]:
        """How many sums warm up, and how many are timed."""
        return (SLOW_WARM, SLOW_ROUNDS) if self.delay_ms else (WARM, ROUNDS)


def plan_of(case: Case) -> Plan:
    """A plan of one stage whose only purpose is its star."""
    members = case.members
    spec = ModelSpec(
        name="star", family="llama", hidden=case.values, layers=1, heads=members, kv_heads=members, head_dim=2,
        intermediate=32 * members, vocab=2, max_positions=8, norm_eps=1e-5, rope=RopeSpec(theta=1e4),
        ffn_tiles=members, weights=WeightFormat.FLOAT32, activations=case.wire,
    )  # fmt: skip
    shares = tuple(
        Share(worker=WorkerId(f"w{rank}"), groups=Span(rank, rank + 1), ffn=Span(rank, rank + 1))
        for rank in range(members)
    )
    stage = Stage(layers=Span(0, 1), members=shares)
    return Plan(epoch=1, model=spec, head=WorkerId("w0"), stages=(stage,), wire=case.wire)


class Post:
    """The star's way out, without a step around it."""

    def __init__(self, links: Links) -> None:
        self.doors: Callable[[], Doors | None] = links.doors
        self._links = links

    def send(self, targets: Sequence[WorkerId], message: object, payload: Buffer) -> None:
        """Send to members."""
        self._links.send(targets, message, payload)

    def collect(self, due: Due, timeout_s: float, unread: Unread | None = None) -> Arrival | None:
        """Wait for what did not come by a short way."""
        deadline = time.monotonic() + timeout_s
        if unread is not None:
            self._links.read(unread)
        while due.owing and time.monotonic() < deadline:
            arrival = self._links.receive(deadline - time.monotonic())
            if arrival is not None and not due.take(arrival):
                return arrival
        return None


@torch.inference_mode()
def member(rank: int, case: Case, pipe: Connection) -> None:
    """One process of our star; the hub (rank 0) sends its times back."""
    torch.set_num_threads(1)
    keys = KeyPair.generate()
    links = Links(keys, "tcp://127.0.0.1:*")
    links.attach(WorkerId(f"w{rank}"), "tcp://127.0.0.1:9", keys.public)  # nobody is there, nobody is needed
    pipe.send((keys.public, links.address.removeprefix("tcp://")))
    peers: list[tuple[bytes, str]] = pipe.recv()
    others = range(1, case.members) if rank == 0 else [0]
    mode = LinkMode.LISTEN if rank == 0 else LinkMode.DIAL
    links.admit(peers[other][0] for other in others)
    links.begin(
        1,
        [
            LinkOrder(peer=Peer(worker=WorkerId(f"w{n}"), public_key=peers[n][0], addresses=(peers[n][1],)), mode=mode)
            for n in others
        ],
    )
    while [name for name in links.unlinked if name]:
        links.receive(0.05)
    pipe.send("linked")
    pipe.recv()
    star = Star(plan_of(case), WorkerId(f"w{rank}"), Post(links), torch.device("cpu"))
    part = star.part(1)
    assert part is not None
    part.fill_(1.0)
    pipe.send(timed(case, lambda step: star.reduce(step, 1, 0, part)))
    pipe.recv()
    links.close()


def timed(case: Case, work: Callable[[int], object]) -> list[float]:
    """Return how long each of the timed rounds took, in seconds."""
    times, (warm, rounds) = [], case.rounds
    for step in range(warm + rounds):
        began = time.perf_counter()
        work(step)
        times.append(time.perf_counter() - began)
    return times[warm:]


def bare_member(rank: int, case: Case, pipe: Connection) -> None:
    """One process of a star that only sends and receives, over plain sockets under CURVE."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys, frame = KeyPair.generate(), bytes(SUM.num_bytes + case.num_bytes)
    end = context.socket(zmq.ROUTER if rank == 0 else zmq.DEALER)
    end.curve_publickey, end.curve_secretkey = keys.public, keys.secret
    if rank == 0:
        end.curve_server = True
        pipe.send((keys.public, f"tcp://127.0.0.1:{end.bind_to_random_port('tcp://127.0.0.1')}"))
    else:
        pipe.send(None)
    (end_key, address), *_ = pipe.recv()
    if rank:
        end.curve_serverkey = end_key
        end.connect(address)
        end.send(b"hello")
    routes = [end.recv_multipart()[0] for _ in range(1, case.members)] if rank == 0 else []
    pipe.send("linked")
    pipe.recv()

    def go_around(step: int) -> None:
        if rank == 0:
            for _ in routes:
                end.recv_multipart(copy=False)
            for route in routes:
                end.send_multipart((route, frame))
        else:
            end.send(frame)
            end.recv(copy=False)

    pipe.send(timed(case, go_around))
    pipe.recv()
    context.destroy(linger=0)


def pickle_member(rank: int, case: Case, pipe: Connection) -> None:
    """One process of a star as TPI-LLM does it: a TCP connection a member, length and pickled tensor, fixed order."""
    torch.set_num_threads(1)
    part = torch.ones(1, case.values, dtype=dtype_of(case.wire))
    if rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        pipe.send(listener.getsockname()[1])
        connections = [listener.accept()[0] for _ in range(1, case.members)]
    else:
        pipe.send(None)
        connections = [socket.create_connection(("127.0.0.1", pipe.recv()))]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if rank == 0:
        pipe.recv()

    def go_around(step: int) -> None:
        if rank == 0:
            total = part + sum(_receive(connection) for connection in connections)
            for connection in connections:
                _send(connection, total)
        else:
            _send(connections[0], part)
            _receive(connections[0])

    pipe.send(timed(case, go_around))


def _send(connection: socket.socket, tensor: torch.Tensor) -> None:
    data = pickle.dumps(tensor)
    connection.sendall(struct.pack("!I", len(data)) + data)


def _receive(connection: socket.socket) -> torch.Tensor:
    (length,) = struct.unpack("!I", _exactly(connection, 4))
    tensor: torch.Tensor = pickle.loads(_exactly(connection, length))  # our own child's bytes
    return tensor


def _exactly(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        data += connection.recv(count - len(data))
    return bytes(data)


def measure(target: Callable[[int, Case, Connection], None], case: Case) -> list[float]:
    """Run one star and return the hub's times in seconds."""
    pipes, children = [], []
    for rank in range(case.members):
        pipe, child = start(target, rank, case)
        pipes.append(pipe)
        children.append(child)
    hellos = [pipe.recv() for pipe in pipes]
    if case.delay_ms:
        relay, child = start(slow_link.carry, ("127.0.0.1", port_of(hellos[0])), case.delay_ms / 1e3)
        hellos[0] = at_port(hellos[0], relay.recv())
        children.append(child)
    if target is not pickle_member:
        for pipe in pipes:
            pipe.send(hellos)
        for pipe in pipes:
            pipe.recv()
        for pipe in pipes:
            pipe.send("go")
    else:
        for pipe in pipes[1:] + pipes[:1]:
            pipe.send(hellos[0])
    times: list[float]
    times, *_ = [pipe.recv() for pipe in pipes]
    for pipe in pipes:
        if target is not pickle_member:
            pipe.send("bye")
    for child in children[: case.members]:
        child.join()
    for child in children[case.members :]:
        child.kill()
    return times


def start(target: Callable[..., None], *arguments: object) -> tuple[Connection, BaseProcess]:
    """Start a process with a pipe to it as its last argument."""
    here, there = PROCESSES.Pipe()
    child = PROCESSES.Process(target=target, args=(*arguments, there), daemon=True)
    child.start()
    return here, child


def port_of(hello: Any) -> int:
    """Return the port that a hub listens on, from what it said."""
    return hello if isinstance(hello, int) else int(hello[1].rsplit(":", 1)[1])


def at_port(hello: Any, port: int) -> Any:
    """Return what a hub said, with another port."""
    return port if isinstance(hello, int) else (hello[0], f"{hello[1].rsplit(':', 1)[0]}:{port}")


def row_of(case: Case, *targets: Callable[[int, Case, Connection], None]) -> tuple[str, ...]:
    """Measure ours and these others in turn; returns a row of the table."""
    times: dict[Any, list[float]] = {member: [], **{target: [] for target in targets}}
    for _ in range(TURNS):
        for target in times:
            times[target] += measure(target, case)
    ours, *others = (statistics.median(found) * 1e3 for found in times.values())
    p90 = statistics.quantiles(times[member], n=10)[-1] * 1e3
    what = f"{case.num_bytes // 1024} KB {case.wire.value}"
    return (
        what, str(case.members), f"{ours:.3f}", f"{p90:.3f}", *(f"{other:.3f}" for other in others),
        f"{others[-1] / ours:.1f}x",
    )  # fmt: skip


def main() -> None:
    """Measure both stars for each number of members and size, in turn; then over links with a delay."""
    cases = [Case(num_bytes, members) for num_bytes in (4096, 32768) for members in (2, 4, 8)]
    cases += [Case(4096, members, ActivationFormat.BFLOAT16) for members in (2, 4)]
    table(
        "(b) Star allreduce over loopback, CURVE, one process a member",
        (
            "what",
            "members",
            "ours, median ms",
            "ours, p90 ms",
            "bare, median ms",
            "pickle over TCP, median ms",
            "ratio",
        ),
        [row_of(case, bare_member, pickle_member) for case in cases],
    )
    far = [Case(4096, members, delay_ms=DELAY_MS) for members in (2, 4)]
    table(
        f"(b) Star allreduce over links of {DELAY_MS} ms one way and a relay's own time",
        ("what", "members", "ours, median ms", "p90 ms", "pickle over TCP, median ms", "ratio"),
        [row_of(case, pickle_member) for case in far],
    )


if __name__ == "__main__":
    main()
