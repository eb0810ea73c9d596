"""Messages between coordinator and clients: requests, streams, status, invitations.

Knows nothing of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocol.batches import Sampling
from protocol.ids import RequestId, SessionId, WorkerId
from protocol.message_table import (
    MAX_PROMPT_BYTES,
    MAX_STATUS_BYTES,
    C,
    U,
    message,
)
from protocol.message_values import (
    FinishReason,
    Leg,
    PromptKind,
    Timings,
    TokenId,
    Usage,
)
from protocol.schema import Count, Text, Within


@message(40, U, C, reply="Accepted, Piece, Waiting, Finished or ErrorReport", payload_bytes=MAX_PROMPT_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Generate:
    """Continue the prompt in the payload. `request` is the client's name for it: the same name is the same request.

    Said again, as after a lost connection, it is `Resume` from the beginning.
    """

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
    legs: Annotated[tuple[Leg, ...], Within(0, 64)] = ()  # who computed it; the latest, should there be more


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


@message(50, U, C, reply="Accepted, Piece, Waiting, Finished or ErrorReport")
@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Go on with a stream on this connection: I have its first `tokens` tokens and `chars` characters of text."""

    request: Annotated[RequestId, Within(1, 64)]
    tokens: Count
    chars: Count


@message(51, U, C, reply="Draining or ErrorReport")
@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Let this worker hand over what it does and leave."""

    worker: Annotated[WorkerId, Within(1, 64)]


@message(52, C, U)
@dataclass(frozen=True, slots=True, kw_only=True)
class Draining:
    """The worker will leave; `status` says when it is gone."""

    worker: WorkerId
