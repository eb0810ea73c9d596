"""What is computed again has the same bits, in formats whose matrices give a row the same bits alone and among others.

These round coarsely: one other last bit becomes another token soon.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from tiles_of import Crew, make_model, spec_of, whole

from protocol.batches import SessionRows
from protocol.ids import SessionId
from protocol.specs import ActivationFormat, WeightFormat
from runtime.packed import can_pack_bfloat16

NUM_PROMPT, NUM_ALL = 100, 130
IDS = [(13 * i * i + 3 * i + 1) % 131 for i in range(NUM_ALL)]
FIRST = [0, 64, NUM_PROMPT, *range(NUM_PROMPT + 1, NUM_ALL + 1)]
PLACES = {"first": 0, "again": 200}
packs = pytest.mark.skipif(not can_pack_bfloat16(), reason="without oneDNN's matrix a row may depend on its neighbours")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compute(crew: Crew, which: str, ends: Sequence[int]) -> torch.Tensor:
    """Pass the ids through in pieces between these ends, of the answer several alone; returns the last logits."""
    at = PLACES[which]
    for start, end in itertools.pairwise(ends):
        rows = SessionRows(
            session=SessionId(at + 1), start=start, count=end - start, capacity=NUM_ALL, sample=True, at=at,
            alone=start >= NUM_PROMPT,
        )  # fmt: skip
        logits = crew.logits(IDS[start:end], (rows,))
    return logits[0]


@pytest.mark.parametrize("family", ["llama3-gqa", "mistral-window", "qwen3"])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [pytest.param("bfloat16", "bfloat16", marks=packs), ("int8", "float32"), ("int8", "bfloat16")],
)
@pytest.mark.parametrize("ends", [(0, 64, NUM_PROMPT, 128, NUM_ALL), (0, 64, NUM_PROMPT, 101, 107, 129, NUM_ALL)])
def test_rows_computed_again_have_the_same_bits(
    family: str, weights: str, activations: str, ends: tuple[int, ...]
) -> None:
    model = make_model(family, hidden_size=256, intermediate_size=640, num_attention_heads=8)
    formats = {"weights": WeightFormat(weights), "activations": ActivationFormat(activations)}
    spec = replace(spec_of(model), **formats)
    crew = Crew(spec, model, whole(spec))
    first, again = (compute(crew, which, cuts) for which, cuts in (("first", FIRST), ("again", ends)))
    kv = crew.stages[0][0].kv
    for rows in (kv.keys_LGPd, kv.values_LGPd):
        wanted, found = (rows[:, :, at : at + NUM_ALL] for at in PLACES.values())
        assert torch.equal(found, wanted)
    assert torch.equal(again, first)
