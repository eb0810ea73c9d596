"""The wire, in one table: every message with its code, who sends it to whom, its fields, and the reply it gets.

Knows nothing of sockets or encoding (`protocol.frames` does that). Rules of change: a code is never reused; fields are
only added at the end, with a default; what a field means never changes. `VERSION` rises when an old peer could not
follow.

Beside its header a message may carry one raw payload frame; `payload_bytes` bounds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, NamedTuple, TypeVar

from protocol.batches import Sampling, SessionRows
from protocol.errors import ManyhandsError, from_code
from protocol.ids import RequestId, SessionId, WorkerId
from protocol.plans import Plan
from protocol.schema import Count, Digest, Epoch, Name, NumBytes, PublicKey, Seconds, Text, Within
from protocol.specs import ActivationFormat

VERSION = 1
OLDEST_VERSION = 1

KIB, MIB = 2**10, 2**20
MAX_HEADER_BYTES = 64 * KIB
MAX_MANIFEST_BYTES = 16 * MIB
MAX_PROMPT_BYTES = 8 * MIB
MAX_TILE_CHUNK_BYTES = 1 * MIB
MAX_TENSOR_BYTES = 256 * MIB
MAX_STATUS_BYTES = 4 * MIB


class Role(StrEnum):
    """Who speaks. A key is admitted in exactly one role; `HEAD` is the worker the coordinator trusts with tokens."""

    COORDINATOR = "coordinator"
    INVITED = "invited"
    WORKER = "worker"
    HEAD = "head"
    CLIENT = "client"


class Row(NamedTuple):
    """A line of the table."""

    code: int
    message: type
    senders: frozenset[Role]
    receivers: frozenset[Role]
    reply: str
    payload_bytes: int


TABLE: dict[int, Row] = {}
ROW_OF: dict[type, Row] = {}
M = TypeVar("M", bound=type)


def message(
    code: int, sender: Role | set[Role], receiver: Role | set[Role], *, reply: str = "", payload_bytes: int = 0
) -> Callable[[M], M]:
    """Enter a dataclass into the table; a code that is taken is a bug and raises at import."""

    def enter(kind: M) -> M:
        if code in TABLE:
            raise RuntimeError(f"message code {code} is taken by {TABLE[code].message.__name__}")
        senders = frozenset(sender if isinstance(sender, set) else {sender})
        receivers = frozenset(receiver if isinstance(receiver, set) else {receiver})
        row = Row(code, kind, senders, receivers, reply, payload_bytes)
        TABLE[code] = ROW_OF[kind] = row
        return kind

    return enter


C, G, W, H, U = Role.COORDINATOR, Role.INVITED, Role.WORKER, Role.HEAD, Role.CLIENT  # G: invited guest

Addresses = Annotated[tuple[Text, ...], Within(0, 16)]
Version = Annotated[int, Within(1, 10_000)]
StepId = Annotated[int, Within(0, 2**53)]
Rows = Annotated[tuple[SessionRows, ...], Within(1, 1024)]
Period = Annotated[float, Within(0.01, 3600.0)]
TokenId = Annotated[int, Within(0, 2**31 - 1)]


# ---------------------------------------------------------------- values inside messages


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
    """Tells the head how a new session samples."""

    session: SessionId
    sampling: Sampling


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


# ---------------------------------------------------------------- any direction


@message(1, {C, W, H}, {C, G, W, H, U})
@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReport:
    """A typed error. `request` or `digest` say what it answers; both empty: the conversation itself."""

    code: Name
    text: Text
    remedy: Text = ""
    node: Text = ""
    phase: Text = ""
    request: Annotated[str, Within(0, 64)] = ""
    digest: Annotated[bytes, Within(0, 32)] = b""

    @staticmethod
    def of(error: ManyhandsError, *, request: str = "", digest: bytes = b"", node: str = "") -> ErrorReport:
        """Put an error into wire form, cut to its bounds."""
        return ErrorReport(
            code=error.code,
            text=_sendable(error.message, 1000),
            remedy=_sendable(error.remedy, 1000),
            node=_sendable(error.node or node, 200),
            phase=_sendable(error.phase, 200),
            request=request,
            digest=digest,
        )

    def error(self) -> ManyhandsError:
        """Rebuild the error."""
        return from_code(self.code, self.text, remedy=self.remedy, node=self.node, phase=self.phase)


def _sendable(text: str, most: int) -> str:
    """Cut a text, and replace what has no UTF-8: the odd bytes of a file's name arrive as lone surrogates."""
    return text[:most].encode("utf-8", "replace").decode("utf-8")


