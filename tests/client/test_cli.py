"""The command: help, exit codes, where settings come from, and what it prints, against a scripted coordinator."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from fake_coordinator import FakeCoordinator, begin, fake_in_thread, finished, go_on, refuse, speak
from status_samples import READY

from manyhands.cli import main
from manyhands.cli.app import COMMANDS, root
from protocol import exits
from protocol.errors import Overloaded, PeerLost, RequestInvalid
from protocol.messages import Cancel, Drain, FinishReason, Generate, Leg
from protocol.security import KeyPair, Link

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No configuration, state or variables of whoever runs the tests."""
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    for name in ("MANYHANDS_LINK", "MANYHANDS_MAX_TOKENS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCoordinator]:
    with fake_in_thread() as running:
        running.status = READY
        monkeypatch.setenv("MANYHANDS_LINK", running.link.format())
        yield running


def orders(fake: FakeCoordinator) -> list[Generate]:
    return fake.of(Generate)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    done = CliRunner().invoke(root, [name, "--help"], prog_name="manyhands")
    assert done.exit_code == 0, done.output
    assert f"Usage: manyhands {name}" in done.output


def test_the_help_lists_every_command() -> None:
    done = CliRunner().invoke(root, ["--help"])
    assert all(name in done.output for name in COMMANDS)


USAGE = [
    (["bogus"], exits.USAGE, "No such command 'bogus'"),
    (["ask", "--bogus"], exits.USAGE, "--bogus"),
    (["ask", "a", "b"], exits.USAGE, "unexpected extra argument"),
    (["up"], exits.USAGE, "MODEL is needed"),
    (["ask", "hi", "--max-tokens", "many"], exits.CONFIG, "max_tokens = 'many' (flag --max-tokens)"),
    (["ask", "hi", "--temperature", "-1"], exits.DATA, "temperature -1.0"),
    (["ask", "hi"], exits.CONFIG, "no link given"),
    (["status", "--link", "nonsense"], exits.CONFIG, "a link begins with manyhands://"),
    (["ask", "hi", "--config", "/nowhere.toml"], exits.CONFIG, "/nowhere.toml"),
    (["ask", "hi", "--timeout-s", "0"], exits.CONFIG, "timeout_s 0"),
]


@pytest.mark.parametrize(("argv", "code", "words"), USAGE)
def test_errors_are_two_lines_and_a_code(argv: list[str], code: int, words: str, capsys: Capture) -> None:
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert words in err
    assert err.startswith("error: ")
    assert "Traceback" not in err + out
    assert out == ""


def test_settings_come_from_defaults_file_environment_and_flags_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def effective(*argv: str) -> str:
        assert main(["ask", "--print-config", *argv]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("max_tokens"))

    assert effective() == "max_tokens = 256  # default"
    usual = tmp_path / "XDG_CONFIG_HOME" / "manyhands" / "config.toml"
    usual.parent.mkdir(parents=True)
    usual.write_text("[client]\nmax_tokens = 1\n[worker]\n")
    assert effective() == f"max_tokens = 1  # file {usual} [client]"
    other = tmp_path / "other.toml"
    other.write_text("[client]\nmax_tokens = 2\n")
    assert effective("--config", str(other)) == f"max_tokens = 2  # file {other} [client]"
    monkeypatch.setenv("MANYHANDS_MAX_TOKENS", "3")
    assert effective("--config", str(other)) == "max_tokens = 3  # env MANYHANDS_MAX_TOKENS"
    assert effective("--max-tokens", "4") == "max_tokens = 4  # flag --max-tokens"


def test_an_unknown_key_of_the_file_is_named(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[client]\nmax_tokenz = 1\n")
    assert main(["status", "--config", str(file)]) == exits.CONFIG
    assert "'max_tokenz'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ask", "chat", "status", "invite", "demo", "up", "join", "drain"])
