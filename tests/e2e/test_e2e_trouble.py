"""Workers that die, freeze or lose tiles: the answer goes on, the status tells, and the plan is whole again.

One cluster goes through it all, one trouble after the other; each test begins when the model is ready again.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator

import pytest
from checkpoints import PROMPTS, Checkpoint, make_checkpoint
from house import DEADLINE_S, House, worker_of

from manyhands import AsyncClient
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
    running.until_whole()
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


def break_in_mid_answer(house: House, trouble: Callable[[], object]) -> tuple[int, ...]:
    """Let something happen after the first tokens, and read on to the end of the answer."""

    async def read() -> tuple[int, ...]:
        async with asyncio.timeout(DEADLINE_S), AsyncClient(house.coordinator.link) as client:
            stream = await client.generate(PROMPTS[1], max_tokens=64, stream=True)
            first = await anext(stream)
            trouble()
            return (*first.token_ids, *[token async for piece in stream for token in piece.token_ids])

    return asyncio.run(read())


def told(status: Status) -> str:
    """What has happened, as people read it."""
    return "\n".join(event["text"] for event in status["events"])


def second_stage(house: House) -> tuple[str, str]:
    """The hub and the other member of the stage without the head (who joins first has the first seat)."""
    stage = house.until_whole()["plan"]["stages"][1]
    (other,) = {member["worker"] for member in stage["members"]} - {stage["hub"]}
    return stage["hub"], other


@pytest.mark.parametrize("rank", [0, 1], ids=["hub", "member"])
def test_the_stream_outlives_a_killed_worker_which_finds_back_with_its_tiles(
    house: House, expected: tuple[int, ...], rank: int
) -> None:
    name = second_stage(house)[rank]
    before = house.client.status()
    assert break_in_mid_answer(house, house.workers[name].process.kill) == expected
    status = house.until(lambda status: name not in {worker["name"] for worker in status["workers"]})
    assert status["totals"]["errors"] == before["totals"]["errors"]
    assert name in status["last_error"]
    assert name in told(status)
    assert "positions to compute again" in told(status)
    assert status["plan"] is None or name not in shares_of(status)

    house.kill(name)
    house.start(name)
    assert house.until_whole()["epoch"] > status["epoch"]
    assert answer(house) == expected
    assert house.fetched_bytes(name) == 0


def test_a_frozen_worker_is_lost_and_is_back_when_it_thaws(house: House, expected: tuple[int, ...]) -> None:
    hub, _ = second_stage(house)
    frozen = house.workers[hub].process
    assert break_in_mid_answer(house, lambda: frozen.send_signal(signal.SIGSTOP)) == expected
    assert f"{hub} was silent for" in told(house.client.status())
    frozen.send_signal(signal.SIGCONT)
    house.until_whole()
    assert answer(house) == expected


def test_the_stream_waits_for_the_head_that_comes_back(house: House, expected: tuple[int, ...]) -> None:
    """Nobody else may know the tokens, so the others wait for it, with all they have; the client hears why."""

    def lose_the_head() -> None:
        house.kill("worker-1")
        house.until(lambda status: "waiting for a trusted worker to be the head" in status["detail"])
        house.start("worker-1")

    assert break_in_mid_answer(house, lose_the_head) == expected
    house.until_whole()
    assert answer(house) == expected


def test_a_worker_that_is_told_to_end_hands_over_first(house: House, expected: tuple[int, ...]) -> None:
    name = second_stage(house)[1]
    child = house.workers[name]
    assert break_in_mid_answer(house, child.process.terminate) == expected
    assert child.process.wait(DEADLINE_S) == 0
    status = house.client.status()
    assert f"{name} hands over" in told(status)
    house.start(name)
    house.until_whole()


@pytest.mark.parametrize("harm", ["altered", "cut short", "deleted"])
def test_spoiled_tiles_are_fetched_again(house: House, expected: tuple[int, ...], harm: str) -> None:
    name = second_stage(house)[1]
    house.stop(name)
    for tile in house.cache_of(name).glob("tiles/??/*"):
        data = tile.read_bytes()
        match harm:
            case "altered":
                tile.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
            case "cut short":
                tile.write_bytes(data[:100])
            case _:
                tile.unlink()
    house.start(name)
    status = house.until_whole()
    assert answer(house) == expected
    assert worker_of(status, name)["weight_bytes"] >= house.fetched_bytes(name) > 0


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
