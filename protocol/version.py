"""The name and release of this software, as it is told to peers and printed to users.

Knows nothing of the protocol's own version, which is `protocol.messages.VERSION`.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "manyhands"
UNINSTALLED = "0.1.0"  # a checkout that runs without being installed has no metadata


def release() -> str:
    """Return the installed release, or the one this source began as when it is not installed."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return UNINSTALLED


SOFTWARE = f"{DISTRIBUTION} {release()}"
