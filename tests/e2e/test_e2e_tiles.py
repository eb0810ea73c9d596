"""Tiles go from worker to worker: to a survivor whose share grew, and to one that came back with an empty disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from house import House

from manyhands.cluster import DEMO_MODEL

pytestmark = pytest.mark.processes
PROMPT = "Once upon a time"


def came_from(house: House, name: str) -> dict[str, int]:
    """Bytes of tiles that a worker's processes fetched, by the name of the source."""
    found: dict[str, int] = {}
    for line in re.findall(r"worker\.fetcher: fetched .*? bytes: (.*)", house.workers[name].log_path.read_text()):
        for num_bytes, source in re.findall(r"(\d+) from ([\w.-]+|the coordinator)", line):
            found[source] = found.get(source, 0) + int(num_bytes)
    return found


def test_tiles_come_from_the_workers_that_have_them(tmp_path: Path) -> None:
    with House(tmp_path, DEMO_MODEL, "1,1,1") as house:
        for number in (1, 2, 3):
            house.start(f"worker-{number}")
        members = [member["worker"] for member in house.until_whole()["plan"]["stages"][0]["members"]]
        assert members[0] == "worker-1"
        middle, last = members[1:]
        expected = house.client.generate(PROMPT, max_tokens=8).token_ids
        house.kill(last)
        house.until(lambda status: status["phase"] == "ready" and status["plan"]["words"] == "1,1")
        assert came_from(house, "worker-1").get(middle, 0) > 0  # groups and slices that were its neighbour's
        assert house.client.generate(PROMPT, max_tokens=8).token_ids == expected
        shutil.rmtree(house.cache_of(last))
        house.start(last)
        house.until_whole()
        sources = came_from(house, last)
        assert sources.get("worker-1", 0) + sources.get(middle, 0) > 0
        assert house.client.generate(PROMPT, max_tokens=8).token_ids == expected
