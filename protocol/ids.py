"""Distinct types for the names of things, so that a mix-up is a type error, and their bounds on the wire.

Knows nothing of who gives a name.
"""

from __future__ import annotations

import re
from typing import Annotated, NewType

from protocol.schema import Spelled, Within

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")

WorkerId = NewType("WorkerId", Annotated[str, Spelled(_WORKER_ID)])
"""A worker's name, unique in its cluster: letters, digits, dot, dash, underscore."""

SessionId = NewType("SessionId", Annotated[int, Within(0, 2**53)])
"""One request's life on the workers; never reused while a coordinator runs."""

RequestId = NewType("RequestId", Annotated[str, Within(1, 64)])
"""A client's own name for its request."""


def worker_id(text: str) -> WorkerId:
    """Check a worker's name; raises ValueError with the rule."""
    if not _WORKER_ID.fullmatch(text):
        raise ValueError(f"worker name {text!r:.80} must be 1 to 63 letters, digits, '.', '_' or '-'")
    return WorkerId(text)
