"""Tries which neighbours' data listeners can be reached from here.

Knows nothing of plans. Uses short-lived connections of its own, so the compute thread is not disturbed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import zmq.asyncio

from protocol.errors import LinkInvalid, ProtocolViolation
from protocol.frames import decode, encode
from protocol.ids import WorkerId
from protocol.messages import LinkHello, LinkWelcome, Peer
from protocol.security import KeyPair
from protocol.transport import dial, receive_dealer

PROBE_S: Final = 1.5
RETRY_S: Final = 0.4  # the other side may hear of the probe, and admit our key, a little later than we
MAX_REPLY_BYTES: Final = 64 * 1024


async def probe(
    context: zmq.asyncio.Context, keys: KeyPair, own: WorkerId, peers: Sequence[Peer], deadline_s: float = PROBE_S
) -> dict[WorkerId, str]:
    """Return the address that answered for each peer that did; tries all addresses of all peers at once."""
    reached: dict[WorkerId, str] = {}

    async def try_address(peer: Peer, address: str) -> None:
        number = 0
        while peer.worker not in reached:
            number += 1
            routing_id = f"{own}/probe.{number}.{address}".encode()[:200]
            if await _answers(
                partial(dial, context, address, keys, peer.public_key, routing_id, MAX_REPLY_BYTES), peer.worker, own
            ):
                reached.setdefault(peer.worker, address)

    tasks = [asyncio.create_task(try_address(peer, one)) for peer in peers for one in peer.addresses]
    try:
        if tasks:
            await asyncio.wait(tasks, timeout=deadline_s)
    finally:  # also when we are cancelled: a try left behind would hold its socket, and the context, for ever
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return reached


async def _answers(open_socket: Callable[[], zmq.asyncio.Socket], peer: WorkerId, own: WorkerId) -> bool:
    try:
        socket = open_socket()
    except LinkInvalid:  # an address that can't be dialled is one that does not answer
        await asyncio.sleep(RETRY_S)
        return False
    try:
        async with asyncio.timeout(RETRY_S):
            await socket.send_multipart(encode(LinkHello(worker=own, epoch=0)))
            message = decode(await receive_dealer(socket)).message
            return isinstance(message, LinkWelcome) and message.worker == peer
    except (TimeoutError, ProtocolViolation):
        return False
    finally:
        socket.close()