def test_print_config_shows_no_secret(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    keys = KeyPair.generate()
    link = Link(role="ask", addresses=("h:1",), server_key=keys.public, secret=keys.secret).format()
    monkeypatch.setenv("MANYHANDS_LINK", link)
    assert main([command, *(["w1"] if command == "drain" else []), "--print-config"]) == 0
    out = capsys.readouterr().out
    assert link.rpartition(".")[2] not in out
    assert out.startswith("[")


def test_ask_streams_to_standard_output(fake: FakeCoordinator, capsys: Capture) -> None:
    assert main(["ask", "hi", "--stop", "a,b", "--stop", " ", "--seed", "5", "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == "hello\n"
    first, *memory = err.splitlines()
    assert first == "5 tokens (3 in the prompt), first after 100 ms, 40.0 tokens/s, ended by length"
    assert memory[1].split() == ["worker", "weights", "KV", "budget", "use", "peak"]
    assert memory[3].split()[0] == "w1"
    assert (orders(fake)[0].stop, orders(fake)[0].sampling.seed) == (("a,b", " "), 5)


def test_ask_as_json(fake: FakeCoordinator, capsys: Capture) -> None:
    assert main(["ask", "hi", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["finish_reason"], answer["usage"]["prompt_tokens"]) == ("hello", "length", 3)


@pytest.mark.parametrize("argv", [["ask"], ["ask", "-"]])
def test_ask_reads_standard_input(
    argv: list[str], fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert main(argv) == 0
    assert fake.payloads[-1] == b"from a pipe"


FAILURES = [
    (PeerLost("gone", node="w2"), exits.UNAVAILABLE, "error: gone [w2]\nremedy: ask again"),
    (Overloaded("full", remedy="later"), exits.TEMPORARY, "error: full\nremedy: later"),
    (RequestInvalid("bad"), exits.DATA, "error: bad"),
]


@pytest.mark.parametrize(("error", "code", "words"), FAILURES, ids=lambda case: str(case)[:12])
def test_reported_errors_have_codes(
    error: Exception, code: int, words: str, fake: FakeCoordinator, capsys: Capture
) -> None:
    fake.on_generate = refuse(error)
    assert main(["ask", "hi"]) == code
    assert words in capsys.readouterr().err


def test_nobody_answers(capsys: Capture) -> None:
    keys = KeyPair.generate()
    link = Link(role="ask", addresses=("127.0.0.1:1",), server_key=keys.public, secret=keys.secret)
    assert main(["status", "--timeout-s", "0.3", "--link", link.format()]) == exits.UNAVAILABLE
    assert "127.0.0.1:1" in capsys.readouterr().err


def test_silence_in_the_middle(fake: FakeCoordinator, capsys: Capture) -> None:
    fake.on_generate = begin("he")
    assert main(["ask", "hi", "--timeout-s", "0.4", "--reconnect-s", "0"]) == exits.UNAVAILABLE
    out, err = capsys.readouterr()
    assert out == "he"
    assert "silent" in err


def test_an_answer_goes_on_after_silence(fake: FakeCoordinator, capsys: Capture) -> None:
    fake.on_generate, fake.on_resume = begin("he"), go_on("hello")
    assert main(["ask", "hi", "--timeout-s", "0.4"]) == 0
    assert capsys.readouterr().out == "hello\n"


def chat(lines: str, monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *argv])


def test_chat_remembers_and_forgets(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert chat("one\n\ntwo\n/new\nthree\n", monkeypatch, "--system", "be brief") == 0
    assert capsys.readouterr().out == "hello\nhello\nhello\n"
    asked = [json.loads(payload) for payload in fake.payloads if payload]
    contents = [[message["content"] for message in messages] for messages in asked]
    assert contents == [["be brief", "one"], ["be brief", "one", "hello", "two"], ["be brief", "three"]]
    assert [message["role"] for message in asked[1]] == ["system", "user", "assistant", "user"]


def test_chat_goes_on_after_an_error(fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def first_fail(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        fake.on_generate = speak("back")
        refuse(PeerLost("gone"))(fake, to, message, payload)

    fake.on_generate = first_fail
    assert chat("one\ntwo\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out == "\nback\n"
    assert err.startswith("error: gone")


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_stops_the_answer_and_the_talk_goes_on(
    fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupt(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        begin("he")(fake, to, message, payload)
        fake.on_generate = speak("back")
        os.kill(os.getpid(), signal.SIGINT)

    fake.on_generate = interrupt
    assert chat("one\ntwo\n", monkeypatch) == 0
    assert capsys.readouterr().out.endswith(" [stopped]\nback\n")
    fake.wait_until(lambda: len(fake.of(Cancel)) == 1)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_ask(fake: FakeCoordinator) -> None:
    def interrupt(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        begin("he")(fake, to, message, payload)
        os.kill(os.getpid(), signal.SIGINT)

    fake.on_generate = interrupt
    assert main(["ask", "hi"]) == exits.INTERRUPTED
    fake.wait_until(lambda: len(fake.of(Cancel)) == 1)


def test_status_for_people_and_for_programs(fake: FakeCoordinator, capsys: Capture) -> None:
    assert main(["status"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "phase     ready" in out
    assert "plan      1,1/1 (3 workers in 2 stages)" in out
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["w1", "w2", "w3"]
    assert main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == READY


def test_invite(fake: FakeCoordinator, capsys: Capture) -> None:
    assert main(["invite"]) == main(["invite", "--trusted"]) == 0
    assert capsys.readouterr().out == "a link, trusted False\na link, trusted True\n"


def test_drain_watches_until_the_worker_is_gone(fake: FakeCoordinator, capsys: Capture) -> None:
    assert main(["drain", "w2"]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "w2 has handed over and left"
    assert [message.worker for message in fake.of(Drain)] == ["w2"]


def test_drain_of_a_stranger_is_refused_by_name(fake: FakeCoordinator, capsys: Capture) -> None:
    assert main(["drain", "w9"]) == exits.DATA
    assert "no worker 'w9'; there are w1, w2, w3" in capsys.readouterr().err
    assert fake.of(Drain) == []


def test_drain_of_one_that_cannot_be_spared(fake: FakeCoordinator, capsys: Capture) -> None:
    def refuse_to(worker: str) -> None:
        fake.status = {**fake.status, "events": [{"ago_s": 0.1, "text": f"{worker} can't be spared: no room"}]}

    fake.on_drain = refuse_to
    assert main(["drain", "w1"]) == exits.CONFIG
    assert "error: w1 can't be spared: no room" in capsys.readouterr().err


def test_ask_and_chat_tell_who_computed_what(
    fake: FakeCoordinator, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def answer(fake: FakeCoordinator, to: bytes, message: Any, payload: bytes) -> None:
        leg = Leg(epoch=1, start=0, words="1/1", stages=("layers 0 to 1: a",))
        fake.say(to, replace(finished(message.request, FinishReason.STOP, 0), legs=(leg,)))

    fake.on_generate = answer
    assert main(["ask", "hi", "--provenance"]) == 0
    assert capsys.readouterr().err == "from token 1 on: plan 1/1\n  layers 0 to 1: a\n"
    assert chat("one\n", monkeypatch, "--provenance") == 0
    assert capsys.readouterr().err == "from token 1 on: plan 1/1\n  layers 0 to 1: a\n"


def test_version(capsys: Capture) -> None:
    assert main(["version"]) == main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("manyhands ")


def test_a_bug_is_told_with_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(click.Group, "main", broken)
    assert main(["status"]) == exits.SOFTWARE
    assert "error: a bug" in capsys.readouterr().err
