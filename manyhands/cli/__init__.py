"""The `manyhands` command.

Knows nothing of how each command works; `manyhands.cli.app` finds it.
"""

from __future__ import annotations

from manyhands.cli.app import main

__all__ = ["main"]
