"""Under which addresses neighbours may reach this worker's data listener, and its tile server.

Knows nothing of who they are or whether a firewall stands between; a probe finds out.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace

import psutil

from protocol.errors import ConfigInvalid
from protocol.ids import WorkerId
from protocol.messages import LinkOrder
from protocol.security import require_address

MOST = 8


def data_addresses(listening: str, advertised: Sequence[str], coordinators: Sequence[str]) -> tuple[str, ...]:
    """Return "host:port" texts, best first.

    `listening` is the listener's actual address, `advertised` what the owner says instead ("host" or "host:port"),
    `coordinators` the addresses we dial: the way there often is the way to neighbours too. Raises ConfigInvalid for an
    advertised address that is none.
    """
    host, _, port = listening.removeprefix("tcp://").rpartition(":")
    if advertised:
        return tuple(_with_port(one, port) for one in advertised)[:MOST]
    if host not in ("0.0.0.0", "*", "[::]"):
        return (f"{host}:{port}",)
    hosts = [found for one in coordinators if (found := _own_host_towards(one))]
    return tuple(f"{one}:{port}" for one in dict.fromkeys([*hosts, *_own_hosts()]))[:MOST]


def tile_addresses(listening: str, advertised: Sequence[str], coordinators: Sequence[str]) -> tuple[str, ...]:
    """Return where neighbours may reach the tile server, as `data_addresses` does; an advertised port is not its."""
    hosts = [one.rpartition(":")[0] if _has_port(one) else one for one in advertised]
    return data_addresses(listening, hosts, coordinators)


def _has_port(address: str) -> bool:
    return address.rpartition(":")[2].isdigit() and not address.endswith("]")


def _with_port(address: str, port: str) -> str:
    full = address if _has_port(address) else f"{address}:{port}"
    try:
        require_address(full)
    except ValueError as error:
        raise ConfigInvalid(f"advertise: {error}") from None
    return full


def _own_host_towards(address: str) -> str:
    """Return our own IPv4 address on the way to `address`; no packet is sent. Empty when there is no way."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))
        return str(probe.getsockname()[0])
    return ""


def _own_hosts() -> list[str]:
    found: list[str] = []
    with contextlib.suppress(OSError):  # Android refuses to list interfaces; then the way to the coordinator must do
        for entries in psutil.net_if_addrs().values():
            found += [one.address for one in entries if one.family == socket.AF_INET]
    return [one for one in found if not one.startswith(("127.", "169.254."))]


def best_first(order: LinkOrder, reached_at: Mapping[WorkerId, str]) -> LinkOrder:
    """Put the address that answered a probe before the others."""
    best = reached_at.get(order.peer.worker)
    if best is None or best not in order.peer.addresses:
        return order
    rest = (one for one in order.peer.addresses if one != best)
    return replace(order, peer=replace(order.peer, addresses=(best, *rest)))
