"""One stage of a pipeline dies in mid-answer: the same tokens, and only its layers are computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import ids, make_checkpoint
from house import House

pytestmark = pytest.mark.processes
LAYERS, NUM_TOKENS, BEFORE = 6, 40, 10
PROMPT = ids(31, 47)


@pytest.mark.parametrize(
    ("plan", "stage", "repeated_layers"),
    [("1/1/1", 1, [2, 4]), ("1/1/1", 2, [4, 6]), ("1,1/1", 1, [4, 6])],
    ids=["the middle one of three", "the last one of three", "the one after two members"],
)
def test_only_the_layers_of_a_lost_stage_are_computed_again(
    tmp_path: Path, plan: str, stage: int, repeated_layers: list[int]
) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "llama3", num_hidden_layers=LAYERS)
    expected = checkpoint.tokens(PROMPT, NUM_TOKENS)
    with House(tmp_path, checkpoint.folder, plan) as house:
        for number in (1, 2, 3):
            house.start(f"worker-{number}")
        lost = house.until_whole()["plan"]["stages"][stage]
        assert lost["layers"] == repeated_layers
        tokens: list[int] = []
        with house.client.generate(PROMPT, max_tokens=NUM_TOKENS, ignore_eos=True, stream=True) as stream:
            for piece in stream:
                tokens += piece.token_ids
                if len(tokens) >= BEFORE and lost["hub"] in house.workers:
                    house.kill(lost["hub"])
                    del house.workers[lost["hub"]]
        assert tuple(tokens) == expected
        status = house.client.status()
        (recovery,) = status["recoveries"]
        assert recovery["repeated_layers"] == repeated_layers
        assert recovery["repeated"] >= len(PROMPT) + BEFORE - 1
        assert recovery["repeated_rows"] == recovery["repeated"] * (repeated_layers[1] - repeated_layers[0])
        told = f"layers {repeated_layers[0]} to {repeated_layers[1] - 1} of {recovery['repeated']} positions"
        assert any(told in event["text"] for event in status["events"])
