"""Workers that die, freeze or lose tiles: a typed error that names them, a status that tells, and the model is back.

One cluster goes through it all, one trouble after the other; each test begins when the model is ready again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator

import pytest
from checkpoints import PROMPTS, Checkpoint, make_checkpoint
from house import DEADLINE_S, House, worker_of

from manyhands import AsyncClient, PeerLost, StepFailed
from manyhands.connection import Status

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> tuple[int, ...]:
    return checkpoint.tokens(PROMPTS[1])


@pytest.fixture(scope="module")
def running(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("trouble"), checkpoint.folder, "1/1,1") as house:
        for number in (1, 2, 3):
            house.start(f"worker-{number}")
        yield house


@pytest.fixture
def house(running: House) -> House:
    running.until_ready()
    return running


def shares_of(status: Status) -> dict[str, tuple[object, ...]]:
    """What each worker computes."""
    return {
        member["worker"]: (stage["layers"], member["groups"], member["ffn"])
        for stage in status["plan"]["stages"]
        for member in stage["members"]
    }


def answer(house: House) -> tuple[int, ...]:
    return house.client.generate(PROMPTS[1], max_tokens=64).token_ids


def break_in_mid_answer(house: House, trouble: Callable[[], object]) -> None:
    """Let something happen after the first tokens, and read on; an answer that neither ends nor fails is a failure."""

    async def read() -> None:
        async with asyncio.timeout(20), AsyncClient(house.coordinator.link) as client:
            stream = await client.generate(PROMPTS[1], max_tokens=1900, stream=True)
            await anext(stream)
            trouble()
            async for _ in stream:
                pass

    asyncio.run(read())


def second_stage(house: House) -> tuple[str, str]:
    """The hub and the other member of the stage without the head (who joins first has the first seat)."""
    stage = house.until_ready()["plan"]["stages"][1]
    (other,) = {member["worker"] for member in stage["members"]} - {stage["hub"]}
    return stage["hub"], other


@pytest.mark.parametrize("rank", [0, 1], ids=["hub", "member"])
def test_a_killed_worker_is_named_and_finds_back_with_its_tiles(
    house: House, expected: tuple[int, ...], rank: int
) -> None:
    name = second_stage(house)[rank]
    errors = house.client.status()["totals"]["errors"]
    with pytest.raises((PeerLost, StepFailed), match=name) as caught:
        break_in_mid_answer(house, house.workers[name].process.kill)
    assert caught.value.node == name
    status = house.until(lambda status: status["detail"].startswith("waiting for 1 of 3 workers"))
    assert status["phase"] == "waiting"
    assert name not in status["detail"]
    assert name in status["last_error"]
    assert status["totals"]["errors"] == errors + 1
    assert status["sessions"] == {"running": 0, "waiting": 0}

    house.kill(name)
    house.start(name)
    assert house.until_ready()["epoch"] > status["epoch"]
    assert answer(house) == expected
    assert house.fetched_bytes(name) == 0


def test_a_request_waits_for_the_worker_that_comes_back(house: House, expected: tuple[int, ...]) -> None:
    """Asked while a worker is gone: the client hears what it waits for, and gets its answer in the end."""
    gone = second_stage(house)[1]

    async def ask() -> tuple[int, ...]:
        async with asyncio.timeout(DEADLINE_S), AsyncClient(house.coordinator.link) as client:
            stream = await client.generate(PROMPTS[1], max_tokens=64, stream=True)
            reading = asyncio.create_task(read(stream))
            while "waiting for 1 of 3 workers" not in stream.waits_for:
                await client.status()
            await asyncio.to_thread(house.start, gone)
            return await reading

    async def read(stream: object) -> tuple[int, ...]:
        return tuple([token async for piece in stream for token in piece.token_ids])

    house.kill(gone)
    house.until(lambda status: status["phase"] == "waiting")
    assert asyncio.run(ask()) == expected


def test_a_frozen_worker_is_lost_and_is_back_when_it_thaws(house: House, expected: tuple[int, ...]) -> None:
    hub, _ = second_stage(house)
    frozen = house.workers[hub].process
    with pytest.raises(PeerLost, match=hub):
        break_in_mid_answer(house, lambda: frozen.send_signal(signal.SIGSTOP))
    house.until(lambda status: status["detail"].startswith("waiting for 1 of 3 workers"))
    frozen.send_signal(signal.SIGCONT)
    house.until_ready()
    assert answer(house) == expected


def test_the_head_is_missed_by_name_and_comes_back(house: House, expected: tuple[int, ...]) -> None:
    with pytest.raises(PeerLost, match="worker-1"):
        break_in_mid_answer(house, house.workers["worker-1"].process.kill)
    house.until(lambda status: "waiting for a trusted worker to be the head" in status["detail"])
    house.kill("worker-1")
    house.start("worker-1")
    house.until_ready()
    assert answer(house) == expected


@pytest.mark.parametrize("harm", ["altered", "cut short", "deleted"])
def test_a_spoiled_tile_is_fetched_again(house: House, expected: tuple[int, ...], harm: str) -> None:
    name = second_stage(house)[1]
    house.stop(name)
    tile = max(house.cache_of(name).glob("tiles/??/*"), key=lambda path: path.stat().st_size)
    data = tile.read_bytes()
    match harm:
        case "altered":
            tile.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
        case "cut short":
            tile.write_bytes(data[:100])
        case _:
            tile.unlink()
    house.until(lambda status: status["phase"] == "waiting")
    house.start(name)
    house.until_ready()
    assert answer(house) == expected
    assert house.fetched_bytes(name) == len(data)
    assert tile.read_bytes() == data


def test_the_coordinator_is_back_and_the_workers_dial_again(house: House, expected: tuple[int, ...]) -> None:
    before = house.client.status()
    shares = shares_of(before)
    house.restart_coordinator()
    status = house.until_ready()
    assert status["term"] == before["term"] + 1
    assert {worker["name"] for worker in status["workers"]} == set(house.workers)
    assert answer(house) == expected
    # Seats go by who dials first, so shares may have changed; where they have not, nothing is fetched.
    kept = [name for name, share in shares_of(status).items() if shares[name] == share]
    assert "worker-1" in kept
    assert not any(house.fetched_bytes(name) for name in kept)


def test_at_rest_everything_is_released(house: House) -> None:
    status = house.until(lambda status: not any(worker["kv_bytes"] for worker in status["workers"]))
    assert status["sessions"] == {"running": 0, "waiting": 0}
    assert all(worker_of(status, name)["weight_bytes"] > 0 for name in house.workers)
    assert status["frames"]["violations"] == 0
