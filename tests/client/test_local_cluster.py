"""Whole clusters of real processes on this machine: the same tokens under every plan, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from pathlib import Path

import psutil
import pytest

from manyhands import AsyncClient, CoordinatorLost, FinishReason, LocalCluster, RequestInvalid
from manyhands.cluster import DEMO_MODEL
from manyhands.connection import Status

pytestmark = pytest.mark.processes
PROMPTS = ("def main(argv):\n", "import os\n\n\nclass Reader:\n    ")
NUM_TOKENS = 24


@pytest.fixture(scope="session")
def expected() -> dict[str, tuple[int, ...]]:
    """What transformers generates on one machine, greedily, in float32."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(DEMO_MODEL / "tokenizer.json"))
    model = transformers.LlamaForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    answers = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt)])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None
            )
        answers[prompt] = tuple(out[0, ids.shape[1] :].tolist())
    return answers


def answers_of(running: LocalCluster) -> dict[str, tuple[int, ...]]:
    client = running.client()
    return {prompt: client.generate(prompt, max_tokens=NUM_TOKENS, ignore_eos=True).token_ids for prompt in PROMPTS}


def test_the_tokens_are_those_of_one_machine(cluster: LocalCluster, expected: dict[str, tuple[int, ...]]) -> None:
    assert answers_of(cluster) == expected


@pytest.mark.parametrize("plan", ["1", "2,1,1", "1/1/1"])
def test_every_plan_gives_the_same_tokens(plan: str, expected: dict[str, tuple[int, ...]]) -> None:
    with LocalCluster(plan=plan) as running:
        assert running.status()["plan"]["words"] == plan
        assert answers_of(running) == expected


def test_requests_computed_together_do_not_change_each_other(cluster: LocalCluster) -> None:
    async def ask(*prompts: str) -> list[tuple[int, ...]]:
        async with AsyncClient(cluster.link) as client:
            answers = await asyncio.gather(*(client.generate(prompt, max_tokens=12, seed=3) for prompt in prompts))
        return [answer.token_ids for answer in answers]

    alone = [asyncio.run(ask(prompt))[0] for prompt in PROMPTS]
    assert asyncio.run(ask(*PROMPTS, *PROMPTS)) == alone * 2


def test_the_status_tells_who_holds_what(cluster: LocalCluster) -> None:
    status = cluster.status()
    assert status["plan"]["head"] == "worker-1"
    assert {worker["name"] for worker in status["workers"]} == {worker.name for worker in cluster.workers}
    assert all(worker["weight_bytes"] > 0 for worker in status["workers"])


def test_stop_strings_end_the_text_before_them(cluster: LocalCluster) -> None:
    whole = cluster.client().generate(PROMPTS[0], max_tokens=NUM_TOKENS, ignore_eos=True)
    stop = whole.text.strip()[4:8]
    answer = cluster.client().generate(PROMPTS[0], max_tokens=NUM_TOKENS, stop=(stop,))
    assert answer.finish_reason is FinishReason.STOP
    assert answer.text == whole.text[: whole.text.index(stop)]


def test_a_stream_that_is_left_frees_the_workers(cluster: LocalCluster) -> None:
    client = cluster.client()
    with client.generate(PROMPTS[0], max_tokens=900, ignore_eos=True, stream=True) as stream:
        first = next(stream)
    assert first.token_ids
    client.generate(PROMPTS[0], max_tokens=1)
    assert client.status()["sessions"] == {"running": 0, "waiting": 0}


def test_a_prompt_that_never_fits_is_refused(cluster: LocalCluster) -> None:
    with pytest.raises(RequestInvalid):
        cluster.client().generate([1] * 2000)


def test_chat_and_unknown_logs(cluster: LocalCluster) -> None:
    answer = cluster.client().chat([{"role": "user", "content": "import sys"}], max_tokens=4)
    assert answer.usage.completion_tokens <= 4
    assert "worker" in cluster.logs("worker-1")
    with pytest.raises(RequestInvalid, match="no process 'worker-9'"):
        cluster.logs("worker-9")


def served_after(running: LocalCluster, before: Status) -> Status:
    """Wait until another plan than before serves."""
    while (status := running.wait_until_ready())["epoch"] <= before["epoch"]:
        pass
    return status


def test_a_killed_worker_costs_no_token_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, tuple[int, ...]]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    threads, others = set(threading.enumerate()), set(psutil.Process().children(recursive=True))
    lease = {"lease_s": "3600"}  # seen by the connection that breaks, or never
    with LocalCluster(plan="1/1", coordinator_settings=lease) as running:
        children = set(psutil.Process().children(recursive=True)) - others
        client = running.client()
        with client.generate(PROMPTS[0], max_tokens=NUM_TOKENS, ignore_eos=True, stream=True) as stream:
            tokens = list(next(stream).token_ids)
            running.kill("worker-2")
            for piece in stream:
                tokens += piece.token_ids
        assert tuple(tokens) == expected[PROMPTS[0]]
    assert len(children) == 3
    assert not [child for child in children if child.is_running()]
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads


def test_every_process_may_die_and_come_back(expected: dict[str, tuple[int, ...]]) -> None:
    with LocalCluster(plan="1/1") as running:
        status, first = running.status(), running.workers[0].pid
        running.kill("worker-1")  # the head: it is supervised
        status = served_after(running, status)
        assert running.workers[0].pid != first and answers_of(running) == expected
        status = running.status()
        running.kill("worker-2")
        running.restart_worker("worker-2")
        status = served_after(running, status)
        assert answers_of(running) == expected
        assert running.add_worker().name == "worker-3"
        with pytest.raises(RequestInvalid, match="'worker-3' already"):
            running.add_worker("worker-3")
        while len(status["workers"]) < 3:
            status = running.status()
        running.restart_coordinator()
        while status["term"] < 2 or status["phase"] != "ready":
            with contextlib.suppress(CoordinatorLost):
                status = running.status()
        assert answers_of(running) == expected
        assert [worker.name for worker in running.workers] == ["worker-1", "worker-2", "worker-3"]


def test_a_worker_whose_owner_wants_it_back_is_spared_and_told() -> None:
    now = time.localtime()
    hours = f"{(now.tm_hour + 2) % 24:02}:00-{(now.tm_hour + 3) % 24:02}:00"
    with LocalCluster(workers=1) as running:
        running.add_worker(settings={"hours": hours})
        while not (states := [worker["state"] for worker in running.status()["workers"][1:]]) or not states[0]:
            pass
        assert states == ["paused: it is outside its hours"]
        status = running.wait_until_ready()
        assert running.client().generate(PROMPTS[0], max_tokens=2).token_ids
        assert "worker-2" not in json.dumps(status["plan"])
