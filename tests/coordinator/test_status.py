"""The status as JSON: its keys, what it says of memory and streaming, and that no numbers of a peer can break it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from core_cases import heartbeat, make_spec, profile

from coordinator.cluster_status import ClusterStatus, KvStatus, SessionCounts, Totals, WorkerStatus
from coordinator.events import Phase
from coordinator.status import RimCounts, render_status
from protocol.ids import WorkerId
from protocol.messages import Heartbeat, Loaded, Role

LOADED = Loaded(
    epoch=1, weight_bytes=20, fetched_bytes=20, resident_bytes=30, load_s=0.1,
    predicted_bytes=900, pinned_bytes=300, window_bytes=200,
)  # fmt: skip


def beat(**changes: Any) -> Heartbeat:
    last = heartbeat("w").heartbeat
    assert last is not None
    return replace(last, **changes)


def worker_json(last: Heartbeat | None, loaded: Loaded | None) -> dict[str, Any]:
    worker = WorkerStatus(
        name=WorkerId("w"), role=Role.WORKER, profile=replace(profile(1000), base_bytes=70), addresses=("a:1",),
        heartbeat=last, loaded=loaded, last_heard_s=0.25, link="direct", loading=None,
    )  # fmt: skip
    status = ClusterStatus(
        term=1, epoch=2, phase=Phase.READY, detail="", plan=None, workers=(worker,),
        sessions=SessionCounts(running=1, waiting=0), kv=KvStatus(positions=8192, used=7), totals=Totals(),
        last_error="",
    )  # fmt: skip
    counts = RimCounts(violations=0, refusals=0, relayed=0, dropped=0)
    tree = json.loads(render_status(status, cluster="home", spec=make_spec(), counts=counts))
    assert tree["kv"] == {"positions": 8192, "used": 7}
    found: dict[str, Any] = tree["workers"][0]
    return found


def test_memory_and_streaming_are_told() -> None:
    last = beat(
        peak_bytes=40, streamed_bytes=1000, streaming_s=4.0, stalled_s=1.0, computing_s=8.0, steps=5, sums_s=2.0
    )
    told = worker_json(last, LOADED)
    assert told["phase"] == "ready"
    assert told["step_s"] == 1.6
    ends = ("_bytes", "_step", "_per_s", "_share", "steps")
    assert {key: value for key, value in told.items() if key.endswith(ends)} == {
        "memory_bytes": 2000, "budget_bytes": 1000, "base_bytes": 70, "predicted_bytes": 900, "resident_bytes": 30,
        "peak_bytes": 40, "weight_bytes": 20, "kv_bytes": 10, "pinned_bytes": 300, "window_bytes": 200, "steps": 5,
        "streamed_bytes_per_step": 200, "disk_bytes_per_s": 250, "stalled_share": 0.125, "sums_share": 0.25,
    }  # fmt: skip


@pytest.mark.parametrize(("resident", "peak", "told"), [(30, 40, 40), (30, 29, 30), (30, 0, 0)])
def test_a_peak_is_no_less_than_the_use(resident: int, peak: int, told: int) -> None:
    assert worker_json(beat(resident_bytes=resident, peak_bytes=peak), LOADED)["peak_bytes"] == told


def test_weights_are_told_before_the_next_heartbeat() -> None:
    assert worker_json(beat(weight_bytes=0), LOADED)["weight_bytes"] == 20


def test_who_was_never_heard_has_the_same_keys() -> None:
    silent, loud = worker_json(None, None), worker_json(beat(), LOADED)
    assert silent.keys() == loud.keys()
    assert (silent["phase"], silent["resident_bytes"], silent["predicted_bytes"]) == ("idle", 0, 0)


@pytest.mark.parametrize("seconds", [0.0, 5e-324, 1e-9, 1e300])
@pytest.mark.parametrize("num_bytes", [0, 2**53])
def test_odd_numbers_of_a_peer_are_harmless(seconds: float, num_bytes: int) -> None:
    told = worker_json(
        beat(streamed_bytes=num_bytes, streaming_s=seconds, stalled_s=1e300, computing_s=seconds, sums_s=1e300), LOADED
    )
    assert told["disk_bytes_per_s"] == 0
    assert 0 <= told["stalled_share"] <= 1
    assert 0 <= told["sums_share"] <= 1
