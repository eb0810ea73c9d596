"""Keys, links and the gate: who may connect, proven by CURVE keys.

Knows nothing of messages or of what a peer may do once it is in. Public keys and secrets are z85 text, 40 bytes, as
ZeroMQ takes them; inside a link they are base64url without padding, 43 characters, which survives every chat program.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq
from zmq.utils import z85

from protocol.durable_file import Draft
from protocol.errors import ConfigInvalid, LinkInvalid
from protocol.gate import Gate

__all__ = ["Gate", "KeyPair", "Link", "is_key", "load_or_create_keypair", "require_address", "write_private"]

KEY_BYTES: Final = 40  # z85 of 32 bytes
SCHEME: Final = "manyhands://"
MAX_LINK_CHARS: Final = 2048
MAX_LINK_ADDRESSES: Final = 16
LINK_ROLES: Final = ("join", "ask")
_Z85 = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+(%[A-Za-z0-9._-]+)?\]|[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def is_key(key: bytes) -> bool:
    """Return whether these bytes are a CURVE key in z85."""
    if not _Z85.fullmatch(key):
        return False
    try:
        return len(z85.decode(key)) == 32
    except struct.error:  # five of its digits exceed 2**32
        return False


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A CURVE key pair, both halves z85. The secret never shows in repr."""

    public: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not is_key(self.public) or not is_key(self.secret):
            raise ValueError("a CURVE key is 40 characters of z85")

    @staticmethod
    def generate() -> KeyPair:
        """Return a new random pair."""
        return KeyPair(*zmq.curve_keypair())

    @staticmethod
    def from_secret(secret: bytes) -> KeyPair:
        """Return the pair that this secret belongs to; raises ValueError when it is no key."""
        if not is_key(secret):
            raise ValueError("a CURVE secret is 40 characters of z85")
        return KeyPair(zmq.curve_public(secret), secret)


def load_or_create_keypair(path: Path) -> KeyPair:
    """Read the key pair kept in `path`, or make one and keep it there, readable by its owner alone.

    Raises ConfigInvalid when the file can't be read or written, holds no key, or is open to others.
    """
    try:
        text = _read_private(path)
        if text is None:
            pair = KeyPair.generate()
            write_private(path, pair.secret + b"\n")
            return pair
    except OSError as error:
        raise ConfigInvalid(f"key file {path}: {error.strerror or error}") from error
    try:
        return KeyPair.from_secret(text.strip())
    except ValueError:
        raise ConfigInvalid(
            f"key file {path} holds no key",
            remedy="delete it to get a new one; who pinned the old one refuses it",
        ) from None


def _read_private(path: Path) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if os.name == "posix" and mode & 0o077:
            raise ConfigInvalid(f"key file {path} is open to others ({mode & 0o777:o})", remedy=f"chmod 600 {path}")
        return file.read(4096)


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner can read (0600), whole or not at all, making its folder; raises OSError."""
    with Draft(path, folder_mode=0o700) as draft:
        draft.append(content)
        draft.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a worker ("join") or client ("ask") needs to find a coordinator, know it, and be let in.

    `addresses` are "host:port" (IPv6 in brackets), best first; `server_key` and `secret` are z85.
    """

    role: str
    addresses: tuple[str, ...]
    server_key: bytes
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.role not in LINK_ROLES:
            raise ValueError(f"link role {self.role!r:.40} is none of {', '.join(LINK_ROLES)}")
        if not 0 < len(self.addresses) <= MAX_LINK_ADDRESSES:
            raise ValueError(f"a link has 1 to {MAX_LINK_ADDRESSES} addresses, not {len(self.addresses)}")
        for address in self.addresses:
            require_address(address)
        if not is_key(self.server_key):
            raise ValueError("the link's server key is no CURVE key")
        if not is_key(self.secret):
            raise ValueError("the link's token is no CURVE key")

    @property
    def keys(self) -> KeyPair:
        """The key pair to dial with."""
        return KeyPair.from_secret(self.secret)

    def format(self) -> str:
        """Return the text form; it holds the secret."""
        return f"{SCHEME}{','.join(self.addresses)}/{self.role}/{_to_url(self.server_key)}.{_to_url(self.secret)}"

    @staticmethod
    def parse(text: str) -> Link:
        """Read a link; raises LinkInvalid that says what is wrong and never repeats the token."""
        text = text.strip()
        if len(text) > MAX_LINK_CHARS:
            raise LinkInvalid(f"a link of {len(text)} characters is too long (at most {MAX_LINK_CHARS})")
        if not text.startswith(SCHEME):
            raise LinkInvalid(f"a link begins with {SCHEME}")
        parts = text.removeprefix(SCHEME).split("/")
        if len(parts) != 3:
            raise LinkInvalid(f"a link has the form {SCHEME}HOST:PORT/join/KEY.TOKEN; a part is missing or too many")
        addresses, role, keys = parts
        server_key, dot, secret = keys.partition(".")
        if not dot:
            raise LinkInvalid("the link ends before its token; part of it was not copied")
        try:
            return Link(
                role=role,
                addresses=tuple(addresses.split(",")),
                server_key=_from_url(server_key, "server key"),
                secret=_from_url(secret, "token"),
            )
        except ValueError as error:
            raise LinkInvalid(str(error)) from None  # the cause might hold part of the link


def require_address(address: str) -> None:
    """Raise ValueError unless `address` is "host:port" with a port from 1 to 65535; IPv6 stands in brackets."""
    host, colon, port = address.rpartition(":")
    if not colon or not _HOST.fullmatch(host) or len(host) > 255:
        raise ValueError(f"address {address!r:.80} is not HOST:PORT (IPv6 as [::1]:PORT)")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError(f"address {address!r:.80} needs a port from 1 to 65535")


def _to_url(key: bytes) -> str:
    return base64.urlsafe_b64encode(z85.decode(key)).rstrip(b"=").decode("ascii")


def _from_url(text: str, what: str) -> bytes:
    if len(text) != 43:  # 32 bytes in base64 without padding
        raise ValueError(f"the link's {what} is cut or too long: {len(text)} of 43 characters")
    try:
        raw = base64.b64decode(text.encode("ascii") + b"=", altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError(f"the link's {what} is damaged") from None
    if len(raw) != 32 or _to_url(key := z85.encode(raw)) != text:  # the last two bits are spare: one spelling only
        raise ValueError(f"the link's {what} is damaged")
    return key
