"""Other ways to the same tokens: through the coordinator, with a head that holds no layers, with an automatic plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import PROMPTS, Checkpoint, make_checkpoint
from house import House

from manyhands.connection import Status

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "mistral")


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[tuple[int, ...]]:
    return [checkpoint.tokens(prompt) for prompt in PROMPTS]


def answers(house: House) -> list[tuple[int, ...]]:
    return [house.client.generate(prompt, max_tokens=64).token_ids for prompt in PROMPTS]


def answer_without(house: House, name: str) -> tuple[int, ...]:
    """The answer to the first prompt, in the middle of which a worker is killed."""
    with house.client.generate(PROMPTS[0], max_tokens=64, stream=True) as stream:
        tokens = [*next(stream).token_ids]
        house.kill(name)
        return (*tokens, *(token for piece in stream for token in piece.token_ids))


def test_workers_that_can_not_reach_each_other_are_relayed(
    tmp_path: Path, checkpoint: Checkpoint, expected: list[tuple[int, ...]]
) -> None:
    with House(tmp_path, checkpoint.folder, "1,1/1") as house:
        for number in (1, 2, 3):
            house.start(f"worker-{number}", advertise="127.0.0.1:1")  # nobody listens there
        assert {worker["link"] for worker in house.until_ready()["workers"]} == {"relay"}
        assert answers(house) == expected
        assert house.client.status()["frames"]["relayed"] > 0
        assert answer_without(house, "worker-3") == expected[0]


def test_a_head_without_layers(tmp_path: Path, checkpoint: Checkpoint, expected: list[tuple[int, ...]]) -> None:
    with House(tmp_path, checkpoint.folder, "1/1", head_only="true") as house:
        for number in (1, 2, 3):
            house.start(f"worker-{number}")
        plan = house.until_ready()["plan"]
        assert plan["head"] == "worker-1"
        assert sorted(members(plan)) == ["worker-2", "worker-3"]
        assert answers(house) == expected


def test_an_automatic_plan_takes_newcomers_in_and_goes_on_without_the_lost(
    tmp_path: Path, checkpoint: Checkpoint, expected: list[tuple[int, ...]]
) -> None:
    with House(tmp_path, checkpoint.folder, "auto", workers="2") as house:
        house.start("worker-1")
        house.until(lambda status: "waiting for 1 of 2 workers" in status["detail"])
        house.start("worker-2")
        assert members(house.until_ready()["plan"]) == ["worker-1", "worker-2"]
        assert answers(house) == expected
        house.start("worker-3")
        everybody = ["worker-1", "worker-2", "worker-3"]
        house.until(lambda status: status["phase"] == "ready" and sorted(members(status["plan"])) == everybody)
        assert answers(house) == expected
        assert answer_without(house, "worker-2") == expected[0]
        del house.workers["worker-2"]
        assert answers(house) == expected
        assert members(house.client.status()["plan"]) == ["worker-1", "worker-3"]


def members(plan: Status) -> list[str]:
    return [member["worker"] for stage in plan["stages"] for member in stage["members"]]
