"""Which rows the next step computes, of the sessions that run.

Knows nothing of plans but the number of their stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from coordinator.session import ERROR_WEIGHT, Session
from protocol.batches import SessionRows
from protocol.specs import NO_LAYERS, Span


class Batch(NamedTuple):
    """Sessions, each with its rows; `layers`, unless empty: those that all of these rows are computed through."""

    parts: tuple[tuple[Session, SessionRows], ...] = ()
    layers: Span = NO_LAYERS


NOTHING = Batch()


def pick(running: Iterable[Session], num_stages: int, prefill_chunk: int) -> Batch:
    """Choose decoding sessions, the longest unserved first, and one chunk of one prompt.

    A step takes at most its fair part of the sessions, so that every stage of the pipeline has a step to compute.
    Sessions of which only some layers lack something come in steps of their own, in turn with the others. Sessions that
    were under way when an error ended a plan go on one by one until each has a new token: if it is one of them, it
    breaks the next plan without the others.
    """
    sessions = list(running)
    suspects = [session for session in sessions if session.setbacks >= ERROR_WEIGHT]
    if suspects:
        if any(session.is_in_flight for session in sessions):
            return NOTHING
        first = min(suspects, key=lambda one: (one.setbacks, one.last_step))
        return Batch(((first, first.next_rows(prefill_chunk)),), first.layers)
    free = [session for session in sessions if not session.is_in_flight]
    fair = -(-len(sessions) // num_stages)
    whole = [session for session in free if not len(session.layers)]
    decoding = sorted((one for one in whole if one.num_pending == 1), key=lambda one: one.last_step)
    prompts = [session for session in whole if session.num_pending > 1]
    chosen = [*decoding[:fair], *prompts[:1]]
    replaying = sorted((one for one in free if len(one.layers)), key=lambda one: one.last_step)
    if replaying and (not chosen or replaying[0].last_step <= min(one.last_step for one in chosen)):
        return _replay(replaying, prefill_chunk)
    return Batch(tuple((session, session.next_rows(prefill_chunk)) for session in chosen))


def _replay(sessions: Sequence[Session], prefill_chunk: int) -> Batch:
    """Take rows of those that lack what the first one lacks, kept by the same hub, at most a chunk in all.

    None is cut to fit: a prompt that attends in other pieces than it did at first gets other last bits.
    """
    parts: list[tuple[Session, SessionRows]] = []
    left = prefill_chunk
    for session in sessions:
        rows = session.next_rows(prefill_chunk)
        if rows.count <= left and _source(session) == _source(sessions[0]):
            parts.append((session, rows))
            left -= rows.count
    return Batch(tuple(parts), sessions[0].layers)


def _source(session: Session) -> tuple[Span, int | None]:
    return session.layers, session.replay.stage if session.replay is not None else None
