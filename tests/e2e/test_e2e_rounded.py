"""Formats that round coarsely: an answer goes on with the same tokens, as what is computed again has the same bits.

In a pipeline; where a stage is shared out anew its sums are added in another order.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import PROMPTS, make_checkpoint
from house import House

from runtime.packed import can_pack_bfloat16

pytestmark = pytest.mark.processes
OPTIONS = {"ignore_eos": True, "max_tokens": 48}
packs = pytest.mark.skipif(not can_pack_bfloat16(), reason="without oneDNN's matrix a row may depend on its neighbours")
LOSSES = {16: "worker-3", 32: "worker-2"}  # by how many tokens came before


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=packs), "int8"])
def test_an_answer_outlives_two_workers(tmp_path: Path, dtype: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "llama3", num_hidden_layers=12, initializer_range=0.3)
    with House(tmp_path, checkpoint.folder, "1/1/1", dtype=dtype, probation_s="0") as house:
        for name in ("worker-1", "worker-2", "worker-3"):
            house.start(name)
        house.until_whole()
        expected = house.client.generate(PROMPTS[0], **OPTIONS).token_ids
        losses, tokens = dict(LOSSES), []
        with house.client.generate(PROMPTS[0], stream=True, **OPTIONS) as stream:
            for piece in stream:
                tokens += piece.token_ids
                for due in [number for number in losses if number <= len(tokens)]:
                    house.kill(losses.pop(due))
        assert not losses
        assert tuple(tokens) == expected
