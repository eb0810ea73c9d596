"""What head, blocks and stage refuse, and that a failed step leaves no trace."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiles_of import Crew, load, load_head, make_model, source_of, spec_of, whole

from protocol.batches import SessionRows
from protocol.errors import CheckpointInvalid, PeerLost, RequestInvalid, SessionLost, StepFailed
from protocol.ids import SessionId
from protocol.specs import Span
from protocol.tiles import LM_HEAD_ROWS
from runtime.shares import StageShare

MODEL = make_model("llama3-gqa")
SPEC = spec_of(MODEL)
SOURCE = source_of(SPEC, MODEL)
ALL = whole(SPEC)[0][0]


def row(start, count, session=1):
    return SessionRows(session=SessionId(session), start=start, count=count, capacity=32, sample=True)


@pytest.mark.parametrize("ids", [[131], [-1], [0, 5, 2**40]])
def test_ids_outside_the_vocabulary_are_named(ids):
    with pytest.raises(RequestInvalid, match=rf"{ids[-1]} is outside \[0, 131\)"):
        load_head(SPEC, SOURCE).embed(ids)


def test_a_vocabulary_of_several_tiles():
    """Three tiles, the last one short; tied and not."""
    for family in ("llama3-gqa", "llama3-tied"):
        model = make_model(family, vocab_size=2 * LM_HEAD_ROWS + 77, num_hidden_layers=1)
        spec = spec_of(model)
        head = load_head(spec, source_of(spec, model))
        ids = [0, LM_HEAD_ROWS - 1, LM_HEAD_ROWS, 2 * LM_HEAD_ROWS + 76]
        with torch.no_grad():
            hidden = model.model.embed_tokens(torch.tensor(ids))
            wanted = model.lm_head(model.model.norm(hidden))[[1, 3]]
        assert torch.equal(head.embed(ids), hidden)
        torch.testing.assert_close(head.logits(hidden, (row(0, 2), row(0, 2, 2))), wanted, rtol=0, atol=1e-4)
        assert head.logits(hidden, (dataclasses.replace(row(0, 4), sample=False),)).shape == (0, spec.vocab)
        with pytest.raises(StepFailed, match="hidden states"):
            head.logits(hidden, (row(0, 3),))


def test_a_cut_tile_is_refused():
    with pytest.raises(CheckpointInvalid, match="layer 0"):
        load(SPEC, lambda tile: SOURCE(tile)[:-4], ALL)


def test_blocks_tell_their_bytes_and_where_there_are_none():
    share = StageShare(layers=Span(1, 2), groups=Span(0, 0), ffn=Span(0, 2))
    blocks = load(SPEC, SOURCE, share).blocks
    assert blocks.acquire(2) is None
    assert blocks.num_bytes == 3 * 64 * SPEC.hidden * 4


@pytest.mark.parametrize(
    "hidden",
    [torch.zeros(2, 64), torch.zeros(3, 63), torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(3)],
)
def test_misshapen_hidden_states_are_refused(hidden):
    stage = Crew(SPEC, MODEL, [[ALL]]).stages[0][0]
    with pytest.raises(StepFailed, match="hidden states"):
        stage.forward(hidden, (row(0, 3),), lambda op, part: part)
    assert stage.kv.lengths() == {}


def test_a_step_whose_reduce_failed_can_be_repeated():
    crew = Crew(SPEC, MODEL, [[ALL]])
    stage = crew.stages[0][0]
    first = crew.logits([1, 2, 3], (row(0, 3),))
    hidden = crew.head.embed([4])
    kept = hidden.clone()

    def lose_the_peer(op, part):
        if op == 3:
            raise PeerLost("worker b vanished")
        return part

    with pytest.raises(PeerLost):
        stage.forward(hidden, (row(3, 1),), lose_the_peer)
    assert torch.equal(hidden, kept)
    assert stage.kv.lengths() == {1: 3}
    again = crew.logits([4], (row(3, 1),))
    assert torch.equal(crew.logits([1, 2, 3], (row(0, 3),)), first)
    assert torch.equal(crew.logits([4], (row(3, 1),)), again)
    stage.release(SessionId(1))
    with pytest.raises(SessionLost):
        crew.logits([4], (row(3, 1),))
