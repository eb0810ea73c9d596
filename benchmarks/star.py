"""(b) One star allreduce over loopback: ours, encrypted, beside the pickle-over-TCP star of TPI-LLM.

Every member is a process of its own with the sockets of a worker's compute thread. The clock is the hub's: from handing
in its own part to holding the sum. "Bare": frames of the same size through ZeroMQ and CURVE, and nothing done with
them: what is left to gain.
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
from typing import Any

import torch
import zmq

from benchmarks.report import table
from protocol.frames import Buffer
from protocol.ids import WorkerId
from protocol.messages import LinkMode, LinkOrder, Peer
from protocol.plans import Plan, Share, Stage
from protocol.security import KeyPair
from protocol.specs import ActivationFormat, ModelSpec, RopeSpec, Span, WeightFormat
from worker.doors import Doors, Unread
from worker.due import Due
from worker.links import Links
from worker.seat import SUM
from worker.star import Star
from worker.wire import Arrival

ROUNDS = 2000
WARM = 300
TURNS = 3  # each star gets so many, in turn with the other: the machine is faster in some moments than in others
PROCESSES = multiprocessing.get_context("forkserver")  # torch is imported once, not by every member anew
PROCESSES.set_forkserver_preload(["worker.links", "worker.star"])


def plan_of(members: int, values: int) -> Plan:
    """A plan of one stage whose only purpose is its star."""
    spec = ModelSpec(
        name="star", family="llama", hidden=values, layers=1, heads=members, kv_heads=members, head_dim=2,
        intermediate=32 * members, vocab=2, max_positions=8, norm_eps=1e-5, rope=RopeSpec(theta=1e4),
        ffn_tiles=members, weights=WeightFormat.FLOAT32, activations=ActivationFormat.FLOAT32,
    )  # fmt: skip
    shares = tuple(
        Share(worker=WorkerId(f"w{rank}"), groups=Span(rank, rank + 1), ffn=Span(rank, rank + 1))
        for rank in range(members)
    )
    stage = Stage(layers=Span(0, 1), members=shares)
    return Plan(epoch=1, model=spec, head=WorkerId("w0"), stages=(stage,), wire=ActivationFormat.FLOAT32)


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
def member(rank: int, members: int, values: int, pipe: Connection) -> None:
    """One process of our star; the hub (rank 0) sends its times back."""
    torch.set_num_threads(1)
    keys = KeyPair.generate()
    links = Links(keys, "tcp://127.0.0.1:*")
    links.attach(WorkerId(f"w{rank}"), "tcp://127.0.0.1:9", keys.public)  # nobody is there, nobody is needed
    pipe.send((keys.public, links.address.removeprefix("tcp://")))
    peers: list[tuple[bytes, str]] = pipe.recv()
    others = range(1, members) if rank == 0 else [0]
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
    star = Star(plan_of(members, values), WorkerId(f"w{rank}"), Post(links), torch.device("cpu"))
    part = star.part(1)
    assert part is not None
    part.fill_(1.0)
    times = []
    for step in range(ROUNDS + WARM):
        began = time.perf_counter()
        star.reduce(step, 1, 0, part)
        times.append(time.perf_counter() - began)
    pipe.send(times[WARM:] if rank == 0 else None)
    pipe.recv()
    links.close()


def bare_member(rank: int, members: int, values: int, pipe: Connection) -> None:
    """One process of a star that only sends and receives, over plain sockets under CURVE."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keys, frame = KeyPair.generate(), bytes(SUM.num_bytes + 4 * values)
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
    routes = [end.recv_multipart()[0] for _ in range(1, members)] if rank == 0 else []
    pipe.send("linked")
    pipe.recv()
    times = []
    for _ in range(ROUNDS + WARM):
        began = time.perf_counter()
        if rank == 0:
            for _ in routes:
                end.recv_multipart(copy=False)
            for route in routes:
                end.send_multipart((route, frame))
        else:
            end.send(frame)
            end.recv(copy=False)
        times.append(time.perf_counter() - began)
    pipe.send(times[WARM:] if rank == 0 else None)
    pipe.recv()
    context.destroy(linger=0)


def pickle_member(rank: int, members: int, values: int, pipe: Connection) -> None:
    """One process of a star as TPI-LLM does it: a TCP connection a member, length and pickled tensor, fixed order."""
    torch.set_num_threads(1)
    part = torch.ones(1, values)
    if rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))
        pipe.send(listener.getsockname()[1])
        connections = [listener.accept()[0] for _ in range(1, members)]
    else:
        pipe.send(None)
        connections = [socket.create_connection(("127.0.0.1", pipe.recv()))]
    for connection in connections:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if rank == 0:
        pipe.recv()
    times = []
    for _ in range(ROUNDS + WARM):
        began = time.perf_counter()
        if rank == 0:
            total = part + sum(_receive(connection) for connection in connections)
            for connection in connections:
                _send(connection, total)
        else:
            _send(connections[0], part)
            _receive(connections[0])
        times.append(time.perf_counter() - began)
    pipe.send(times[WARM:] if rank == 0 else None)


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


def measure(target: Any, members: int, num_bytes: int) -> list[float]:
    """Run one star and return the hub's times in seconds."""
    pipes, children = [], []
    for rank in range(members):
        here, there = PROCESSES.Pipe()
        child = PROCESSES.Process(target=target, args=(rank, members, num_bytes // 4, there), daemon=True)
        child.start()
        pipes.append(here)
        children.append(child)
    hellos = [pipe.recv() for pipe in pipes]
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
    for child in children:
        child.join()
    return times


def main() -> None:
    """Measure both stars for each number of members and size, in turn."""
    rows = []
    for num_bytes in (4096, 32768):
        for members in (2, 4, 8):
            times: dict[Any, list[float]] = {member: [], bare_member: [], pickle_member: []}
            for _ in range(TURNS):
                for target in times:
                    times[target] += measure(target, members, num_bytes)
            ours = times[member]
            median, bare, other = (statistics.median(found) * 1e3 for found in times.values())
            p90 = statistics.quantiles(ours, n=10)[-1] * 1e3
            rows.append(
                (
                    f"{num_bytes // 1024} KB",
                    members,
                    f"{median:.3f}",
                    f"{p90:.3f}",
                    f"{bare:.3f}",
                    f"{other:.3f}",
                    f"{other / median:.1f}x",
                )
            )
    table(
        "(b) Star allreduce over loopback, CURVE, one process a member",
        (
            "size",
            "members",
            "ours, median ms",
            "ours, p90 ms",
            "bare, median ms",
            "pickle over TCP, median ms",
            "ratio",
        ),
        rows,
    )


if __name__ == "__main__":
    main()
