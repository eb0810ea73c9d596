"""What the coordinator's core is told (`Event`) and what it asks for (`Effect`), as frozen values.

Knows nothing of sockets, clocks or decisions. The rim turns what arrives into events, calls `ClusterState.handle`, and
carries out the effects in their order.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from protocol.batches import Sampling
from protocol.errors import ManyhandsError
from protocol.ids import SessionId, WorkerId
from protocol.messages import (
    Fault,
    FinishReason,
    Heartbeat,
    Hello,
    LeaveAsk,
    Leg,
    Loaded,
    LoadProgress,
    Reached,
    Role,
    Step,
    StepDone,
    Stocked,
    Timings,
    Usage,
)
from protocol.tiles import TileId


class Phase(StrEnum):
    """How far the model is from answering."""

    WAITING = "waiting"  # for workers, or for the end of a pause after a failure
    PROBING = "probing"
    LOADING = "loading"
    READY = "ready"


def token_bytes(tokens: Iterable[int]) -> bytes:
    """Pack token ids as little-endian int32; raises OverflowError for an id that doesn't fit."""
    packed = array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def token_ids(packed: bytes) -> array[int]:
    """Unpack little-endian int32 token ids; raises ValueError when the length is no multiple of 4."""
    tokens = array("i")
    tokens.frombytes(packed)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens


# ---------------------------------------------------------------- events: workers


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    """A worker said hello. `worker`, `role` (WORKER or HEAD) and `public_key` come from its key, not from the message.

    The rim sends `Welcome` itself, before it carries out the effects of this event. A worker that is already here is
    replaced: its old incarnation counts as lost.
    """

    worker: WorkerId
    role: Role
    public_key: bytes
    hello: Hello


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerHeard:
    """Any sign of life that is no other event: `heartbeat` when it is one (the core answers it), else None."""

    worker: WorkerId
    heartbeat: Heartbeat | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerGone:
    """A worker left (`Leave`), its connection broke, or a message to it can't be delivered; `reason` is for people.

    `on_purpose`: it said so itself, which nobody holds against it.
    """

    worker: WorkerId
    reason: str
    on_purpose: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersReached:
    """A worker's answer to `Probe`."""

    worker: WorkerId
    reached: Reached


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgressed:
    """A worker fetches, loads or links."""

    worker: WorkerId
    progress: LoadProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoaded:
    """A worker is ready to compute under an epoch."""

    worker: WorkerId
    loaded: Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFaulted:
    """A worker could not go on under an epoch."""

    worker: WorkerId
    fault: Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """`StepDone` from `worker`, which must be the head of the plan to count."""

    worker: WorkerId
    done: StepDone


@dataclass(frozen=True, slots=True, kw_only=True)
class TilesStocked:
    """How far a worker has come with a `Stock` order."""

    worker: WorkerId
    stocked: Stocked


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAsked:
    """A worker wants to end, or somebody wants it to: it hands over first, and is told `Goodbye` when it has.

    A worker that is not here is ignored; `ask` None: a client asks, for the worker.
    """

    worker: WorkerId
    ask: LeaveAsk | None = None


# ---------------------------------------------------------------- events: clients and time


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestArrived:
    """A client wants `max_tokens` tokens after `prompt` (little-endian int32, see `token_bytes`).

    The rim numbers sessions and never reuses a number; a number that is taken raises InvariantBroken. `stop_tokens`:
    the model's end-of-text ids, empty to ignore them. Refusals come back as `SessionFailed` from the same call.
    """

    session: SessionId
    prompt: bytes
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestCancelled:
    """Nobody wants more of this session. `reason` STOP: a stop string was found in its text. Unknown: ignored."""

    session: SessionId
    reason: FinishReason = FinishReason.CANCELLED


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed; expected about ten times a second. Leases are looked at only here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """The coordinator ends: every session is failed with Overloaded and every worker told to unload."""

    reason: str = "the coordinator is stopping"


Event = (
    WorkerJoined
    | WorkerHeard
    | WorkerGone
    | PeersReached
    | LoadProgressed
    | WorkerLoaded
    | WorkerFaulted
    | StepFinished
    | TilesStocked
    | LeaveAsked
    | RequestArrived
    | RequestCancelled
    | Tick
    | Stopping
)


# ---------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True, kw_only=True)
class SendControl:
    """Send `message` to `<worker>/control`; `tiles`: with the manifest of these as its payload.

    If it can't be delivered, answer with `WorkerGone`.
    """

    worker: WorkerId
    message: object
    tiles: tuple[TileId, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SendStep:
    """Send a step and its payload of token ids (little-endian int32) to `<worker>/data`, the head's data connection.

    If it can't be delivered, answer with `WorkerGone`.
    """

    worker: WorkerId
    step: Step
    tokens: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class DisconnectWorker:
    """Send `error` to `<worker>/control` as an `ErrorReport` if it can still be reached; the core has forgotten it.

    It is welcome again with a new `Hello`.
    """

    worker: WorkerId
    error: ManyhandsError


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensCommitted:
    """New tokens of a session, from its completion token number `index` on; never an end-of-text token."""

    session: SessionId
    index: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnded:
    """The last word about a session that ended well or was cancelled."""

    session: SessionId
    reason: FinishReason
    usage: Usage
    timings: Timings
    legs: tuple[Leg, ...] = ()  # who computed what of it


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionFailed:
    """The last word about a session that can't go on, or was refused."""

    session: SessionId
    error: ManyhandsError


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatsChanged:
    """A plan serves; `seats` are its workers in the order of its shares, for the next start to find again.

    None: a share that nobody has at the moment.
    """

    seats: tuple[WorkerId | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChanged:
    """The model's phase, or what it waits for, changed; `detail` is for people."""

    phase: Phase
    epoch: int
    detail: str


Effect = (
    SendControl
    | SendStep
    | DisconnectWorker
    | TokensCommitted
    | SessionEnded
    | SessionFailed
    | SeatsChanged
    | PhaseChanged
)
