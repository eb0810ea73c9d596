"""Every setting of the coordinator, checked, with its default and what it is for.

Knows nothing of flags, files or the environment (`protocol.settings` fills it from them), and opens nothing.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from coordinator.memory import DEFAULT_KV_POSITIONS
from coordinator.policy import MAX_SESSIONS, ClusterPolicy
from coordinator.shares import parse_words
from protocol.errors import PlanImpossible
from protocol.security import MAX_LINK_ADDRESSES, require_address
from protocol.settings import NumBytesText, parse_bytes, setting
from protocol.specs import ActivationFormat, WeightFormat

AUTO = "auto"
DEFAULT_PORT = 7411
WILDCARDS = ("0.0.0.0", "::", "[::]", "*")


class Dtype(StrEnum):
    """The number format of the weights; activations are in the same one, or the checkpoint's own for whole numbers."""

    AUTO = "auto"  # the checkpoint's own
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"
    INT4 = "int4"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """The coordinator's settings; times in seconds."""

    model: str = setting("", "model folder, or OWNER/NAME[@REVISION] on the Hugging Face hub")
    dtype: Dtype = setting(Dtype.AUTO, "number format of the weights: auto (as stored), float32, bfloat16, int8, int4")
    plan: str = setting(AUTO, "who computes what: shares of layers, stages by '/', their members by ',', or auto")
    workers: int = setting(1, "how many workers to wait for when the plan is auto; the head counts")
    head_only: bool = setting(False, "the head holds embedding and output only, no layers")
    name: str = setting("manyhands", "name of a new cluster")
    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0 to let devices of the network join")
    port: int = setting(DEFAULT_PORT, "port to listen on; 0 takes any free one")
    advertise: tuple[str, ...] = setting((), "HOST or HOST:PORT to put into links; default: this machine's addresses")
    state_dir: Path | None = setting(None, "folder of keys and journal; default: $XDG_STATE_HOME/manyhands/coordinator")
    cache_dir: Path | None = setting(None, "folder of tile hashes; default: $XDG_CACHE_HOME/manyhands/coordinator")
    tile_cache: NumBytesText = setting("256MiB", "memory for tiles that several workers fetch")
    heartbeat_s: float = setting(0.5, "how often a worker tells that it lives")
    lease_s: float = setting(2.8, "silence after which a worker counts as lost")
    load_timeout_s: float = setting(60.0, "how long loading may stand still")
    step_timeout_s: float = setting(60.0, "how long a step may stand still on all workers")
    form_timeout_s: float = setting(60.0, "how long a request waits while the model can't form")
    client_silence_s: float = setting(15.0, "silence after which a client counts as gone")
    client_return_s: float = setting(60.0, "how long a request goes on while its client is gone")
    max_sessions: int = setting(16, f"how many requests are computed at once, at most {MAX_SESSIONS}")
    max_waiting: int = setting(256, "how many more may wait; beyond, requests are refused as overloaded")
    prefill_chunk: int = setting(256, "how many prompt tokens are computed in one step")
    kv_positions: int = setting(
        DEFAULT_KV_POSITIONS, "tokens of all requests together that are remembered, if memory allows"
    )
    spares: int = setting(0, "keep the tiles at hand that the loss of so many workers at once would need elsewhere")
    replicate_kv: bool = setting(False, "keep copies of keys and values with who would take over from a lost worker")
    probation_s: float = setting(30.0, "how long a worker that is lost time and again must stay to be used; 0: no rule")
    return_s: float = setting(10.0, "how long a restarted coordinator waits for the workers that it had")
    invite_hours: float = setting(24.0, "how long a join link is good for")
    exit_on_stdin_close: bool = setting(False, "end when standard input is closed (for a parent process)")

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port {self.port} is outside [0, 65535]")
        if not 1 <= len(self.name) <= 64:
            raise ValueError(f"name {self.name!r:.80} must have 1 to 64 characters")
        if len(self.advertise) > MAX_LINK_ADDRESSES:
            raise ValueError(f"advertise has {len(self.advertise)} addresses, at most {MAX_LINK_ADDRESSES} fit a link")
        for address in self.advertise:
            require_address(with_port(address, DEFAULT_PORT))
        if not 0 <= self.client_return_s < math.inf:
            raise ValueError(f"client_return_s {self.client_return_s} must be a number of seconds, 0 or more")
        for name in ("client_silence_s", "invite_hours"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")
        if self.plan_words is not None:
            try:
                parse_words(self.plan_words)
            except PlanImpossible as error:
                raise ValueError(error.message) from error
        self.policy()  # checks the rest

    @property
    def plan_words(self) -> str | None:
        """The plan as written, or None for the automatic one."""
        return None if self.plan == AUTO else self.plan

    @property
    def state_folder(self) -> Path:
        """Where keys, journal and the client link are."""
        return self.state_dir or _xdg("XDG_STATE_HOME", ".local/state") / "manyhands" / "coordinator"

    @property
    def cache_folder(self) -> Path:
        """Where the hashes of tiles are kept between starts."""
        return self.cache_dir or _xdg("XDG_CACHE_HOME", ".cache") / "manyhands" / "coordinator"

    @property
    def tile_cache_bytes(self) -> int:
        """Bytes of cut tiles that are kept in memory."""
        return parse_bytes(self.tile_cache)

    @property
    def formats(self) -> tuple[WeightFormat | None, ActivationFormat | None]:
        """Weight and activation format; None: as the checkpoint has them."""
        if self.dtype is Dtype.AUTO:
            return None, None
        if self.dtype in (Dtype.INT8, Dtype.INT4):
            return WeightFormat(self.dtype.value), None
        return WeightFormat(self.dtype.value), ActivationFormat(self.dtype.value)

    def policy(self) -> ClusterPolicy:
        """Return the core's part of the settings; raises ValueError for values that don't go together."""
        return ClusterPolicy(
            plan_words=self.plan_words,
            workers=self.workers,
            head_only=self.head_only,
            heartbeat_s=self.heartbeat_s,
            lease_s=self.lease_s,
            load_timeout_s=self.load_timeout_s,
            step_timeout_s=self.step_timeout_s,
            form_timeout_s=self.form_timeout_s,
            max_sessions=self.max_sessions,
            max_waiting=self.max_waiting,
            prefill_chunk=self.prefill_chunk,
            kv_positions=self.kv_positions,
            spares=self.spares,
            replicate_kv=self.replicate_kv,
            probation_s=self.probation_s,
            return_s=self.return_s,
        )


def with_port(address: str, port: int) -> str:
    """Return "host:port", taking `port` when the address has none; IPv6 gets its brackets."""
    if address.startswith("["):
        return address if address.rpartition("]")[2] else f"{address}:{port}"
    if address.count(":") > 1:
        return f"[{address}]:{port}"
    return address if ":" in address else f"{address}:{port}"


def _xdg(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / default)
