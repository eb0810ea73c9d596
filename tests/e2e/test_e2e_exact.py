"""Whole clusters give transformers' tokens: every plan, every family, prompts short, long and beyond the window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import NUM_TOKENS, PROMPTS, Checkpoint, make_checkpoint

from manyhands import LocalCluster

pytestmark = pytest.mark.processes
# The model has 4 layers and 4 KV heads, so in the last plan one member of five computes no attention.
PLANS = ("1", "1,1", "2,1,1", "1,1,1,1", "1/1/1", "1,1/2,1", "3,1,1,1,1")
OTHERS = {"llama2": "1,1/2,1", "mistral": "1,1/1", "qwen2": "1,1/1", "qwen3": "1,1/1"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("llama3"), "llama3")


@pytest.fixture(scope="module")
def expected(llama: Checkpoint) -> list[tuple[int, ...]]:
    return [llama.tokens(prompt) for prompt in PROMPTS]


def answers(folder: Path, plan: str, dtype: str = "float32") -> list[tuple[int, ...]]:
    with LocalCluster(folder, plan=plan, dtype=dtype) as cluster:
        assert cluster.status()["plan"]["words"] == plan
        client = cluster.client()
        found = [client.generate(prompt, max_tokens=NUM_TOKENS) for prompt in PROMPTS]
        assert [answer.usage.prompt_tokens for answer in found] == [len(prompt) for prompt in PROMPTS]
        return [answer.token_ids for answer in found]


@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_is_exact(plan: str, llama: Checkpoint, expected: list[tuple[int, ...]]) -> None:
    assert answers(llama.folder, plan) == expected


@pytest.mark.parametrize(("family", "plan"), OTHERS.items())
def test_every_family_is_exact(family: str, plan: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, family)
    assert answers(tmp_path, plan) == [checkpoint.tokens(prompt) for prompt in PROMPTS]


def test_bfloat16_parts_only_where_bfloat16_can_not_decide(tmp_path: Path) -> None:
    """At the first other token, the two highest fp32 logits are nearer than transformers' own bf16 error there."""
    exact = make_checkpoint(tmp_path, "llama3", torch.bfloat16).model
    found = answers(tmp_path, "1,1/1", dtype="bfloat16")
    rough = type(exact)(exact.config).eval()
    rough.load_state_dict(exact.state_dict())
    rough = rough.bfloat16()
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert len(tokens) == NUM_TOKENS
        sequence = torch.tensor([[*prompt, *tokens[:-1]]])
        with torch.no_grad():
            logits, rough_logits = (model(sequence).logits[0, len(prompt) - 1 :].float() for model in (exact, rough))
        others = (logits.argmax(-1) != torch.tensor(tokens)).nonzero()
        if len(others):
            first = int(others[0])
            gap = float(logits[first].max() - logits[first, tokens[first]])
            assert gap <= 2 * float((rough_logits[first] - logits[first]).abs().max())
