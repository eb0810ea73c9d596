"""The coordinator is killed and started again on its folder: streams go on with the same tokens, each of them once."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import PROMPTS, Checkpoint, make_checkpoint
from house import DEADLINE_S, House

from manyhands import AsyncClient, AsyncGenerationStream, Client, RequestInvalid

pytestmark = pytest.mark.processes
NUM_TOKENS = 64
WARM = {"temperature": 0.8, "seed": 11}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def house(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("restart"), checkpoint.folder, "1,1/1") as running:
        for number in (1, 2, 3):
            running.start(f"worker-{number}")
        running.until_ready()
        yield running


async def read_on(stream: AsyncGenerationStream) -> tuple[int, ...]:
    return tuple([token async for piece in stream for token in piece.token_ids])


def test_streams_go_on_over_a_killed_coordinator(house: House, checkpoint: Checkpoint) -> None:
    undisturbed = {
        "greedy": checkpoint.tokens(PROMPTS[1])[:NUM_TOKENS],
        "warm": house.client.generate(PROMPTS[0], max_tokens=NUM_TOKENS, **WARM).token_ids,  # type: ignore[arg-type]
    }
    seats = house.client.status()["plan"]

    async def run() -> dict[str, tuple[int, ...]]:
        async with asyncio.timeout(2 * DEADLINE_S), AsyncClient(house.coordinator.link) as client:
            greedy = await client.generate(PROMPTS[1], max_tokens=NUM_TOKENS, stream=True)
            warm = await client.generate(PROMPTS[0], max_tokens=NUM_TOKENS, stream=True, **WARM)  # type: ignore[call-overload]
            first = {"greedy": await anext(greedy), "warm": await anext(warm)}
            await asyncio.to_thread(house.restart_coordinator)
            rest = {"greedy": await read_on(greedy), "warm": await read_on(warm)}
            for stream in (greedy, warm):
                assert stream.result.usage.completion_tokens == NUM_TOKENS
                assert stream.result.legs
                timings = stream.result.timings
                assert timings.queued_s <= timings.first_token_s <= timings.total_s
            return {name: (*first[name].token_ids, *rest[name]) for name in first}

    assert asyncio.run(run()) == undisturbed
    status = house.until_ready()
    assert status["plan"]["stages"] == seats["stages"]
    assert status["term"] >= 2


def test_a_request_that_was_answered_before_is_not_computed_again(house: House) -> None:
    asked = {"prompt": PROMPTS[1], "max_tokens": 8, "request": "once"}
    before = house.client.generate(**asked)  # type: ignore[arg-type]
    house.restart_coordinator()
    with Client(house.coordinator.link) as client:
        again = client.generate(**asked)  # type: ignore[arg-type]
        assert (again.token_ids, again.text, again.timings) == (before.token_ids, before.text, before.timings)
        assert client.status()["totals"]["requests"] == 0
        with pytest.raises(RequestInvalid, match="something else before"):
            client.generate(PROMPTS[1], max_tokens=9, request="once")


def test_what_was_asked_while_nobody_listened_is_answered(house: House, checkpoint: Checkpoint, tmp_path: Path) -> None:
    house.until_ready()

    async def run() -> tuple[int, ...]:
        async with asyncio.timeout(2 * DEADLINE_S), AsyncClient(house.coordinator.link) as client:
            first = await client.generate(PROMPTS[1], max_tokens=NUM_TOKENS, stream=True)
            await anext(first)
            restarting = asyncio.create_task(asyncio.to_thread(house.restart_coordinator))
            second = await client.generate(PROMPTS[1], max_tokens=8)
            await restarting
            await read_on(first)
            return second.token_ids

    assert asyncio.run(run()) == checkpoint.tokens(PROMPTS[1])[:8]