# ---------------------------------------------------------------- membership


@message(2, G, C, reply="Enrolled")
@dataclass(frozen=True, slots=True, kw_only=True)
class Enroll:
    """Under the key of an invitation: pin my own key, admit me under this name (made unique by the coordinator)."""

    oldest_version: Version
    version: Version
    software: Text
    name: Name
    public_key: PublicKey


@message(3, C, G)
@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """Your key is pinned; dial again with it under this name."""

    worker: WorkerId
    cluster: Name


@message(4, {W, H}, C, reply="Welcome")
@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First message on a worker's control connection. `epoch` and `phase`: what it still holds from before."""

    oldest_version: Version
    version: Version
    software: Text
    worker: WorkerId
    profile: DeviceProfile
    data_addresses: Addresses
    epoch: Epoch
    phase: WorkerPhase


@message(5, U, C, reply="Welcome")
@dataclass(frozen=True, slots=True, kw_only=True)
class ClientHello:
    """First message of a client."""

    oldest_version: Version
    version: Version
    software: Text


@message(6, C, {W, H, U})
@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The version we speak from now on, and how often a worker must be heard."""

    version: Version
    software: Text
    cluster: Name
    term: Epoch
    heartbeat_s: Period
    lease_s: Period


@message(7, {W, H}, C, reply="HeartbeatReply")
@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """Sent by the control side, which compute can't block. `progress` counts ops computed and bytes loaded."""

    sequence: Count
    epoch: Epoch
    phase: WorkerPhase
    progress: NumBytes
    resident_bytes: NumBytes
    weight_bytes: NumBytes
    kv_bytes: NumBytes


@message(8, C, {W, H})
@dataclass(frozen=True, slots=True, kw_only=True)
class HeartbeatReply:
    """Heard you; your lease runs from here."""

    sequence: Count


@message(9, {W, H}, C)
@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """The worker ends on purpose."""

    reason: Text = ""


# ---------------------------------------------------------------- plans


@message(10, C, {W, H}, reply="Reached")
@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Try to reach the data sockets of these peers, all at once, and say which answered."""

    probe: Count
    peers: Annotated[tuple[Peer, ...], Within(0, 256)]


@message(11, {W, H}, C)
@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """The peers that answered a probe."""

    probe: Count
    workers: Annotated[tuple[WorkerId, ...], Within(0, 256)]


@message(12, C, {W, H}, reply="Loaded", payload_bytes=MAX_MANIFEST_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Drop the plan before, fetch and load your tiles of this one, make these links. Payload: the manifest lines
    (`protocol.frames.pack_manifest`) of the tiles this worker holds."""

    plan: Plan
    links: Annotated[tuple[LinkOrder, ...], Within(0, 256)]


@message(13, {W, H}, C)
@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    """How far fetching, loading or linking has come."""

    epoch: Epoch
    phase: Name  # fetch, load, link
    done_bytes: NumBytes
    total_bytes: NumBytes


@message(14, {W, H}, C)
@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """Ready to compute under this epoch."""

    epoch: Epoch
    weight_bytes: NumBytes
    fetched_bytes: NumBytes
    resident_bytes: NumBytes
    load_s: Seconds


@message(15, C, {W, H})
@dataclass(frozen=True, slots=True, kw_only=True)
class Unload:
    """This epoch is over: stop computing, drop its sessions. Cached tiles stay on disk."""

    epoch: Epoch
    reason: Text = ""


@message(16, C, {W, H})
@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """These sessions are over: free their KV cache."""

    sessions: Annotated[tuple[SessionId, ...], Within(0, 1024)]


@message(17, {W, H}, C)
@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """This worker could not go on under this epoch: loading or step failed, or a neighbour is gone."""

    epoch: Epoch
    error: ErrorReport
    lost: Annotated[str, Within(0, 64)] = ""  # the neighbour whose link broke, when that is the reason


@message(20, {W, H}, C, reply="TileChunk")
@dataclass(frozen=True, slots=True, kw_only=True)
class TileRequest:
    """Ask for bytes `[offset, offset + length)` of a tile, by its hash."""

    digest: Digest
    offset: NumBytes
    length: Annotated[int, Within(1, MAX_TILE_CHUNK_BYTES)]


