"""Distinct types for the names of things, so that a mix-up is a type error."""

from __future__ import annotations

import re
from typing import NewType

WorkerId = NewType("WorkerId", str)
"""A worker's name, unique in its cluster: letters, digits, dot, dash, underscore."""

SessionId = NewType("SessionId", int)
"""One request's life on the workers; never reused while a coordinator runs."""

RequestId = NewType("RequestId", str)
"""A client's own name for its request."""

_WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def worker_id(text: str) -> WorkerId:
    """Check a worker's name; raises ValueError with the rule."""
    if not _WORKER_ID.fullmatch(text):
        raise ValueError(f"worker name {text!r:.80} must be 1 to 63 letters, digits, '.', '_' or '-'")
    return WorkerId(text)
