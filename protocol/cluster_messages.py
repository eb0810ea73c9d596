"""Messages between coordinator and workers: errors, membership, plans, tiles.

Knows nothing of steps (`protocol.step_messages`) or clients (`protocol.client_messages`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocol.errors import ManyhandsError, from_code
from protocol.ids import SessionId, WorkerId
from protocol.message_table import (
    MAX_MANIFEST_BYTES,
    MAX_TILE_CHUNK_BYTES,
    C,
    G,
    H,
    U,
    W,
    message,
)
from protocol.message_values import (
    Addresses,
    Carry,
    DeviceProfile,
    HeldKv,
    Holder,
    KvMove,
    LinkOrder,
    Peer,
    Period,
    Version,
    WorkerPhase,
)
from protocol.plans import Plan
from protocol.schema import Count, Digest, Epoch, Name, NumBytes, PublicKey, Seconds, Text, Within

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
    tile_addresses: Addresses = ()  # where other workers fetch tiles from it; none: it serves none


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
    peak_bytes: NumBytes = 0  # the most this process ever held
    streamed_bytes: NumBytes = 0  # read by the window under this plan
    streaming_s: Seconds = 0.0  # time spent reading them
    stalled_s: Seconds = 0.0  # time the compute thread stood waiting for the window
    computing_s: Seconds = 0.0  # time the compute thread spent on steps, waiting included
    steps: Count = 0  # computed under this plan
    paused: Text = ""  # why its owner does not want it to compute now; empty: it may
    sums_s: Seconds = 0.0  # time of computing_s spent on sums with other members, waiting for them included


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
    carries: Annotated[tuple[Carry, ...], Within(0, 1024)] = ()  # sessions that go on; others are over
    gives: Annotated[tuple[KvMove, ...], Within(0, 256)] = ()  # send these keys and values once, of all carries
    takes: Annotated[tuple[KvMove, ...], Within(0, 256)] = ()  # wait for these before you say Loaded
    mirrors: Annotated[tuple[KvMove, ...], Within(0, 256)] = ()  # keep these peers' copies up to date, step by step
    holders: Annotated[tuple[Holder, ...], Within(0, 256)] = ()  # fetch tiles from these first


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
    predicted_bytes: NumBytes = 0  # what this process will hold at most under this plan
    pinned_bytes: NumBytes = 0  # weights that stay in memory
    window_bytes: NumBytes = 0  # slots that the other weights flow through
    held: Annotated[tuple[HeldKv, ...], Within(0, 1024)] = ()  # of the carries; one that is not named is not held
    knows_layers: bool = False  # it can be sent steps through a part of the layers


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


@message(18, C, {W, H}, reply="Stocked", payload_bytes=MAX_MANIFEST_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """Have these tiles on disk, beside the running work: for a plan to come, or should a neighbour be lost.

    Payload: their manifest lines. A newer order takes the place of an older one.
    """

    order: Count
    holders: Annotated[tuple[Holder, ...], Within(0, 256)] = ()


@message(19, {W, H}, C)
@dataclass(frozen=True, slots=True, kw_only=True)
class Stocked:
    """How far a `Stock` order has come; `is_over` when nothing more will be fetched for it, `error` if that is why."""

    order: Count
    done_bytes: NumBytes
    total_bytes: NumBytes
    is_over: bool = False
    error: Text = ""


@message(20, {W, H}, {C, W, H}, reply="TileChunk")
@dataclass(frozen=True, slots=True, kw_only=True)
class TileRequest:
    """Ask for bytes `[offset, offset + length)` of a tile, by its hash."""

    digest: Digest
    offset: NumBytes
    length: Annotated[int, Within(1, MAX_TILE_CHUNK_BYTES)]


@message(21, {C, W, H}, {W, H}, payload_bytes=MAX_TILE_CHUNK_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class TileChunk:
    """Bytes of a tile from `offset`; payload: the bytes."""

    digest: Digest
    offset: NumBytes


# ---------------------------------------------------------------- leaving


@message(22, {W, H}, C, reply="Goodbye")
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAsk:
    """The worker wants to end: hand over what it does, then let it go."""

    reason: Text = ""


@message(23, C, {W, H})
@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """Nothing depends on you any more: you may end."""

    reason: Text = ""
