"""What several tests of the client share: clusters of real processes, started once."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from manyhands import LocalCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """Three workers: two share the first layers, one has the rest."""
    with LocalCluster(plan="1,1/1") as running:
        yield running


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts this process, and the children that it starts.

    Who was started in the background may ignore it: Python then raises nothing, and children inherit that.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
