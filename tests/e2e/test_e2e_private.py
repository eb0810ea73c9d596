"""What workers other than the head get to see: hidden states and their own tiles; no tokens, no output matrix.

The input of layer 0 is the embedding rows, and whoever computes a part of layer 0 needs it. So those rows stay with
the members of the first stage, and with the head alone when it is the only one there.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import PROMPTS, make_checkpoint
from house import House

from protocol.messages import Activation, LinkHello, LinkWelcome, Partial, Sum
from protocol.specs import Span
from protocol.tiles import TileKind, tile_parts
from tests.worker.tiny_cluster import SPEC, TinyCluster, plan_of
from worker.wire import unpack_data

PROMPT = [51, 52, 53, 54, 55, 56, 57]
GROUPS, FFN = Span(0, SPEC.kv_heads), Span(0, SPEC.ffn_tiles)
# The head computes layer 0 alone; the others share the rest in two stages.
PLAN = plan_of(
    [
        (Span(0, 1), [("a", GROUPS, FFN)], 0),
        (Span(1, 3), [("b", Span(0, 1), Span(0, 1)), ("c", Span(1, 2), Span(1, 2)), ("e", Span(2, 2), Span(2, 3))], 0),
        (Span(3, 4), [("d", GROUPS, FFN)], 0),
    ],
    head="a",
)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[TinyCluster]:
    one = TinyCluster(tmp_path)
    yield one
    one.close()


def rows_of(cluster: TinyCluster, kind: TileKind) -> list[bytes]:
    """The rows of the embedding or of the output matrix, as float32 bytes."""
    tile, data = next((tile, data) for tile, data in cluster.tiles.items() if tile.kind is kind)
    part = max(tile_parts(SPEC, tile), key=lambda one: one.num_bytes)
    values = np.frombuffer(data, np.float32, part.num_bytes // 4, part.offset).reshape(-1, SPEC.hidden)
    return [row.tobytes() for row in values]


def test_other_workers_get_hidden_states_and_nothing_else(cluster: TinyCluster) -> None:
    for name in PLAN.workers:
        cluster.add(name)
    cluster.form(PLAN, lambda one, other: False)  # relayed, so that every frame passes through our hands
    tokens = cluster.greedy(PLAN, PROMPT, 8)
    seen = [unpack_data(frames) for _, target, frames in cluster.relayed if target != PLAN.head]
    kinds = {type(message) for message, _ in seen}
    assert kinds <= {Activation, Partial, Sum, LinkHello, LinkWelcome}
    assert {Activation, Partial, Sum} <= kinds
    payloads = [bytes(payload) for _, payload in seen]
    for row in (*rows_of(cluster, TileKind.EMBEDDING), *rows_of(cluster, TileKind.LM_HEAD)):
        assert not any(row in payload for payload in payloads)
    for width in ("<i4", "<i8"):
        for ids in (PROMPT, tokens):
            for pair in pairwise(ids):
                assert not any(np.asarray(pair, width).tobytes() in payload for payload in payloads)


@pytest.mark.processes
def test_no_tile_of_the_head_comes_onto_other_disks(tmp_path: Path) -> None:
    state = make_checkpoint(tmp_path / "model", "llama2").model.state_dict()
    secret = [
        row.numpy().tobytes()
        for name in ("model.embed_tokens.weight", "lm_head.weight")
        for row in state[name].to(torch.float32)
    ]
    with House(tmp_path, tmp_path / "model", "1,1/1") as house:
        for number in (1, 2, 3):
            house.start(f"worker-{number}")
        house.until_ready()
        house.client.generate(PROMPTS[0], max_tokens=4)
        tiles = {
            name: [path.read_bytes() for path in house.cache_of(name).rglob("*") if path.is_file()]
            for name in house.workers
        }
        log = "".join(child.log_path.read_text() for child in house.workers.values())
    assert all(tiles.values())
    held = {name: sum(row in data for data in found for row in secret) for name, found in tiles.items()}
    assert held == {"worker-1": len(secret), "worker-2": 0, "worker-3": 0}
    assert str(PROMPTS[0][:3]).strip("[]") not in log