@message(21, C, {W, H}, payload_bytes=MAX_TILE_CHUNK_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class TileChunk:
    """Bytes of a tile from `offset`; payload: the bytes."""

    digest: Digest
    offset: NumBytes


# ---------------------------------------------------------------- steps


@message(30, C, H, reply="StepDone", payload_bytes=MAX_PROMPT_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Compute these rows. Payload: one little-endian int32 token id a row, in order. `opens`: sessions new here."""

    epoch: Epoch
    step: StepId
    rows: Rows
    opens: Annotated[tuple[SessionSampling, ...], Within(0, 1024)] = ()


@message(31, H, C)
@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """A step has passed all stages: a token for every row that asked for one."""

    epoch: Epoch
    step: StepId
    tokens: Annotated[tuple[SampledToken, ...], Within(0, 1024)]
    step_s: Seconds  # on the head's clock, from Step to StepDone


@message(32, {W, H}, {W, H}, payload_bytes=MAX_TENSOR_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """Hidden states on their way into `stage` (number of stages: back to the head). Payload: `[rows, hidden]`."""

    epoch: Epoch
    step: StepId
    stage: Count
    format: ActivationFormat
    rows: Rows


@message(33, {W, H}, {W, H}, payload_bytes=MAX_TENSOR_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """One member's part of the sum of `op` (2 x layer for attention, + 1 for the FFN). Payload: `[rows, hidden]`."""

    epoch: Epoch
    step: StepId
    op: Count
    rank: Count
    format: ActivationFormat


@message(34, {W, H}, {W, H}, payload_bytes=MAX_TENSOR_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """The hub's sum of `op`, the same bytes to every member. Payload: `[rows, hidden]`."""

    epoch: Epoch
    step: StepId
    op: Count
    format: ActivationFormat


@message(35, {W, H}, {W, H}, reply="LinkWelcome")
@dataclass(frozen=True, slots=True, kw_only=True)
class LinkHello:
    """First frame on a dialled data link (also a probe): who I am, and the epoch I link for (0: a probe)."""

    worker: WorkerId
    epoch: Epoch


@message(36, {W, H}, {W, H})
@dataclass(frozen=True, slots=True, kw_only=True)
class LinkWelcome:
    """The listener's answer to `LinkHello`."""

    worker: WorkerId
    epoch: Epoch


@message(37, {C, W, H}, {C, W, H})
@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """Envelope of data frames that go through the coordinator, which checks `source` against the sender's key.

    The frames after it are the message itself; the coordinator does not look inside.
    """

    source: WorkerId
    target: WorkerId


# ---------------------------------------------------------------- clients


@message(40, U, C, reply="Accepted, Piece, Waiting, Finished or ErrorReport", payload_bytes=MAX_PROMPT_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Continue the prompt in the payload. `request` is the client's own name for it, unique to that client."""

    request: Annotated[RequestId, Within(1, 64)]
    prompt_kind: PromptKind
    max_tokens: Annotated[int, Within(1, 2**31 - 1)]
    sampling: Sampling
    stop: Annotated[tuple[Annotated[str, Within(1, 256)], ...], Within(0, 16)] = ()
    ignore_eos: bool = False


@message(41, C, U)
@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The request is queued."""

    request: RequestId
    session: SessionId
    prompt_tokens: Count


@message(42, C, U)
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """New tokens of a stream from number `index` on, and the text they make certain (maybe none yet)."""

    request: RequestId
    index: Count
    text: Annotated[str, Within(0, 16_384)]
    tokens: Annotated[tuple[TokenId, ...], Within(0, 1024)]


@message(43, C, U)
@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Nothing new yet, but alive: what the request waits for."""

    request: RequestId
    phase: Text


@message(44, C, U)
@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The stream ended well."""

    request: RequestId
    reason: FinishReason
    usage: Usage
    timings: Timings


@message(45, U, C, reply="Finished")
@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Stop this request; its work on the workers stops at the next step."""

    request: RequestId


@message(46, U, C, reply="StatusReport")
@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest:
    """Ask what the cluster looks like."""


@message(47, C, U, payload_bytes=MAX_STATUS_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """Payload: the status as JSON (`ARCHITECTURE.md` names its keys)."""


@message(48, U, C, reply="Invitation")
@dataclass(frozen=True, slots=True, kw_only=True)
class InviteRequest:
    """Ask for a join link; `trusted`: its worker may be the head (only a client on the coordinator's machine)."""

    trusted: bool = False


@message(49, C, U)
@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """A join link with a fresh one-time token."""

    link: Text
