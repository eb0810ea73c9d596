"""Logging of every process: one line a record to standard error, as text or JSON, with link secrets blacked out.

Knows nothing of what is logged. Standard output belongs to a command's answer.
"""

from __future__ import annotations

import json as jsonlib
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Final

LEVELS: Final = ("debug", "info", "warning", "error")
# The secret of a link stands behind the last dot (`protocol.security.Link`).
_LINK_SECRET = re.compile(r"(/(?:join|ask)/[A-Za-z0-9_-]+\.)[A-Za-z0-9_-]+")


def redact(text: str) -> str:
    """Return the text with the secret of every link in it replaced by stars."""
    return _LINK_SECRET.sub(r"\1***", text)


class TextFormatter(logging.Formatter):
    """`2026-11-21T10:00:00.123Z INFO coordinator.daemon: message`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line (more lines when it carries a traceback)."""
        line = f"{_stamp(record)} {record.levelname} {record.name}: {record.getMessage()}"
        return redact("\n".join(part for part in (line, _traceback(self, record)) if part))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        entry = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if trace := _traceback(self, record):
            entry["traceback"] = redact(trace)
        return jsonlib.dumps(entry, ensure_ascii=False)


def _stamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    return formatter.formatException(record.exc_info) if record.exc_info else ""


def setup_logging(level: str, json: bool) -> None:
    """Send the log of this process to standard error from `level` (see LEVELS) on; replaces an earlier set-up.

    Raises ValueError for an unknown level.
    """
    if level not in LEVELS:
        raise ValueError(f"log level {level!r:.40} is none of {', '.join(LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
