"""A probe that is broken off leaves nothing behind: no task, and no socket that would keep the process from ending."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest
import zmq.asyncio

from protocol.ids import WorkerId
from protocol.messages import Peer
from protocol.security import KeyPair
from worker.prober import probe

DEADLINE_S = 10.0


@pytest.mark.asyncio
@pytest.mark.parametrize("is_cancelled", [True, False])
async def test_a_probe_leaves_nothing_behind(is_cancelled: bool) -> None:
    context = zmq.asyncio.Context()
    with socket.create_server(("127.0.0.1", 0)) as listener:  # takes connections, and never says a word
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        silent = Peer(worker=WorkerId("b"), public_key=KeyPair.generate().public, addresses=(address,))
        before = asyncio.all_tasks()
        probing = asyncio.create_task(probe(context, KeyPair.generate(), WorkerId("a"), (silent,), deadline_s=0.2))
        taken, _ = await asyncio.to_thread(listener.accept)  # the try is under way
        if is_cancelled:
            probing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await probing
        else:
            assert await probing == {}
        assert asyncio.all_tasks() == before
        taken.close()
    ending = threading.Thread(target=context.term, daemon=True)
    ending.start()
    await asyncio.to_thread(ending.join, DEADLINE_S)
    assert not ending.is_alive()
