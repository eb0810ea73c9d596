"""What outlives a coordinator: sessions with their token logs, and who sat where under the last plan.

Knows nothing of files; `coordinator.token_log` and `coordinator.journal` keep these values.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from protocol.batches import Sampling
from protocol.ids import SessionId, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedSession:
    """A session that an earlier coordinator did not finish.

    `tokens` is its log, prompt and answer, of which the first `num_prompt` are the prompt; the answer may have all of
    its `max_tokens` but the last. `age_s`: how long ago it arrived, in seconds.
    """

    session: SessionId
    tokens: array[int]
    num_prompt: int
    max_tokens: int
    sampling: Sampling
    stop_tokens: frozenset[int]
    age_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeatsChanged:
    """Effect: a plan serves; `seats` are its workers in the order of its shares, for the next start to find again.

    None: a share that nobody has at the moment.
    """

    seats: tuple[WorkerId | None, ...]
