"""Survivors take over what does not fit their memory: it flows through their window, slower, with the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import ids, make_checkpoint
from house import House, worker_of

from manyhands.connection import Status

pytestmark = pytest.mark.processes
NUM_TOKENS = 24
BEFORE = 8  # tokens that come while both are here
SPARE_BYTES = 40 * 2**20  # beyond what half of the model takes: a process is not as large every time
SHAPE = {
    "num_hidden_layers": 12,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
}
PLACES = {"kv_positions": "2048"}


def is_told_of_streaming(status: Status) -> bool:
    return len(status["workers"]) == 1 and worker_of(status, "worker-1")["streamed_bytes_per_step"] > 0


def test_a_survivor_streams_what_it_can_not_hold(tmp_path: Path) -> None:
    """Two workers whose budgets hold half of the weights each; one is killed in mid-answer."""
    checkpoint = make_checkpoint(tmp_path / "model", "llama2", **SHAPE)
    prompt = ids(19, 40)
    expected = checkpoint.tokens(prompt, NUM_TOKENS)
    with House(tmp_path, checkpoint.folder, "1/1", **PLACES) as house:
        for name in ("worker-1", "worker-2"):
            house.start(name)
        halves = {worker["name"]: worker["predicted_bytes"] for worker in house.until_ready()["workers"]}
        for name in halves:
            house.stop(name)
        house.until(lambda status: not status["workers"])
        for name, half_bytes in halves.items():
            house.start(name, memory=str(half_bytes + SPARE_BYTES))
        # The first to be back may take all on alone, until the other is there too.
        held = house.until(lambda status: status["phase"] == "ready" and len(status["plan"]["stages"]) == 2)["workers"]
        assert not any(worker["window_bytes"] for worker in held)
        whole_bytes = sum(worker["weight_bytes"] for worker in held)

        tokens: list[int] = []
        with house.client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True, stream=True) as stream:
            for piece in stream:
                tokens += piece.token_ids
                if len(tokens) >= BEFORE and "worker-2" in house.workers:
                    house.kill("worker-2")
                    del house.workers["worker-2"]
        assert tuple(tokens) == expected
        # What it read and held under its last plan comes with its next beat; the answer may be quicker.
        survivor = worker_of(house.until(is_told_of_streaming), "worker-1")
        assert survivor["window_bytes"] > 0
        assert survivor["pinned_bytes"] < whole_bytes
        assert survivor["peak_bytes"] <= 1.05 * survivor["budget_bytes"]  # what fetching leaves behind is not counted
