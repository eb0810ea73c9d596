"""Logging: both forms, and no secret of a link in either."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from protocol.logs import redact, setup_logging
from protocol.security import KeyPair, Link

TOKEN = KeyPair.generate()
LINK = Link(role="join", addresses=("a:1",), server_key=KeyPair.generate().public, secret=TOKEN.secret).format()
SECRET = LINK.rpartition(".")[2]


def log_all(as_json: bool) -> None:
    """Log one plain line, one link, and one link inside a traceback."""
    setup_logging("info", as_json)
    log = logging.getLogger("worker.daemon")
    log.debug("not shown")
    log.info("joined %s", "home")
    log.warning("dialling %s", LINK)
    try:
        raise ValueError(LINK)
    except ValueError:
        log.exception("failed")


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    log_all(as_json=False)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Z INFO worker.daemon: joined home\n" in err
    assert "not shown" not in err
    assert "Traceback" in err
    assert SECRET not in err


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    log_all(as_json=True)
    err = capsys.readouterr().err
    first, second, third = (json.loads(line) for line in err.splitlines())
    assert set(first) == {"time", "level", "logger", "message"}
    assert (first["level"], first["logger"], first["message"]) == ("info", "worker.daemon", "joined home")
    assert second["message"].endswith(".***")
    assert "ValueError" in third["traceback"]
    assert SECRET not in err


def test_setting_up_twice_logs_once(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging("debug", False)
    setup_logging("error", False)
    logging.getLogger("x").warning("low")
    logging.getLogger("x").error("high")
    assert capsys.readouterr().err.count("\n") == 1
    assert logging.getLogger().handlers[0].stream is sys.stderr  # type: ignore[attr-defined]


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="'loud' is none of debug, info, warning, error"):
        setup_logging("loud", False)


def test_only_the_secret_of_a_link_is_blacked_out() -> None:
    assert redact(f"{LINK} and {LINK}") == f"{LINK.removesuffix(SECRET)}*** and {LINK.removesuffix(SECRET)}***"
    assert redact("no link at all, /join/me") == "no link at all, /join/me"
