"""What people are shown of a cluster: tables, news between two looks, the pace of loading, progress at start."""

from __future__ import annotations

import itertools
from io import StringIO
from typing import Any

import pytest
from status_samples import PLAN, READY, member, status, worker

from manyhands.cli.drain import is_gone
from manyhands.cli.follow import legs_text
from manyhands.cli.news import LoadMeter, news
from manyhands.cli.screen import bytes_text, console, count_text, table
from manyhands.cli.tables import (
    MEMORY_HEADINGS,
    PLAN_HEADINGS,
    STREAM_HEADINGS,
    WORK_HEADINGS,
    WORKER_HEADINGS,
    ago_text,
    event_rows,
    memory_rows,
    model_line,
    plan_line,
    plan_rows,
    state_rows,
    stream_rows,
    work_rows,
    worker_rows,
)
from manyhands.progress import StartWatch, essence
from protocol.errors import DeadlineExceeded, PlanImpossible
from protocol.messages import Leg
from protocol.specs import Span


def test_the_plan_as_rows() -> None:
    assert plan_rows(READY, {"w1": 11, "w2": 12}) == [
        ("w1", "11", "head, hub", "0..4", "0..2", "0..5", "3.1 MB", "4.0 GB", "300 MB", "320 MB"),
        ("w2", "12", "member", "0..4", "2..4", "5..10", "3.1 MB", "4.0 GB", "300 MB", "320 MB"),
        ("w3", "-", "hub", "4..6", "0..4", "0..10", "3.1 MB", "4.0 GB", "300 MB", "320 MB"),
    ]


def test_a_head_without_layers_and_a_lost_worker() -> None:
    rows = plan_rows(status(plan=PLAN | {"head": "w0"}, workers=[worker("w0"), worker("w2")]), {})
    assert [(row[0], row[2], row[3]) for row in rows] == [("w0", "head", "-"), ("w2", "member", "0..4")]


@pytest.mark.parametrize("tree", [{}, {"plan": None, "workers": []}, {"workers": [{"name": "w1"}]}])
def test_a_sparse_status_is_shown_too(tree: dict[str, Any]) -> None:
    assert plan_line(tree) == "none yet"
    assert len(worker_rows(tree)) == len(tree.get("workers", []))
    assert len(memory_rows(tree)) == len(tree.get("workers", []))
    assert plan_rows(tree, {}) == []
    assert stream_rows(tree) == work_rows(tree) == []
    assert model_line(tree)


STREAMING = {
    "weight_bytes": 2_200_000_000,
    "pinned_bytes": 720_000_000,
    "window_bytes": 90_000_000,
    "steps": 40,
    "step_s": 1.6,
    "sums_share": 0.5,
    "streamed_bytes_per_step": 1_480_000_000,
    "disk_bytes_per_s": 1_210_000_000,
    "stalled_share": 0.1249,
}


def test_memory_is_shown_for_all_and_streaming_for_who_streams() -> None:
    tree = status(workers=[worker("w1", peak_bytes=0), worker("w2", **STREAMING)])
    assert memory_rows(tree) == [
        ("w1", "3.1 MB", "0 B", "4.0 GB", "300 MB", "-"),
        ("w2", "2.2 GB", "0 B", "4.0 GB", "300 MB", "320 MB"),
    ]
    assert stream_rows(tree) == [("w2", "720 MB", "90.0 MB", "1.5 GB", "1.2 GB/s", "12%")]
    assert work_rows(tree) == [("w2", "40", "1600.0 ms", "38%", "12%", "50%")]


def test_tables_fit_a_hundred_columns() -> None:
    name = "worker-12345"
    share = {"layers": [96, 126], "hub": name, "members": [member(name, [7, 8], [12, 16])]}
    plan = PLAN | {"head": name, "stages": [share]}
    tree = status(plan=plan, workers=[worker(name, role="head", phase="leaving", cores=128, **STREAMING)])
    for headings, rows in (
        (PLAN_HEADINGS, plan_rows(tree, {name: 4_000_000})),
        (WORKER_HEADINGS, worker_rows(tree)),
        (MEMORY_HEADINGS, memory_rows(tree)),
        (WORK_HEADINGS, work_rows(tree)),
        (STREAM_HEADINGS, stream_rows(tree)),
    ):
        out = StringIO()
        console(out).print(table(headings, rows))
        assert all(len(line.rstrip()) <= 100 for line in out.getvalue().splitlines()), out.getvalue()


