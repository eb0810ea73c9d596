"""The worker's side of the memory contract: what a budget is spent on, and what is told when it is too small."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import logging
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tiny_cluster import SPEC, TinyCluster, entry_of, make_tiles, plan_of, put

from protocol.durable_file import Draft
from protocol.errors import BudgetTooSmall, StorageFull, TileUnavailable
from protocol.heap import steady_environment
from protocol.ids import WorkerId
from protocol.specs import Span
from protocol.tiles import HEAD_LAYER, TileId, TileKind
from runtime.device import DeviceFacts
from runtime.kernels import Kernels
from runtime.windowed import BlockOrder
from worker import device
from worker.block_cache import BlockCache
from worker.config import WorkerConfig
from worker.loading import WorkerPart, load_worker, peak_bytes, room_of, share_of
from worker.store import TileStore

ALONE = plan_of([(Span(0, SPEC.layers), [("w", Span(0, 2), Span(0, 3))], 0)], head="w")
W = WorkerId("w")
MIB = 2**20
ROOT = Path(__file__).parent.parent.parent


def test_a_budget_is_spent_in_order() -> None:
    room = room_of(ALONE, W, 64 * MIB, 10 * MIB)
    assert room.base_bytes == 10 * MIB
    assert room.kv_bytes == 2 * 2 * SPEC.layers * SPEC.head_dim * 4 * SPEC.max_positions
    assert sum(room) == 64 * MIB
    fewer = room_of(dataclasses.replace(ALONE, kv_positions=32), W, 64 * MIB, 10 * MIB)
    assert fewer.kv_bytes == room.kv_bytes // 4


def test_a_budget_that_is_spent_before_any_weights_is_told() -> None:
    with pytest.raises(BudgetTooSmall, match="spent before any weights") as caught:
        room_of(ALONE, W, 20 * MIB, 10 * MIB)
    assert "--memory" in caught.value.remedy


def cache_in(folder: Path) -> tuple[TileStore, BlockCache, list[int]]:
    cluster = TinyCluster(folder / "unused")
    cluster.close()
    store, read = TileStore(folder, 2**30), list[int]()
    for tile, data in make_tiles().items():
        put(store, cluster.entries[tile], data)
    order = BlockOrder(
        spec=SPEC, share=share_of(ALONE, W), is_head=True, kernels=Kernels(), device=device.pick_device("cpu")
    )
    return store, BlockCache(store, folder / "blocks", order, cluster.entries, read.append), read


def test_a_block_is_made_once_and_again_when_it_was_altered(tmp_path: Path) -> None:
    store, cache, read = cache_in(tmp_path)
    made = 0

    def fill(buffer: memoryview) -> None:
        nonlocal made
        made += 1
        buffer[:] = bytes(range(100)) * 2

    path = cache.path_of(0, 200, fill)
    assert path.read_bytes() == bytes(range(100)) * 2 and made == 1
    assert cache.path_of(0, 200, fill) == path and made == 1 and read == [200]
    path.write_bytes(bytes(200))
    assert cache.path_of(0, 200, fill).read_bytes()[:3] == b"\x00\x01\x02" and made == 2
    path.unlink()
    assert cache.path_of(0, 200, fill).exists() and made == 3
    store.close()


def test_the_note_of_a_block_may_be_torn(tmp_path: Path) -> None:
    store, cache, _ = cache_in(tmp_path)
    cache.path_of(1, 8, lambda buffer: None)
    (note,) = (tmp_path / "blocks").iterdir()
    note.write_bytes(note.read_bytes()[:7])
    assert cache.path_of(1, 8, lambda buffer: None).read_bytes() == bytes(8)
    assert len(note.read_bytes()) == 32
    store.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_note_that_cannot_be_written_ends_the_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store, cache, _ = cache_in(tmp_path)

    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Draft, "append", failing)
    with pytest.raises(StorageFull, match=os.strerror(number)) as caught:
        cache.path_of(1, 8, lambda buffer: None)
    assert str(tmp_path / "blocks") in caught.value.message and caught.value.phase == "load"
    assert not list((tmp_path / "blocks").iterdir())
    store.close()


def test_rows_of_a_tile_that_is_gone_are_told(tmp_path: Path) -> None:
    store, _, _ = cache_in(tmp_path)
    with closing(TinyCluster(tmp_path / "x")) as cluster:
        entry = next(iter(cluster.entries.values()))
    assert store.read_range(entry, 4, 8) == bytes(store.read(entry)[4:12])
    store.path_of(entry).unlink()
    with pytest.raises(TileUnavailable, match="no longer whole"):
        store.read_range(entry, 0, 1)
    store.close()


def test_an_embedding_altered_between_two_loads_is_told(tmp_path: Path) -> None:
    """Its rows are read one by one in steps, so no block that is loaded tells of it."""
    store, _, _ = cache_in(tmp_path)
    entries = {entry.tile: entry for entry in map(entry_of, *zip(*make_tiles().items(), strict=True))}
    budget = 40 * MIB

    def load() -> WorkerPart:
        part = load_worker(
            ALONE,
            W,
            source=lambda tile: store.read(entries[tile]),
            store=store,
            entries=entries,
            kernels=Kernels(),
            device=device.pick_device("cpu"),
            budget_bytes=budget,
            base_bytes=MIB,
            on_read=lambda _: None,
        )
        part.part.blocks.close()
        return part

    load()
    altered = entries[TileId(HEAD_LAYER, TileKind.EMBEDDING, 0)]
    path = store.path_of(altered)
    path.write_bytes(bytes(altered.num_bytes))
    with closing(TileStore(tmp_path, 2**30)) as store, pytest.raises(TileUnavailable, match="altered"):
        load()
    assert not path.exists()


def test_a_budget_beyond_the_machine_is_cut_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    held = DeviceFacts("linux", "x86_64", 1, 500 * MIB, 400 * MIB, "cpu", "2")
    monkeypatch.setattr(device, "measure", lambda *_: held)
    monkeypatch.setattr(device, "load_or_measure", lambda *_: Kernels())
    with caplog.at_level(logging.WARNING):
        settings = device.executor_settings(WorkerConfig(memory="900MB", threads=1, cache_dir=tmp_path))
    assert settings.budget_bytes == int(500 * MIB * device.MOST_OF_MEMORY)
    assert "900MB" in caplog.text and "control group" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the kernel has only one mark to tell")
def test_the_peak_is_our_own_and_not_our_parents() -> None:
    burden = bytearray(b"x" * (300 * MIB))
    told = subprocess.run(
        [sys.executable, "-c", "from worker.loading import peak_bytes; print(peak_bytes())"],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2], close_fds=False,
    )  # fmt: skip
    assert 0 < int(told.stdout) < len(burden) < peak_bytes()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can forget a peak")
@pytest.mark.parametrize("is_steady", [True, False])
def test_no_change_of_plans_takes_more_than_either_may(tmp_path: Path, is_steady: bool) -> None:
    """Whether a step's memory is held when a plan is loaded, or taken when it is needed."""
    script = Path(__file__).with_name("one_plan_after_another.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, os.environ.get("PYTHONPATH", ""))))}
    environment = steady_environment(environment) if is_steady else environment
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    loads = [json.loads(line) for line in done.stdout.splitlines()]
    assert [load["held"] for load in loads] == [[], [3000], [3000], [], [3000], [3000]]
    for before, load in itertools.pairwise([loads[0], *loads]):
        assert load["peak"] <= max(before["predicted"], load["predicted"]), loads
    norms = 8 * 2 * 512 * 4
    assert loads[1]["read"] <= norms and loads[5]["read"] <= norms  # nothing else is new
    assert loads[4]["window"] == loads[5]["window"] > 0
