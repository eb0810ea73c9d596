"""What is opened before the coordinator listens: its state folder, and its model.

Knows nothing of the network. Everything here blocks; hashing a large model takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgpack

from coordinator.admission import AccessBook
from coordinator.catalogue import Catalogue
from coordinator.config import CoordinatorConfig
from coordinator.hf_config import read_hf_config
from coordinator.invitations import KEEP_SPENT_S
from coordinator.journal import Journal
from coordinator.model_folder import find_model_folder
from coordinator.tokens import TextCodec
from protocol.errors import ConfigInvalid, StorageFull, TokenizerMissing
from protocol.schema import pack
from protocol.security import KeyPair, Link, load_or_create_keypair, write_private
from protocol.specs import ModelSpec

JOURNAL_FILE: Final = "journal.db"
TOKENS_FILE: Final = "tokens.db"
SERVER_KEY_FILE: Final = "server.key"
CLIENT_KEY_FILE: Final = "client.key"
CLIENT_LINK_FILE: Final = "client.link"
READY_FILE: Final = "ready.json"
LOCAL_CLIENT: Final = "local"
TELL_EVERY_S: Final = 2.0

_log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """The opened state folder. `close` gives up its lock."""

    folder: Path
    journal: Journal
    book: AccessBook
    server_keys: KeyPair
    client_keys: KeyPair
    cluster: str
    term: int

    @staticmethod
    def open(config: CoordinatorConfig, now: float) -> Home:
        """Open or create keys and journal, and begin a new term; raises ConfigInvalid, StorageFull."""
        folder = config.state_folder
        journal = Journal.open(folder / JOURNAL_FILE)
        try:
            server_keys = load_or_create_keypair(folder / SERVER_KEY_FILE)
            client_keys = load_or_create_keypair(folder / CLIENT_KEY_FILE)
            journal.put_client(LOCAL_CLIENT, client_keys.public)
            journal.forget_tokens(now - KEEP_SPENT_S)
            book = AccessBook(pins=journal.pins(), tokens=journal.tokens(), clients=journal.clients())
            cluster, term = journal.begin_term(config.name)
        except BaseException:
            journal.close()
            raise
        return Home(
            folder=folder, journal=journal, book=book, server_keys=server_keys, client_keys=client_keys,
            cluster=cluster, term=term,
        )  # fmt: skip

    def client_link(self, addresses: tuple[str, ...]) -> Link:
        """Return the link of clients on this machine; it holds a secret."""
        return Link(role="ask", addresses=addresses, server_key=self.server_keys.public, secret=self.client_keys.secret)

    def tell_ready(self, addresses: tuple[str, ...]) -> None:
        """Write the client link and, after it, the file that says that we listen; raises StorageFull."""
        ready = {"address": addresses[0], "pid": os.getpid(), "cluster": self.cluster, "term": self.term}
        try:
            write_private(self.folder / CLIENT_LINK_FILE, (self.client_link(addresses).format() + "\n").encode())
            write_private(self.folder / READY_FILE, json.dumps(ready).encode() + b"\n")
        except OSError as error:
            raise StorageFull(f"can't write to {self.folder}: {error.strerror or error}") from error

    def close(self) -> None:
        """Say that nobody listens any more, and close the journal."""
        try:
            (self.folder / READY_FILE).unlink(missing_ok=True)
        except OSError as error:
            _log.warning("can't remove %s: %s", self.folder / READY_FILE, error)
        finally:
            self.journal.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """The opened model. `codec` None: its folder has no tokenizer."""

    spec: ModelSpec
    eos: frozenset[int]
    codec: TextCodec | None
    catalogue: Catalogue

    def identity(self) -> bytes:
        """Return a digest of weights and formats: sessions go on over a restart only under the same."""
        digest = hashlib.sha256(msgpack.packb(pack(replace(self.spec, name="any"))))
        for entry in self.catalogue.entries.values():
            digest.update(entry.digest)
        return digest.digest()


def open_model(config: CoordinatorConfig, progress: Progress) -> Model:
    """Find, read and hash the model; `progress` gets bytes hashed so far and in all, and may raise to stop it.

    Raises ConfigInvalid, CheckpointInvalid, ModelUnsupported, StorageFull.
    """
    folder = find_model_folder(config.model)
    weights, activations = config.formats
    read = read_hf_config(folder, weights=weights, activations=activations, name=_name_of(config.model))
    codec: TextCodec | None = None
    try:
        codec = TextCodec.load(folder)
    except TokenizerMissing as error:
        _log.warning("%s; only token ids can be asked", error.message)
    except ConfigInvalid as error:  # the extra `serve` is not installed
        _log.warning("%s", error)
    catalogue = Catalogue.build(folder, read.spec, config.cache_folder, progress, cache_bytes=config.tile_cache_bytes)
    _log.info("model %s: %d tiles, %d bytes", read.spec.name, len(catalogue.entries), catalogue.total_bytes)
    return Model(spec=read.spec, eos=frozenset(read.eos_token_ids), codec=codec, catalogue=catalogue)


def _name_of(model: str) -> str:
    """Return the name to show for a hub model, whose folder is called after a commit; "" for a local folder's own."""
    return "" if Path(model).expanduser().is_dir() else model.rpartition("/")[2]


def told_progress(also: Progress | None, clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a progress callback that logs bytes, rate and time left every two seconds, and calls `also`."""
    started = last_told = clock()

    def progress(done: int, total: int) -> None:
        nonlocal last_told
        now = clock()
        if now - last_told >= TELL_EVERY_S:
            last_told = now
            rate = done / max(now - started, 1e-9)
            left_s = (total - done) / max(rate, 1.0)
            _log.info(
                "hashing tiles: %.1f of %.1f GB, %.0f MB/s, %.0f s left", done / 1e9, total / 1e9, rate / 1e6, left_s
            )
        if also is not None:
            also(done, total)

    return progress
