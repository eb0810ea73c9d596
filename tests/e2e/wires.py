"""TCP connections that go wrong on demand: cut, silent, one-way, slow, or with a bit flipped.

Knows nothing of what flows through. A `Wire` listens for one side and dials the other; all wires share a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from enum import StrEnum
from typing import Any, Self, TypeVar

CHUNK_BYTES = 65_536
CALL_S = 10.0
T = TypeVar("T")


class Way(StrEnum):
    """A direction of a wire: towards who is dialled, or back from there."""

    THERE = "there"
    BACK = "back"


class Wires:
    """The thread that carries all wires; leaving its `with` cuts them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._thread.start()
        self._wires: list[Wire] = []

    def lay(self, target_port: int) -> Wire:
        """Return a new wire to a port of this machine; nobody has to listen there yet."""
        wire = Wire(self, target_port)
        self.call(wire._listen())
        self._wires.append(wire)
        return wire

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something where the wires are."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_S)

    def close(self) -> None:
        """Cut everything and end the thread."""
        for wire in self._wires:
            self.call(wire._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_S)
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Wire:
    """What goes to `port` here comes out at `target_port`, and back; both may be changed while it is in use."""

    def __init__(self, wires: Wires, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.num_connections = 0
        self._wires = wires
        self._open: dict[Way, asyncio.Event] = {way: asyncio.Event() for way in Way}
        self._delay_s = 0.0
        self._to_corrupt: set[Way] = set()
        self._pairs: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._halves: list[asyncio.StreamWriter] = []  # the dialling side of what was left half open
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        """Where to dial."""
        return f"127.0.0.1:{self.port}"

    def reset(self) -> None:
        """Cut every connection with a RST to both sides; new ones are taken."""
        self._wires.call(self._reset())

    def leave_half_open(self) -> None:
        """Cut the dialled side; the dialling side notices nothing, and hears nothing, until `heal`."""
        self._wires.call(self._leave_half_open())

    def silence(self, *ways: Way) -> None:
        """Hold back what goes these ways, of new connections too, until `heal`."""
        self._wires.call(self._set(ways, is_open=False))

    def slow(self, delay_s: float) -> None:
        """Carry every chunk this much later."""
        self._delay_s = delay_s

    def corrupt(self, way: Way) -> None:
        """Flip one bit of the next chunk that goes this way."""
        self._to_corrupt.add(way)

    def heal(self) -> None:
        """Carry on; connections of which one side is cut are cut on the other."""
        self._delay_s = 0.0
        self._to_corrupt.clear()
        self._wires.call(self._heal())

    async def _listen(self) -> None:
        for event in self._open.values():
            event.set()
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            their_reader, their_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:  # nobody listens there: as if nobody listened here
            writer.transport.abort()
            return
        self.num_connections += 1
        pair = (writer, their_writer)
        self._pairs.add(pair)
        there = asyncio.create_task(self._pump(Way.THERE, reader, their_writer))
        back = asyncio.create_task(self._pump(Way.BACK, their_reader, writer))
        self._tasks |= {there, back}
        await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
        if pair in self._pairs:  # an end was closed by its owner: tell the other
            self._pairs.discard(pair)
            for one in pair:
                one.close()
        await asyncio.wait((there, back))
        self._tasks -= {there, back}

    async def _pump(self, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            while data := await reader.read(CHUNK_BYTES):
                await self._open[way].wait()
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                if way in self._to_corrupt:
                    self._to_corrupt.discard(way)
                    at = len(data) // 2
                    data = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
                writer.write(data)
                await writer.drain()

    async def _reset(self) -> None:
        pairs, self._pairs = self._pairs, set()
        for pair in pairs:
            for writer in pair:
                _abort(writer)

    async def _leave_half_open(self) -> None:
        for event in self._open.values():
            event.clear()
        pairs, self._pairs = self._pairs, set()
        for ours, theirs in pairs:
            self._halves.append(ours)
            _abort(theirs)

    async def _set(self, ways: tuple[Way, ...], *, is_open: bool) -> None:
        for way in ways:
            if is_open:
                self._open[way].set()
            else:
                self._open[way].clear()

    async def _heal(self) -> None:
        halves, self._halves = self._halves, []
        for writer in halves:
            _abort(writer)
        await self._set(tuple(Way), is_open=True)

    async def _end(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._reset()
        await self._heal()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


def _abort(writer: asyncio.StreamWriter) -> None:
    """Close at once; with nothing to linger for, the kernel sends a RST."""
    with contextlib.suppress(OSError):
        own: socket.socket = writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
