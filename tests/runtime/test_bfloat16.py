"""In bf16 we err no more than transformers does, so tokens part only where fp32 is undecided at bf16's resolution."""

from __future__ import annotations

import pytest
import torch
from random_models import expected
from tiles_of import Crew, make_model, shares, spec_of, whole

from protocol.batches import SessionRows
from protocol.ids import SessionId
from protocol.specs import ActivationFormat

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_TOKENS = 32
PROMPT = [(11 * i * i + 7 * i + 2) % 131 for i in range(19)]


@pytest.mark.parametrize("family", ["llama3-gqa", "llama3-tied", "llama-biased", "mistral-window", "qwen2", "qwen3"])
@pytest.mark.parametrize("members", [1, 2])
def test_bfloat16_is_as_near_to_fp32_as_transformers_bf16(family, members):
    """All three are fed the fp32 model's tokens, so that every position can be compared."""
    exact = make_model(family).bfloat16().float()  # weights that bf16 holds without loss
    spec = spec_of(exact, ActivationFormat.BFLOAT16)
    plan = whole(spec) if members == 1 else shares(spec, (0, 3), [((0, 1, 2), (0, 2, 5))])
    crew = Crew(spec, exact, plan)
    wanted, logits = expected(exact, PROMPT, NUM_TOKENS)
    ids, exact_logits = PROMPT + wanted[:-1], torch.stack(logits)
    ours = []
    for start, end in [(0, len(PROMPT)), *((at, at + 1) for at in range(len(PROMPT), len(ids)))]:
        row = SessionRows(session=SessionId(1), start=start, count=end - start, capacity=len(ids), sample=True)
        ours.append(crew.logits(ids[start:end], (row,))[0])
    with torch.no_grad():
        theirs = exact.bfloat16()(torch.tensor([ids])).logits[0, len(PROMPT) - 1 :].float()
    our_error, their_error = torch.stack(ours) - exact_logits, theirs - exact_logits
    assert our_error.square().mean() < 2.5 * their_error.square().mean()  # over 10 seeds: 0.8 to 1.8
    top = exact_logits.topk(2).values
    gap = top[:, 0] - top[:, 1]
    differs = torch.stack(ours).argmax(-1) != exact_logits.argmax(-1)
    assert float(gap[differs].max() if differs.any() else 0) <= 2 * float(their_error.abs().max())
