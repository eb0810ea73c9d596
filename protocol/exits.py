"""How a command ends: the exit code and the words on standard error for each kind of failure.

Knows nothing of what the command does. Codes are those of sysexits.h, so that init systems and scripts can tell
"restart me later" (75) from "fix the configuration" (78).
"""

from __future__ import annotations

import errno
import sys
from typing import Final, TextIO

from protocol import errors
from protocol.logs import redact

OK: Final = 0
USAGE: Final = 64
DATA: Final = 65
UNAVAILABLE: Final = 69
SOFTWARE: Final = 70
CANT_CREATE: Final = 73
IO: Final = 74
TEMPORARY: Final = 75
PROTOCOL: Final = 76
REFUSED: Final = 77
CONFIG: Final = 78
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

# The first row that fits decides.
_CODES: Final[tuple[tuple[type[BaseException], int], ...]] = (
    (errors.ConfigInvalid, CONFIG),
    (errors.LinkInvalid, CONFIG),
    (errors.PlanImpossible, CONFIG),
    (errors.BudgetTooSmall, CONFIG),
    (errors.RequestInvalid, DATA),
    (errors.ModelUnsupported, DATA),
    (errors.CheckpointInvalid, DATA),
    (errors.TokenizerMissing, DATA),
    (errors.StorageFull, CANT_CREATE),
    (errors.InvariantBroken, SOFTWARE),
    (errors.ProtocolViolation, PROTOCOL),
    (errors.AccessRefused, REFUSED),
    (errors.CoordinatorLost, UNAVAILABLE),
    (errors.PeerLost, UNAVAILABLE),
    (errors.TileUnavailable, UNAVAILABLE),
    (errors.Cancelled, INTERRUPTED),
    (errors.RemoteError, TEMPORARY),
    (PermissionError, REFUSED),
    (OSError, IO),
    (KeyboardInterrupt, INTERRUPTED),
)


def exit_code(error: BaseException) -> int:
    """Return the exit code that tells what kind of failure this was; 70 for a bug of ours."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CANT_CREATE
    return next((code for kind, code in _CODES if isinstance(error, kind)), SOFTWARE)


def tell(error: BaseException, stream: TextIO | None = None) -> None:
    """Print "error: what happened" and, on a second line, the remedy; secrets of links are blacked out."""
    out = stream if stream is not None else sys.stderr
    if not isinstance(error, errors.ManyhandsError):
        print(f"error: {redact(str(error)) or type(error).__name__}", file=out)
        return
    where = ", ".join(part for part in (error.node, error.phase) if part)
    print(f"error: {redact(error.message)}" + (f" [{where}]" if where else ""), file=out)
    if error.remedy:
        print(f"remedy: {redact(error.remedy)}", file=out)