def test_lines() -> None:
    assert model_line(READY) == "demo (llama, 4.7M parameters, 6 layers, float32)"
    assert plan_line(READY) == "1,1/1 (3 workers in 2 stages)"


PAUSED = "paused: it runs on battery"
WAIT_9, WAIT_8 = (f"on probation for {s} s: it was lost time and again" for s in (9, 8))


def told(*texts: str) -> list[dict[str, Any]]:
    return [{"ago_s": 4.2, "text": text} for text in texts]


WAITING = status(phase="waiting", detail="waiting for 2 workers", workers=[worker("w1")], plan=None)
NEWS = [
    (READY, READY, []),
    ({}, WAITING, ["w1 joined (Linux aarch64, cpu, 4 cores, may take 4.0 GB)", "waiting for 2 workers"]),
    (WAITING, status(phase="probing", workers=[worker("w1")], detail="probing links"), ["probing links"]),
    (status(phase="loading"), READY, ["ready: plan 1,1/1 (3 workers in 2 stages)"]),
    (READY, status(epoch=8), ["ready: plan 1,1/1 (3 workers in 2 stages)"]),
    (READY, status(workers=[*READY["workers"][:2], worker("w3", state=PAUSED)]), [f"w3 is {PAUSED}"]),
    (status(workers=[worker("w3", state=PAUSED)]), status(workers=[worker("w3")]), ["w3 may be used again"]),
    (status(workers=[worker("w3", state=PAUSED)]), status(workers=[worker("w3", state="leaving")]), []),
    (status(workers=[worker("w3", state=WAIT_9)]), status(workers=[worker("w3", state=WAIT_8)]), []),
    (READY, status(events=told("w4 is here", "w3 is gone", "ready")), ["w3 is gone"]),
    (READY, status(workers=READY["workers"][:2]), ["w3 is gone"]),
    (READY, status(workers=READY["workers"][:2], events=told("w3 was silent")), ["w3 was silent"]),
    (status(events=told("a", "b")), status(events=told("a", "b")), []),
    (status(events=told("a", "a")), status(events=told("a", "a", "a")), ["a"]),
    (status(events=told("a", "b", "c")), status(events=told("c", "d", "e")), ["d", "e"]),
    (status(events=told("a")), status(events=told("b", "c")), ["b", "c"]),
]


def test_states_and_events_as_rows() -> None:
    tree = status(workers=[worker("w1"), worker("w3", state=PAUSED)], events=told("a", "b", "c"))
    assert state_rows(tree) == [("w3", PAUSED)]
    assert event_rows(tree, most=2) == [("4 s ago", "b"), ("4 s ago", "c")]
    assert [ago_text(s) for s in (0.2, 99, 100, 5999, 6000, 90_000)] == [
        "0 s ago", "99 s ago", "2 min ago", "100 min ago", "2 h ago", "25 h ago",
    ]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "lines"), NEWS)
def test_news(before: dict[str, Any], after: dict[str, Any], lines: list[str]) -> None:
    assert news(before, after) == lines


def loading(*parts: tuple[str, int] | None, epoch: int = 1) -> dict[str, Any]:
    workers = [
        worker(f"w{n}", loading={"step": part[0], "done_bytes": part[1], "total_bytes": 10_000_000} if part else None)
        for n, part in enumerate(parts, 1)
    ]
    return status(phase="loading", epoch=epoch, workers=workers)


