"""Loads plans one after the other in a process of its own and prints, for each, what it promised and what it took.

Run by test_memory: a process that has run other tests holds more than it would by itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch

from protocol.batches import SessionRows
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry
from protocol.plans import Plan, Share, Stage
from protocol.specs import ActivationFormat, ModelSpec, RopeSpec, Span, WeightFormat
from protocol.tiles import TileEntry, TileId, tile_bytes
from runtime.allocator import keep_steady
from runtime.kernels import Kernels
from runtime.shelf import BlockShelf
from worker.kv_shelf import KvShelf
from worker.loading import kv_positions, load_worker, peak_bytes, resident_bytes, share_of
from worker.spool import Spool
from worker.store import TileStore

SPEC = ModelSpec(
    name="m", family="llama", hidden=512, layers=8, heads=8, kv_heads=4, head_dim=64, intermediate=1408, vocab=512,
    max_positions=4096, norm_eps=1e-5, rope=RopeSpec(theta=1e4), ffn_tiles=4, weights=WeightFormat.FLOAT32,
    activations=ActivationFormat.FLOAT32,
)  # fmt: skip
GROUPS, FFN = Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles)
OWN, OTHER = WorkerId("own"), WorkerId("other")
POSITIONS, LENGTH = 4096, 3000
ONE = SessionId(1)
CARRY = Carry(session=ONE, at=0, capacity=POSITIONS, computed=LENGTH)
MIB = 2**20


def plan_of(epoch: int, layers: Span, groups: Span = GROUPS, ffn: Span = FFN) -> Plan:
    """A plan in which this worker has these layers; others have the rest."""
    mine = [Share(worker=OWN, groups=groups, ffn=ffn)]
    if groups != GROUPS:
        rest = Span(groups.end, GROUPS.end), Span(ffn.end, FFN.end)
        mine.append(Share(worker=WorkerId("beside"), groups=rest[0], ffn=rest[1]))
    spans = [(Span(0, layers.start), "before"), (layers, ""), (Span(layers.end, SPEC.layers), "after")]
    stages = tuple(
        Stage(layers=span, members=tuple(mine) if not name else (Share(worker=WorkerId(name), groups=GROUPS, ffn=FFN),))
        for span, name in spans
        if len(span)
    )
    return Plan(
        epoch=epoch, model=SPEC, head=OTHER, stages=stages, wire=ActivationFormat.FLOAT32, kv_positions=POSITIONS,
        step_rows=16, step_samples=1,
    )  # fmt: skip


def fill(store: TileStore) -> dict[TileId, TileEntry]:
    dice, entries = np.random.default_rng(0), {}
    for tile in plan_of(1, Span(0, SPEC.layers)).tiles_of(OWN):
        data = dice.random(tile_bytes(SPEC, tile) // 4, dtype=np.float32).tobytes()
        entries[tile] = TileEntry(tile, len(data), hashlib.sha256(data).digest())
        part = store.open_part(entries[tile])
        part.append(data)
        part.finish()
    return entries


def main(folder: Path) -> None:
    keep_steady()
    torch.set_num_threads(1)
    store = TileStore(folder, 2**32)
    entries = fill(store)
    base_bytes = resident_bytes()
    kv, shelf = KvShelf(Spool(folder / "spool", 2**32)), BlockShelf()

    def load(plan: Plan, budget_bytes: int) -> int:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        num_read, share = 0, share_of(plan, OWN)

        def source(tile: TileId) -> memoryview:
            nonlocal num_read
            data = store.read(entries[tile])
            num_read += len(data)
            return data

        kv.turn_to(plan, share, kv_positions(plan), (CARRY,))
        held = load_worker(
            plan, OWN, source=source, store=store, entries={tile: entries[tile] for tile in plan.tiles_of(OWN)},
            kernels=Kernels(), device=torch.device("cpu"), budget_bytes=budget_bytes, base_bytes=base_bytes,
            on_read=lambda _: None, kv=kv.arena, shelf=shelf,
        )  # fmt: skip
        stage = held.part.stage
        held_kv = kv.restore(stage.kv if stage else None, share, (CARRY,), lambda _: None)
        carried = [one.positions for one in held_kv if one.positions]
        print(
            json.dumps(
                {
                    "predicted": held.predicted_bytes,
                    "peak": peak_bytes(),
                    "read": num_read,
                    "held": carried,
                    "window": held.window_bytes,
                }
            )
        )
        if kv.arena is not None and not carried:
            rows = (SessionRows(session=ONE, start=0, count=LENGTH, capacity=POSITIONS),)
            kv.arena.begin(rows)
            kv.arena.commit(rows)
        return held.pinned_bytes + held.window_bytes

    roomy = base_bytes + 1024 * MIB
    load(plan_of(1, Span(0, 6)), roomy)
    load(plan_of(2, Span(1, 5)), roomy)  # less of the same
    load(plan_of(3, Span(1, 5), Span(0, 2), Span(0, 2)), roomy)  # the same layers, cut elsewhere
    most = load(plan_of(4, Span(0, 8)), roomy)  # all of it
    tight = base_bytes + most * 3 // 4 + SPEC.kv_bytes_per_token(4, 8) * POSITIONS + 20 * MIB
    load(plan_of(5, Span(0, 8)), tight)  # through a window
    load(plan_of(6, Span(0, 8)), tight)  # and again
    shelf.clear()
    kv.close()
    store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
