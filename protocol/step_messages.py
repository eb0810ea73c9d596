"""Messages of a step on its way: token ids to the head, hidden states from stage to stage, sums around the star.

Knows nothing of how they are computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from protocol.ids import SessionId, WorkerId
from protocol.message_table import (
    MAX_PROMPT_BYTES,
    MAX_TENSOR_BYTES,
    C,
    H,
    W,
    message,
)
from protocol.message_values import (
    Cells,
    Rows,
    SampledToken,
    SessionSampling,
    StepId,
)
from protocol.schema import Count, Epoch, Seconds, Within
from protocol.specs import NO_LAYERS, ActivationFormat, Span


@message(30, C, H, reply="StepDone", payload_bytes=MAX_PROMPT_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Compute these rows. `opens`: sessions that the head does not know under this epoch.

    `layers`, unless empty: a part of the model's layers; only their keys and values are computed again, from inputs
    that the hub before them kept (the embedding, for layer 0), and no row is sampled.
    Payload, little-endian int32 token ids: the histories of `opens`, in order, then one id a row.
    """

    epoch: Epoch
    step: StepId
    rows: Rows
    opens: Annotated[tuple[SessionSampling, ...], Within(0, 1024)] = ()
    layers: Span = NO_LAYERS


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
    """Hidden states on their way into `stage` (number of stages: back to the head). Payload: `[rows, hidden]`.

    `layers`: as in `Step`; then the payload is empty before the kept inputs and after the last of these layers.
    """

    epoch: Epoch
    step: StepId
    stage: Count
    format: ActivationFormat
    rows: Rows
    layers: Span = NO_LAYERS


@message(33, {W, H}, {W, H}, payload_bytes=MAX_TENSOR_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Partial:
    """One member's part of the sum of `op` (2 x layer for attention, + 1 for the FFN). Payload: `[rows, hidden]`.

    It goes to the hub; where a stage has two members, each sends its part to the other.
    """

    epoch: Epoch
    step: StepId
    op: Count
    rank: Count
    format: ActivationFormat


@message(34, {W, H}, {W, H}, payload_bytes=MAX_TENSOR_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """The hub's sum of `op`, the same bytes to every member of three or more. Payload: `[rows, hidden]`."""

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


@message(38, {W, H}, {W, H}, payload_bytes=MAX_TENSOR_BYTES)
@dataclass(frozen=True, slots=True, kw_only=True)
class KvRows:
    """Keys and values of a session's positions `[start, start + count)`, for a peer that keeps a copy.

    Payload: `[layers, 2, groups, count, head_dim]` in the plan's activation format, keys first. `count` 0: no more will
    come of what was to be given.
    """

    epoch: Epoch
    session: SessionId
    cells: Cells
    start: Count
    count: Count


@message(37, {C, W, H}, {C, W, H})
@dataclass(frozen=True, slots=True, kw_only=True)
class Relay:
    """Envelope of data frames that go through the coordinator, which checks `source` against the sender's key.

    The frames after it are the message itself; the coordinator does not look inside.
    """

    source: WorkerId
    target: WorkerId
