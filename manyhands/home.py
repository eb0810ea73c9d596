"""Where the link of the local coordinator lies, and which link a client uses when none is given.

Knows nothing of what is in a link.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from protocol.errors import LinkInvalid
from protocol.security import Link

LINK_VARIABLE = "MANYHANDS_LINK"
CLIENT_LINK_FILE = "client.link"


def state_home(environ: Mapping[str, str]) -> Path:
    """Return the folder of this user's lasting state (XDG base directories)."""
    return Path(environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "manyhands"


def coordinator_state_dir(environ: Mapping[str, str]) -> Path:
    """Return where a coordinator started without further words keeps its state."""
    return state_home(environ) / "coordinator"


def config_file(environ: Mapping[str, str]) -> Path:
    """Return where this user's configuration file is looked for."""
    return Path(environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "manyhands" / "config.toml"


def find_link(given: str | Link | None, environ: Mapping[str, str]) -> Link:
    """Return the client link that was given, or $MANYHANDS_LINK, or the one of the coordinator on this machine.

    Raises LinkInvalid saying where it looked.
    """
    if isinstance(given, Link):
        return _client_link(given, "the link")
    if given:
        return _client_link(Link.parse(given), "the link")
    if text := environ.get(LINK_VARIABLE):
        return _client_link(Link.parse(text), f"${LINK_VARIABLE}")
    path = coordinator_state_dir(environ) / CLIENT_LINK_FILE
    return _client_link(Link.parse(read_link_file(path)), str(path))


def read_link_file(path: Path) -> str:
    """Return the text of a link file; raises LinkInvalid."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        remedy = f"start `manyhands up` on this machine, or set ${LINK_VARIABLE} or --link to its client link"
        raise LinkInvalid(f"no link given, and there is no coordinator's {path}", remedy=remedy) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LinkInvalid(f"{path} can't be read: {error}") from error


def _client_link(link: Link, where: str) -> Link:
    if link.role != "ask":
        raise LinkInvalid(
            f"{where} is for a worker that joins, not for a client",
            remedy=f"use the link in the coordinator's {CLIENT_LINK_FILE}",
        )
    return link
