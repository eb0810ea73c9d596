"""Any split gives transformers' tokens: 64 greedy tokens, logits within 1e-4."""

from __future__ import annotations

import pytest
import torch
from random_models import expected
from tiles_of import FAMILIES, Crew, make_model, shares, spec_of, whole

from protocol.batches import SessionRows
from protocol.ids import SessionId

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_TOKENS = 64
PROMPT = [(17 * i * i + 5 * i + 3) % 131 for i in range(21)]


def assert_same(found, wanted, tolerance=1e-4):
    assert found[0] == wanted[0]
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_worker_is_exact(family):
    model = make_model(family)
    spec = spec_of(model)
    crew = Crew(spec, model, whole(spec))
    assert_same(crew.generate(PROMPT, NUM_TOKENS), expected(model, PROMPT, NUM_TOKENS))


PLANS = {
    "two stages": ((0, 1, 3), [((0, 2), (0, 5)), ((0, 2), (0, 5))]),
    "three stages": ((0, 1, 2, 3), [((0, 2), (0, 5))] * 3),
    "two members, uneven": ((0, 3), [((0, 1, 2), (0, 4, 5))]),
    "three members, one without attention": ((0, 3), [((0, 1, 1, 2), (0, 2, 4, 5))]),
    "a member without FFN": ((0, 3), [((0, 1, 2), (0, 0, 5))]),
    "all attention on the last": ((0, 3), [((0, 0, 2), (0, 2, 5))]),
    "tensor then pipeline": ((0, 2, 3), [((0, 1, 2), (0, 3, 5)), ((0, 2), (0, 5))]),
    "two stars": ((0, 1, 3), [((0, 1, 2), (0, 1, 5)), ((0, 0, 2, 2), (0, 2, 3, 5))]),
}


@pytest.mark.parametrize("family", ["llama-biased", "mistral-window", "qwen3"])
@pytest.mark.parametrize("plan", PLANS)
def test_any_split_is_exact(family, plan):
    count = NUM_TOKENS if family == "llama-biased" else 12
    model = make_model(family)
    spec = spec_of(model)
    crew = Crew(spec, model, shares(spec, *PLANS[plan]))
    assert_same(crew.generate(PROMPT, count), expected(model, PROMPT, count))


@pytest.mark.parametrize("family", ["llama3-gqa", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("chunks", [(1,), (5, 6, 14), (20,), (8, 16)])
def test_chunked_prefill_is_exact(family, chunks):
    model = make_model(family)
    spec = spec_of(model)
    crew = Crew(spec, model, whole(spec))
    assert_same(crew.generate(PROMPT, 8, chunks=chunks), expected(model, PROMPT, 8))


@pytest.mark.parametrize("family", ["llama3-gqa", "mistral-window"])
def test_sessions_of_one_batch_do_not_touch(family):
    """Two sessions of unlike length decode together; a third prefills in a chunk beside them."""
    model = make_model(family)
    spec = spec_of(model)
    crew = Crew(spec, model, shares(spec, *PLANS["two members, uneven"]))
    prompts = {1: PROMPT, 2: PROMPT[4:9], 3: PROMPT[::-1]}
    wanted = {session: expected(model, prompt, 16) for session, prompt in prompts.items()}
    ids = {session: list(prompt) for session, prompt in prompts.items()}
    done = dict.fromkeys(prompts, 0)
    logits: dict[int, list[torch.Tensor]] = {session: [] for session in prompts}
    for step in range(19):
        rows, flat = [], []
        for session in prompts:
            if step < session - 1 or len(logits[session]) == 16:  # they start one step after the other
                continue
            end = min(len(ids[session]), done[session] + 11)  # long prompts take two chunks
            rows.append(
                SessionRows(
                    session=SessionId(session),
                    start=done[session],
                    count=end - done[session],
                    capacity=40,
                    at=40 * session,
                    sample=end == len(ids[session]),
                )
            )
            flat += ids[session][done[session] : end]
            done[session] = end
        found = iter(crew.logits(flat, tuple(rows)))
        for row in rows:
            if row.sample:
                logits[row.session].append(next(found))
                ids[row.session].append(int(logits[row.session][-1].argmax()))
        assert next(found, None) is None
    for session, prompt in prompts.items():
        assert_same((ids[session][len(prompt) :], logits[session]), wanted[session])


def test_a_repeated_step_gives_the_same_logits():
    model = make_model("llama3-gqa")
    spec = spec_of(model)
    crew = Crew(spec, model, whole(spec))
    row = SessionRows(session=SessionId(1), start=0, count=10, capacity=32, sample=True)
    crew.logits(PROMPT[:10], (row,))
    row = SessionRows(session=SessionId(1), start=6, count=8, capacity=32, sample=True)
    first = crew.logits(PROMPT[6:14], (row,))
    assert torch.equal(first, crew.logits(PROMPT[6:14], (row,)))
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPT[:14]])).logits[0, -1]
    torch.testing.assert_close(first[0], wanted, rtol=0, atol=1e-4)
