"""The values that stand inside messages: devices, peers, links, sampled tokens, and the bounds of their fields.

Knows nothing of which message carries them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

from protocol.batches import Sampling, SessionRows
from protocol.ids import SessionId, WorkerId
from protocol.schema import Count, Epoch, Name, NumBytes, PublicKey, Seconds, Text, Within
from protocol.specs import NO_LAYERS, Span

Addresses = Annotated[tuple[Text, ...], Within(0, 16)]
Version = Annotated[int, Within(1, 10_000)]
StepId = Annotated[int, Within(0, 2**53)]
Rows = Annotated[tuple[SessionRows, ...], Within(1, 1024)]
Period = Annotated[float, Within(0.01, 3600.0)]
TokenId = Annotated[int, Within(0, 2**31 - 1)]


class WorkerPhase(StrEnum):
    """What a worker is doing, as it tells in its heartbeats."""

    IDLE = "idle"
    LOADING = "loading"
    READY = "ready"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A worker's device, as measured by itself."""

    system: Text
    machine: Text
    cores: Count
    memory_bytes: NumBytes
    available_bytes: NumBytes
    budget_bytes: NumBytes  # what its owner lets it take
    device: Name  # cpu, cuda, mps
    torch: Text
    base_bytes: NumBytes = 0  # what the process takes before it holds anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """How to reach a worker's data socket: direct addresses to dial, none when it can only be relayed to."""

    worker: WorkerId
    public_key: PublicKey
    addresses: Addresses


class LinkMode(StrEnum):
    """How two workers of a plan exchange data frames, seen from one of them."""

    DIAL = "dial"
    LISTEN = "listen"
    RELAY = "relay"  # through the coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOrder:
    """One link that a worker must hold under a plan."""

    peer: Peer
    mode: LinkMode


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSampling:
    """Tells the head how a session samples that it meets for the first time under this epoch.

    `history`: ids of the session's log before its first row; they stand in the step's payload before all rows.
    """

    session: SessionId
    sampling: Sampling
    history: Count = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """Tiles of attention, or the keys and values that belong to them: these KV-head groups in each of these layers."""

    layers: Span
    groups: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Carry:
    """A session that goes on under a new plan: its place there, and how many positions were computed before."""

    session: SessionId
    at: Count
    capacity: Annotated[int, Within(1, 2**31 - 1)]
    computed: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMove:
    """Keys and values that travel between this worker and a peer; the message says which way."""

    peer: WorkerId
    cells: Cells


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLayers:
    """How many positions of a session, from its beginning, a worker has for all of its cells of these layers."""

    layers: Span
    positions: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptInputs:
    """Of how many positions of a session, from its beginning, a worker keeps the hidden states that enter a layer."""

    layer: Count
    positions: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldKv:
    """How many positions of a carried session, from its beginning, a worker has for all of its cells.

    `layers`: those of which it has more. `inputs`: from which a part of the layers can be computed again.
    """

    session: SessionId
    positions: Count
    layers: Annotated[tuple[HeldLayers, ...], Within(0, 64)] = ()
    inputs: Annotated[tuple[KeptInputs, ...], Within(0, 64)] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A worker that has the tiles of this share on its disk; `peer.addresses` are those of its tile server."""

    peer: Peer
    layers: Span
    groups: Span
    ffn: Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """A part of an answer that was computed under one plan: from token number `start` of the answer on.

    `stages`: one line each, layers and members. `repeated`: positions that had to be computed again when it began;
    `layers`: of which layers, when not of all; `cause`: why the plan before ended.
    """

    epoch: Epoch
    start: Count
    words: Name
    stages: Annotated[tuple[Text, ...], Within(0, 128)]
    repeated: Count = 0
    cause: Text = ""
    layers: Span = NO_LAYERS


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """The head's choice for one session; `logprob` is of the distribution before temperature and filters."""

    session: SessionId
    token: TokenId
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of a finished request."""

    prompt_tokens: Count
    completion_tokens: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where a request's time went, in seconds on the coordinator's clock."""

    queued_s: Seconds
    first_token_s: Seconds  # from acceptance to the first token
    total_s: Seconds


class FinishReason(StrEnum):
    """Why a stream ended."""

    LENGTH = "length"
    STOP = "stop"  # a stop string or an end-of-text token
    CANCELLED = "cancelled"


class PromptKind(StrEnum):
    """What the payload of `Generate` is."""

    TEXT = "text"  # UTF-8
    IDS = "ids"  # little-endian int32
    CHAT = "chat"  # JSON list of {"role", "content"}
