"""Requests that are computed together give the tokens they give alone, and leave nothing behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import pytest
from checkpoints import PROMPTS, make_checkpoint
from house import DEADLINE_S, House

from manyhands import AsyncClient, FinishReason
from manyhands.connection import Status

pytestmark = pytest.mark.processes
T = TypeVar("T")
GREEDY: dict[str, Any] = {"max_tokens": 40}
ORDERS: tuple[tuple[list[int], dict[str, Any]], ...] = (
    (PROMPTS[0], GREEDY),
    (PROMPTS[2], {"max_tokens": 30, "temperature": 1.5, "seed": 11}),
    (PROMPTS[1], {"max_tokens": 50, "temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 12}),
    (PROMPTS[0], {"max_tokens": 40, "temperature": 1.5, "seed": 13, "repetition_penalty": 1.3}),
    (PROMPTS[0], {"max_tokens": 40, "temperature": 1.5, "seed": 14, "min_p": 0.02}),
    (PROMPTS[2], GREEDY),
)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """Two stages, so that two steps are in flight; the second one is shared."""
    folder = tmp_path_factory.mktemp("together")
    make_checkpoint(folder / "model", "llama3")
    with House(folder, folder / "model", "1/1,1") as running:
        for number in (1, 2, 3):
            running.start(f"worker-{number}")
        running.until_ready()
        yield running


def run(house: House, work: Callable[[AsyncClient], Awaitable[T]]) -> T:
    async def within_the_deadline() -> T:
        async with asyncio.timeout(DEADLINE_S), AsyncClient(house.coordinator.link) as client:
            return await work(client)

    return asyncio.run(within_the_deadline())


async def answer(client: AsyncClient, order: tuple[list[int], dict[str, Any]]) -> tuple[int, ...]:
    prompt, options = order
    return (await client.generate(prompt, **options)).token_ids


def kv_bytes(status: Status) -> dict[str, int]:
    return {worker["name"]: worker["kv_bytes"] for worker in status["workers"]}


@pytest.fixture(scope="module")
def alone(house: House) -> list[tuple[int, ...]]:
    async def one_after_the_other(client: AsyncClient) -> list[tuple[int, ...]]:
        return [await answer(client, order) for order in ORDERS]

    return run(house, one_after_the_other)


def test_a_seed_repeats_and_another_seed_differs(house: House, alone: list[tuple[int, ...]]) -> None:
    again = house.client.generate(ORDERS[1][0], **ORDERS[1][1]).token_ids
    other = house.client.generate(ORDERS[1][0], **{**ORDERS[1][1], "seed": 99}).token_ids
    assert again == alone[1]
    assert other != alone[1]
    assert len(set(alone)) == len(alone)


def test_together_as_alone(house: House, alone: list[tuple[int, ...]]) -> None:
    async def all_at_once(client: AsyncClient) -> list[tuple[int, ...]]:
        return await asyncio.gather(*(answer(client, order) for order in ORDERS))

    assert run(house, all_at_once) == alone


def test_joining_in_the_middle_and_another_client(house: House, alone: list[tuple[int, ...]]) -> None:
    async def staggered(client: AsyncClient) -> list[tuple[int, ...]]:
        first = await client.generate(ORDERS[0][0], stream=True, **ORDERS[0][1])
        tokens = list((await anext(first)).token_ids)
        async with AsyncClient(house.coordinator.link) as guest:
            late = asyncio.create_task(answer(guest, ORDERS[1]))
            async for piece in first:
                tokens += piece.token_ids
            return [tuple(tokens), await late]

    assert run(house, staggered) == alone[:2]


def test_a_cancelled_one_disturbs_nobody_and_frees_its_memory(house: House, alone: list[tuple[int, ...]]) -> None:
    house.until(lambda status: not any(kv_bytes(status).values()))  # the sessions before are gone
    used: dict[str, int] = {}

    async def with_a_cancelled_one(client: AsyncClient) -> tuple[int, ...]:
        doomed = await client.generate(PROMPTS[2], stream=True, max_tokens=1700, temperature=1.0, seed=1)
        await anext(doomed)
        while not used or not all(used.values()):  # told by heartbeats
            used.update(kv_bytes(await client.status()))
            await anext(doomed)
        other = asyncio.create_task(answer(client, ORDERS[2]))
        for _ in range(5):
            await anext(doomed)
        await doomed.aclose()
        return await other

    assert run(house, with_a_cancelled_one) == alone[2]
    after = house.until(lambda status: not any(kv_bytes(status).values()))
    assert after["sessions"] == {"running": 0, "waiting": 0}
    again = house.client.generate(PROMPTS[0], **GREEDY)
    assert (again.token_ids, again.finish_reason) == (alone[0], FinishReason.LENGTH)
    assert house.client.status()["totals"]["errors"] == 0
