"""The data sockets of several workers, linked with the first over loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tiny_cluster import LOOPBACK

from protocol.ids import WorkerId
from protocol.messages import LinkMode, LinkOrder, Peer
from protocol.security import KeyPair
from worker.links import Links


@contextlib.contextmanager
def linked_ends(*names: WorkerId) -> Iterator[list[Links]]:
    """Yield the links of these workers under epoch 1: the first listens, all others have dialled it."""
    keys = [KeyPair.generate() for _ in names]
    with contextlib.ExitStack() as stack:
        first, *others = ends = [stack.enter_context(contextlib.closing(Links(one, LOOPBACK))) for one in keys]
        for links, name in zip(ends, names, strict=True):
            links.attach(name, "127.0.0.1:9", keys[0].public)  # nobody is there
        peers = [
            Peer(worker=name, public_key=one.public, addresses=(links.address.removeprefix("tcp://"),))
            for links, name, one in zip(ends, names, keys, strict=True)
        ]
        first.admit([one.public for one in keys[1:]])
        first.begin(1, [LinkOrder(peer=peer, mode=LinkMode.LISTEN) for peer in peers[1:]])
        for links in others:
            links.begin(1, [LinkOrder(peer=peers[0], mode=LinkMode.DIAL)])
        for _ in range(500):
            if not any(name for links in ends for name in links.unlinked):
                break
            for links in ends:
                assert links.receive(0.02) is None
        assert not any(name for links in ends for name in links.unlinked)
        yield ends
