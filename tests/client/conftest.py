"""What several tests of the client share: clusters of real processes, started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from manyhands import LocalCluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    """Three workers: two share the first layers, one has the rest."""
    with LocalCluster(plan="1,1/1") as running:
        yield running
