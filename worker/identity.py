"""Who this worker is to each coordinator: its own key, and the name it was given under each server key.

Knows nothing of sockets. One file a fact, readable by its owner alone, replaced as a whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

from protocol.errors import ConfigInvalid, LinkInvalid
from protocol.ids import WorkerId, worker_id
from protocol.security import KeyPair, Link, is_key, load_or_create_keypair, require_address, write_private

try:
    import fcntl
except ImportError:  # Windows: two workers of one state folder are then not told apart
    fcntl = None  # type: ignore[assignment]

MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """A coordinator that has pinned our key: where it is, who it is, our name there, and the highest term obeyed."""

    server_key: bytes
    addresses: tuple[str, ...]
    worker: WorkerId
    cluster: str
    term: int = 0


class Identity:
    """The worker's key pair and the coordinators it belongs to."""

    def __init__(self, folder: Path) -> None:
        """Open the state folder for this process alone; raises ConfigInvalid when it can't be used."""
        self._path = folder / "homes.json"
        self._lock = _lock(folder)
        try:
            self.keys: KeyPair = load_or_create_keypair(folder / "identity.key")
            self._homes = {home.server_key: home for home in self._read()}
        except ConfigInvalid:
            self._lock.close()
            raise

    def home_of(self, link: Link | None) -> Home | None:
        """Return the coordinator of this link if we belong to it, with the link's addresses first.

        Without a link: the only one we belong to; raises LinkInvalid when there is none, or more than one.
        """
        if link is None:
            if len(self._homes) != 1:
                known = f"{len(self._homes)} coordinators" if self._homes else "no coordinator"
                raise LinkInvalid(f"there is no link, and this worker belongs to {known}")
            return next(iter(self._homes.values()))
        home = self._homes.get(link.server_key)
        if home is None:
            return None
        return replace(home, addresses=tuple(dict.fromkeys((*link.addresses, *home.addresses)))[:16])

    def term_of(self, home: Home) -> int:
        """Return the highest term of this coordinator that was obeyed."""
        known = self._homes.get(home.server_key)
        return known.term if known is not None else 0

    def remember(self, home: Home) -> None:
        """Keep a coordinator that has let us in; raises ConfigInvalid when it can't be written."""
        if self._homes.get(home.server_key) == home:
            return
        self._homes[home.server_key] = home
        lines = [
            {
                "server_key": one.server_key.decode("ascii"),
                "addresses": one.addresses,
                "worker": one.worker,
                "cluster": one.cluster,
                "term": one.term,
            }
            for one in self._homes.values()
        ]
        try:
            write_private(self._path, json.dumps(lines, indent=1).encode())
        except OSError as error:
            raise ConfigInvalid(f"{self._path} can't be written: {error.strerror}") from error

    def close(self) -> None:
        """Let another process use the folder."""
        self._lock.close()

    def _read(self) -> list[Home]:
        try:
            text = self._path.read_bytes()[:MAX_FILE_BYTES]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigInvalid(f"{self._path} can't be read: {error.strerror}") from error
        try:
            return [_home(line) for line in json.loads(text)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigInvalid(
                f"{self._path} is damaged: {error}", remedy="delete it and join again with a fresh link"
            ) from error


def _home(line: dict[str, Any]) -> Home:
    server_key, addresses = line["server_key"].encode("ascii"), tuple(line["addresses"])
    if not is_key(server_key):
        raise ValueError("server_key is no key")
    for address in addresses:
        require_address(address)
    return Home(
        server_key=server_key,
        addresses=addresses,
        worker=worker_id(line["worker"]),
        cluster=str(line["cluster"]),
        term=int(line.get("term", 0)),
    )


def _lock(folder: Path) -> FileIO:
    """Open the folder's lock file and hold it; raises ConfigInvalid when another process does."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (folder / "lock").open("wb", buffering=0)
    except OSError as error:
        raise ConfigInvalid(f"state folder {folder}: {error.strerror}") from error
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigInvalid(
            f"another worker uses the state folder {folder}", remedy="stop it, or give this one its own --state-dir"
        ) from None
    return file
