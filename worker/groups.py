"""Which error to tell when several tasks of a group ended by one.

Knows nothing of what the tasks did.
"""

from __future__ import annotations

from typing import Any

from protocol.errors import CoordinatorLost


def most_telling(group: BaseExceptionGroup[Any]) -> BaseException:
    """Return the error that explains most: any other before a lost connection, which may only follow from it."""
    leaves = _leaves(group)
    return next((error for error in leaves if not isinstance(error, CoordinatorLost)), leaves[0])


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    leaves: list[BaseException] = []
    for error in group.exceptions:
        leaves += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return leaves
