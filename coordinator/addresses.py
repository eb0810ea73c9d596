"""Which addresses go into links: what the user says, or what this machine can be reached at.

Knows nothing of sockets; the interfaces come in as a mapping, as psutil gives them.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from typing import Protocol

from coordinator.config import WILDCARDS, with_port
from protocol.errors import ConfigInvalid
from protocol.security import MAX_LINK_ADDRESSES

VIRTUAL_PREFIXES = ("docker", "br-", "veth", "virbr", "cni", "flannel")  # seldom reachable from another machine


class InterfaceAddress(Protocol):
    """One address of a network interface (`psutil.net_if_addrs`)."""

    @property
    def family(self) -> int: ...

    @property
    def address(self) -> str: ...


Interfaces = Mapping[str, Sequence[InterfaceAddress]]


def advertised(host: str, port: int, given: Sequence[str], interfaces: Interfaces) -> tuple[str, ...]:
    """Return the "host:port" of this coordinator, best first, for a socket that listens on `host` and `port`.

    Given addresses come first and alone. A socket on all interfaces is reached at each of them: real networks first,
    then container bridges, loopback last so that a worker on this machine finds it too. Raises ConfigInvalid when
    there is none.
    """
    if given:
        return tuple(dict.fromkeys(with_port(address, port) for address in given))
    if host not in WILDCARDS:
        return (with_port(host, port),)
    wants_v6 = host in ("::", "[::]")
    ranked = [
        (_rank(name, one.address), with_port(one.address, port))
        for name, addresses in interfaces.items()
        for one in addresses
        if _is_usable(one, wants_v6)
    ]
    found = list(dict.fromkeys(address for _, address in sorted(ranked, key=lambda entry: entry[0])))
    if not found:
        raise ConfigInvalid(
            f"listening on {host}, but this machine has no address to put into a link",
            remedy="name one with --advertise HOST",
        )
    return tuple(found[:MAX_LINK_ADDRESSES])


def reachable_here(host: str, port: int, others: Sequence[str]) -> tuple[str, ...]:
    """Return where a client on this machine reaches the coordinator: over loopback where it listens there."""
    if host in ("::", "[::]"):
        first = [f"[::1]:{port}"]
    else:
        first = [with_port("127.0.0.1" if host in WILDCARDS else host, port)]
    return tuple(dict.fromkeys([*first, *others]))[:MAX_LINK_ADDRESSES]


def _is_usable(one: InterfaceAddress, wants_v6: bool) -> bool:
    if one.family == socket.AF_INET:
        return not ipaddress.ip_address(one.address).is_link_local
    if one.family == socket.AF_INET6 and wants_v6:
        return "%" not in one.address and not ipaddress.ip_address(one.address).is_link_local
    return False


def _rank(interface: str, address: str) -> int:
    if ipaddress.ip_address(address).is_loopback:
        return 2
    return 1 if interface.startswith(VIRTUAL_PREFIXES) else 0
