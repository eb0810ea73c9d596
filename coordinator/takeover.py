"""What a coordinator takes over from the one before it: open sessions for the core, and all requests for the desk.

Knows nothing of files beyond the token log, and of workers nothing at all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from coordinator.desk import Act, Desk
from coordinator.session import Session
from coordinator.token_log import Ended, Entry
from protocol.errors import SessionLost
from protocol.messages import ErrorReport

_log = logging.getLogger(__name__)


class Takeover(NamedTuple):
    """Sessions for the core to go on with, and what the desk wants done once it has them."""

    sessions: list[Session]
    acts: list[Act]


def take_over(entries: Iterable[Entry], desk: Desk, *, model: bytes, now: float, unix_now: float) -> Takeover:
    """Restore what the token log has; `model` is what is served now, sessions of another one end with SessionLost.

    The times of a session begin anew at `now`.
    """
    sessions: list[Session] = []
    acts: list[Act] = []
    for entry in entries:
        kept = entry
        if entry.outcome is None and entry.model != model:
            outcome = _other_model(entry)
            kept = replace(entry, outcome=outcome, ended_s=unix_now)
            acts.append(Ended(session=entry.session, outcome=outcome))
        elif entry.outcome is None:
            sessions.append(_session(entry, desk, now))
        acts += desk.restore(kept, now, unix_now)
    if sessions:
        _log.info("%d requests of the last start go on", len(sessions))
    return Takeover(sessions, acts)


def _session(entry: Entry, desk: Desk, now: float) -> Session:
    return Session(
        session=entry.session,
        tokens=entry.prompt + entry.answer,
        num_prompt=entry.num_prompt,
        max_tokens=entry.order.max_tokens,
        sampling=entry.order.sampling,
        stop_tokens=desk.stop_tokens(entry.order),
        arrived_at=now,
        started_at=now,
    )


def _other_model(entry: Entry) -> ErrorReport:
    error = SessionLost(
        "the coordinator was started again with another model, or other number formats", remedy="ask again"
    )
    _log.warning("session %d: %s", entry.session, error)
    return ErrorReport.of(error, request=entry.order.request)
