"""What holds for all tests."""

from __future__ import annotations

import gc
from collections.abc import Generator

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


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, object, object]:
    """The source of what failed is parsed for its report."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """More modules are imported for the summary."""
    gc.disable()
