"""Which rows the next step computes, of the sessions that run.

Knows nothing of plans but the number of their stages.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.session import ERROR_WEIGHT, Session
from protocol.batches import SessionRows

Batch = list[tuple[Session, SessionRows]]


def pick(running: Iterable[Session], num_stages: int, prefill_chunk: int) -> Batch:
    """Choose decoding sessions, the longest unserved first, and one chunk of one prompt.

    A step takes at most its fair part of the sessions, so that every stage of the pipeline has a step to compute.
    Sessions that were under way when an error ended a plan go on one by one until each has a new token: if it is one
    of them, it breaks the next plan without the others.
    """
    sessions = list(running)
    suspects = [session for session in sessions if session.setbacks >= ERROR_WEIGHT]
    if suspects:
        if any(session.is_in_flight for session in sessions):
            return []
        first = min(suspects, key=lambda one: (one.setbacks, one.last_step))
        return [(first, first.next_rows(prefill_chunk))]
    free = [session for session in sessions if not session.is_in_flight]
    fair = -(-len(sessions) // num_stages)
    decoding = sorted((one for one in free if one.num_pending == 1), key=lambda one: one.last_step)
    prompts = [session for session in free if session.num_pending > 1]
    chosen = [*decoding[:fair], *prompts[:1]]
    return [(session, session.next_rows(prefill_chunk)) for session in chosen]
