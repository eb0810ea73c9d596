"""Which rows the next step computes, of the sessions that run.

Knows nothing of plans but the number of their stages.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.session import Session
from protocol.batches import SessionRows

Batch = list[tuple[Session, SessionRows]]


def pick(running: Iterable[Session], num_stages: int, prefill_chunk: int) -> Batch:
    """Choose decoding sessions, the longest unserved first, and one chunk of one prompt.

    A step takes at most its fair part of the sessions, so that every stage of the pipeline has a step to compute.
    """
    sessions = list(running)
    free = [session for session in sessions if not session.is_in_flight]
    fair = -(-len(sessions) // num_stages)
    decoding = sorted((one for one in free if one.num_pending == 1), key=lambda one: one.last_step)
    prompts = [session for session in free if session.num_pending > 1]
    chosen = [*decoding[:fair], *prompts[:1]]
    return [(session, session.next_rows(prefill_chunk)) for session in chosen]