def test_the_pace_of_loading() -> None:
    meter = LoadMeter()
    bits = 2_000_000
    looks = [
        (loading(("", 0), ("fetch", 0)), "loading: 0 B of 20.0 MB (w1 begins, w2 fetch)"),
        (loading(("load", bits), ("load", 0)), "loading: 2.0 MB of 20.0 MB, 2.0 MB/s, 9 s left (w1 load, w2 load)"),
        (loading(None, ("load", 4_000_000)), "loading: 14.0 MB of 20.0 MB, 5.0 MB/s, 1 s left (w2 load)"),
        (loading(("fetch", 0), ("fetch", 0), epoch=2), "loading: 0 B of 20.0 MB (w1 fetch, w2 fetch)"),
        (READY, ""),
    ]  # fmt: skip
    for now, (look, line) in enumerate(looks):
        assert meter.see(look, float(now)) == line


def test_a_start_without_progress_ends_and_progress_extends_it() -> None:
    watch = StartWatch(5.0, now=0.0)
    for now in range(0, 40, 4):
        watch.see(f"sign {now}", "reading", now)
        watch.check(now)
    watch.see("sign 36", "stuck here", 41.0)
    with pytest.raises(DeadlineExceeded, match="stuck here"):
        watch.check(41.0)


def test_mere_life_is_no_progress() -> None:
    alive = status(workers=[worker("w1", last_heard_s=0.4, resident_bytes=5)])
    same = status(workers=[worker("w1", last_heard_s=0.1, resident_bytes=9, state=WAIT_9)])
    further = status(workers=[worker("w1", phase="loading")])
    assert essence(alive) == essence(same) != essence(further)


SIZES = [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (9_318_800, "9.3 MB"), (412e6, "412 MB"), (5e12, "5.0 TB")]
COUNTS = [(7, "7"), (4_656_384, "4.7M"), (135e6, "135M"), (7e9, "7.0B")]


def test_sizes_and_counts() -> None:
    assert [bytes_text(size) for size, _ in SIZES] == [text for _, text in SIZES]
    assert [count_text(number) for number, _ in COUNTS] == [text for _, text in COUNTS]
    assert all(len(bytes_text(a)) <= 8 for a in itertools.accumulate([1] + [7] * 14, lambda a, b: a * b))


LEAVING = status(workers=[worker("w3", state="leaving: it hands over first")])
GONE = [
    (READY, status(workers=READY["workers"][:2]), True),
    (READY, READY, False),
    (READY, LEAVING, False),
    (READY, LEAVING | {"events": told("w3 can't be spared: no room")}, False),
    (READY, status(events=told("w3 is gone: it left", "w3 is here")), True),
    (status(events=told("w3 is here")), status(events=told("w3 is here", "w2 is here")), False),
]


@pytest.mark.parametrize(("before", "after", "gone"), GONE)
def test_when_a_drained_worker_is_gone(before: dict[str, Any], after: dict[str, Any], gone: bool) -> None:
    assert is_gone(before, after, "w3") is gone


def test_a_worker_that_cannot_be_spared_is_told_so() -> None:
    with pytest.raises(PlanImpossible, match="w3 can't be spared: no room"):
        is_gone(READY, status(events=told("w3 wants to leave: somebody asked", "w3 can't be spared: no room")), "w3")


def test_who_computed_an_answer() -> None:
    first = Leg(epoch=1, start=0, words="1/1", stages=("layers 0 to 3: a, b", "layers 4 to 5: c"))
    second = Leg(epoch=2, start=40, words="1", stages=("layers 0 to 5: a, b",), repeated=63, cause="c is gone")
    assert legs_text([first, second]).splitlines() == [
        "from token 1 to 40: plan 1/1",
        "  layers 0 to 3: a, b",
        "  layers 4 to 5: c",
        "from token 41 on: plan 1, after c is gone; 63 positions were computed again",
        "  layers 0 to 5: a, b",
    ]


def test_an_answer_tells_which_layers_were_computed_again() -> None:
    leg = Leg(epoch=2, start=40, words="1", stages=(), repeated=63, cause="c is gone", layers=Span(4, 6))
    assert legs_text([leg]) == (
        "from token 41 on: plan 1, after c is gone; layers 4 to 5 of 63 positions were computed again"
    )
