"""Whether the C library's heap can be held as one piece, and how a process gets such a heap: by starting anew.

Knows nothing of what is allocated. glibc's threads keep the last small blocks they freed for themselves, and torch
leaves a splinter before each tensor, because tensors begin at multiples of 64 bytes. Splinters that are kept so stand
between large free blocks like walls: a heap that steps of a model come and go in grew to twice what was ever in use.
The number of blocks kept is a tunable that glibc reads from the environment when a process starts, and never again.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Final

VARIABLE: Final = "GLIBC_TUNABLES"
TUNABLE: Final = "glibc.malloc.tcache_count"
AT_SECURE: Final = 23  # of getauxval: the process has more rights than its user, and glibc reads no tunables


def steady_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that is to have such a heap; what it says of this tunable already stays."""
    said = environment.get(VARIABLE, "")
    if TUNABLE in said:
        return dict(environment)
    return {**environment, VARIABLE: ":".join(filter(None, (said, f"{TUNABLE}=0")))}


def has_steady_heap() -> bool:
    """Whether this process was started with such a heap."""
    return is_glibc() and f"{TUNABLE}=0" in os.environ.get(VARIABLE, "").split(":")


def is_glibc() -> bool:
    """Whether the C library is the one that all this is about."""
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # not a Unix, or another C library
        return False


def restart_with_steady_heap() -> None:
    """Replace this process by itself, with such a heap; returns when it has one, or can't have one.

    To be called before anything is opened or started, and only when the process is the command itself.
    """
    environment = steady_environment(os.environ)
    if not is_glibc() or environment == dict(os.environ) or ctypes.CDLL(None).getauxval(AT_SECURE):
        return
    try:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    except OSError:  # then it does without
        return
