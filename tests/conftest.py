"""What holds for all tests."""

from __future__ import annotations

import gc

import pytest


def pytest_configure() -> None:
    """Collect no garbage while test modules are parsed and rewritten.

    CPython 3.11 now and then raises "AST constructor recursion depth mismatch" when a collection, and with it the
    callback that hypothesis hangs on collections, falls into the parsing of a module.
    """
    gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Back to normal before the first test."""
    gc.enable()
