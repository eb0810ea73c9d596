"""What is refused is refused in words: wrong and spent links, text without a tokenizer, long prompts, full disks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import PROMPTS, Checkpoint, make_checkpoint
from house import House, worker_of

from manyhands import Overloaded, PromptTooLong, RequestInvalid, TokenizerMissing
from protocol import exits
from protocol.security import KeyPair, Link

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2")


@pytest.fixture(scope="module")
def house(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with House(tmp_path_factory.mktemp("refusals"), checkpoint.folder, "1/1", form_timeout_s="3") as running:
        running.start("worker-1")
        running.start("worker-2")
        running.until_ready()
        yield running


def test_a_link_with_a_wrong_token_is_refused(house: House) -> None:
    link = Link.parse(house.client.invite())
    code, log = house.start_stranger(replace(link, secret=KeyPair.generate().secret).format())
    assert code == exits.REFUSED
    assert "error: the coordinator refused this key" in log
    assert "remedy: get a fresh link with `manyhands invite`" in log
    assert "Traceback" not in log


def test_a_spent_link_is_refused(house: House) -> None:
    code, log = house.start_stranger(house.links["worker-1"])
    assert code == exits.REFUSED
    assert "error: this invitation has been spent by another worker" in log
    assert "remedy: " in log


def test_a_link_to_another_server_key_is_told_apart_from_nobody_there(house: House) -> None:
    link = Link.parse(house.client.invite())
    code, log = house.start_stranger(
        replace(link, server_key=KeyPair.generate().public).format(), connect_timeout_s="1"
    )
    assert code == exits.UNAVAILABLE
    assert "never proved the link's server key" in log
    code, log = house.start_stranger(replace(link, addresses=("127.0.0.1:1",)).format(), connect_timeout_s="1")
    assert code == exits.UNAVAILABLE
    assert "127.0.0.1:1: not reached" in log


def test_a_client_link_does_not_let_workers_in(house: House) -> None:
    code, log = house.start_stranger(house.coordinator.link.format())
    assert code == exits.CONFIG
    assert "this is a link to ask, not to join" in log


def test_no_refused_worker_is_counted(house: House) -> None:
    assert {worker["name"] for worker in house.client.status()["workers"]} == {"worker-1", "worker-2"}


def test_without_a_tokenizer_ids_work_and_text_does_not(house: House, checkpoint: Checkpoint) -> None:
    answer = house.client.generate(PROMPTS[0], max_tokens=8)
    assert (answer.token_ids, answer.text) == (checkpoint.tokens(PROMPTS[0], 8), "")
    for ask in (
        lambda: house.client.generate("hello"),
        lambda: house.client.chat([{"role": "user", "content": "hello"}]),
        lambda: house.client.generate(PROMPTS[0], stop="."),
    ):
        with pytest.raises(TokenizerMissing, match="no tokenizer"):
            ask()


def test_prompts_that_can_not_be_computed(house: House) -> None:
    with pytest.raises(PromptTooLong, match="2040 prompt tokens and max_tokens 9 exceed the context of 2048"):
        house.client.generate([1] * 2040, max_tokens=9)
    with pytest.raises(RequestInvalid, match="outside the vocabulary"):
        house.client.generate([131])
    with pytest.raises(RequestInvalid, match="empty"):
        house.client.generate([])
    assert len(house.client.generate([1] * 2040, max_tokens=8).token_ids) == 8


def test_a_cache_limit_that_is_too_small_is_told_and_can_be_raised(house: House, checkpoint: Checkpoint) -> None:
    house.stop("worker-2")
    house.start("worker-2", cache_limit="100KB", cache_dir=str(house.folder / "small"))
    require_storage_full(house, "is limited to 100000")
    house.stop("worker-2")
    house.start("worker-2")
    house.until_ready()
    assert house.client.generate(PROMPTS[0], max_tokens=8).token_ids == checkpoint.tokens(PROMPTS[0], 8)


def test_a_full_disk_is_told_and_can_be_cleared(house: House, checkpoint: Checkpoint, small_disk: Path) -> None:
    house.stop("worker-2")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(900_000))
    house.start("worker-2", cache_dir=str(small_disk / "cache"))
    require_storage_full(house, "No space left on device")
    ballast.unlink()  # the next try goes on from what was fetched
    house.until_ready()
    assert house.client.generate(PROMPTS[0], max_tokens=8).token_ids == checkpoint.tokens(PROMPTS[0], 8)


@pytest.fixture
def small_disk(tmp_path: Path, house: House) -> Iterator[Path]:
    """A file system of 1 MB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", str(tmp_path)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=10)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"can't mount a small file system here: {error}")
    try:
        yield tmp_path
        house.stop("worker-2")
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True, timeout=10)


def require_storage_full(house: House, words: str) -> None:
    """The status says which worker has no room and what to do; a request is refused for this reason, and soon."""
    status = house.until(lambda status: words in status["last_error"])
    assert status["phase"] != "ready"
    assert "worker-2" in status["last_error"]
    assert "--cache-dir" in status["last_error"]
    assert worker_of(status, "worker-2")["name"] == "worker-2"  # it stays, for it may be helped
    with pytest.raises(Overloaded, match="no model after 3 s"):
        house.client.generate(PROMPTS[0], max_tokens=8)
