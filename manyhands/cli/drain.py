"""`manyhands drain`: have a worker hand over what it does and leave, and watch until it is gone.

Knows nothing of sockets.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import click

from manyhands.cli.flags import client_settings, settings_options
from manyhands.cli.news import LoadMeter, new_events
from manyhands.cli.screen import WaitNote
from manyhands.cli.status import SAMPLING
from manyhands.config import ClientConfig
from manyhands.progress import StartWatch, essence, headline
from manyhands.sync import Client
from protocol.errors import PlanImpossible

LOOK_EVERY_S = 0.2
PATIENCE_S = 120.0  # without any progress: tiles may have to travel first
Tree = Mapping[str, Any]


def command() -> click.Command:
    """Return the command."""
    parameters: list[click.Parameter] = [
        click.Argument(["worker"]),
        *settings_options(ClientConfig, without=SAMPLING),
    ]
    text = (
        "Let WORKER hand over what it does and leave. Answers under way go on, nothing is computed again. "
        "It stays where the model can't do without it."
    )
    return click.Command("drain", params=parameters, callback=run, help=text)


def run(worker: str, **given: Any) -> None:
    """Ask, and tell until the worker is gone.

    Raises what the client raises, PlanImpossible when it can't be spared, DeadlineExceeded when nothing moves.
    """
    config = client_settings(given)
    if config is None:
        return
    with Client(config.link or None, config.timeout_s) as client, WaitNote() as note:
        before = client.status()
        client.drain(worker)
        _watch(client, worker, before, note)


def _watch(client: Client, worker: str, before: Tree, note: WaitNote) -> None:
    meter, patience = LoadMeter(), StartWatch(PATIENCE_S, time.monotonic())
    seen: Tree = before
    while True:
        status = client.status()
        for text in new_events(seen, status):
            note.line(text)
        seen = status
        if is_gone(before, status, worker):
            note.line(f"{worker} has handed over and left")
            return
        note.say(meter.see(status, time.monotonic()) or f"{worker} hands over")
        patience.see(f"{essence(status)} {new_events(before, status)}", headline(status), time.monotonic())
        patience.check(time.monotonic())
        time.sleep(LOOK_EVERY_S)


def is_gone(before: Tree, after: Tree, worker: str) -> bool:
    """Return whether a worker that was asked to leave has left since the status `before`, even if it is back by now.

    Raises PlanImpossible, in the coordinator's words, when it is to stay.
    """
    told = new_events(before, after)
    state = next((one.get("state", "") for one in after.get("workers", []) if one["name"] == worker), None)
    if state is None or f"{worker} is here" in told:
        return True
    refusals = [text for text in told if "can't be spared" in text and worker in text]
    if refusals and not state.startswith("leaving"):
        raise PlanImpossible(
            refusals[-1], node=worker, phase="drain", remedy="let another worker join that takes over, or stop it there"
        )
    return False
