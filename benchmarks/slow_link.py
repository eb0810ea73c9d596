"""A link with a delay, for processes on one machine: a relay that hands on every byte so many seconds later.

Knows nothing of what flows through. Bytes keep their order; the rate is not limited.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from multiprocessing.connection import Connection


def carry(target: tuple[str, int], delay_s: float, pipe: Connection) -> None:
    """Listen on loopback, tell the port by `pipe`, and carry every connection to `target`, until the process ends."""
    asyncio.run(_listen(target, delay_s, pipe))


async def _listen(target: tuple[str, int], delay_s: float, pipe: Connection) -> None:
    async def carry_one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(*target)
        await asyncio.gather(_hand_on(reader, other_writer, delay_s), _hand_on(other_reader, writer, delay_s))

    server = await asyncio.start_server(carry_one, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def _hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    loop = asyncio.get_running_loop()
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(2**16):
            loop.call_later(delay_s, writer.write, data)
    loop.call_later(delay_s, writer.close)
