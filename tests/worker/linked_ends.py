"""Two workers' data sockets, linked with each other over loopback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tiny_cluster import LOOPBACK

from protocol.ids import WorkerId
from protocol.messages import LinkMode, LinkOrder, Peer
from protocol.security import KeyPair
from worker.links import Links

A, B = WorkerId("a"), WorkerId("b")


@contextlib.contextmanager
def linked_ends() -> Iterator[tuple[Links, Links]]:
    """Yield the links of a and of b, which has dialled a, under epoch 1."""
    keys = [KeyPair.generate(), KeyPair.generate()]
    one, two = Links(keys[0], LOOPBACK), Links(keys[1], LOOPBACK)
    with contextlib.closing(one), contextlib.closing(two):
        for links, name in ((one, A), (two, B)):
            links.attach(name, "127.0.0.1:9", keys[0].public)  # nobody is there
        one.admit([keys[1].public])
        address = one.address.removeprefix("tcp://")
        one.begin(1, [LinkOrder(peer=Peer(worker=B, public_key=keys[1].public, addresses=()), mode=LinkMode.LISTEN)])
        peer = Peer(worker=A, public_key=keys[0].public, addresses=(address,))
        two.begin(1, [LinkOrder(peer=peer, mode=LinkMode.DIAL)])
        for _ in range(500):
            if not any(one.unlinked) and not any(two.unlinked):
                break
            assert one.receive(0.02) is None
            assert two.receive(0.02) is None
        assert not any(one.unlinked) and not any(two.unlinked)
        yield one, two
