"""`manyhands up`: a coordinator and a trusted worker on this machine, ended together; tells how others join.

Knows nothing of what the two do. They are processes of their own; this one watches them, and starts the worker again
when it died.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from manyhands.cli.flags import Configuration, as_texts, print_settings, settings_options
from manyhands.cli.join import require_torch
from manyhands.cli.news import LoadMeter, news
from manyhands.cli.screen import WaitNote, console
from manyhands.cli.tables import model_line
from manyhands.cluster import DEMO_MODEL
from manyhands.config import UpConfig
from manyhands.connection import Status
from manyhands.keeper import Keeper
from manyhands.launch import Coordinator, start_coordinator, start_worker
from manyhands.processes import ChildProcess, stop_all
from manyhands.sync import Client
from protocol import exits
from protocol.settings import LogSettings

LOOK_EVERY_S = 0.5
START_TIMEOUT_S = 600.0  # without a line in the coordinator's log: a download may be slow to begin
LOCAL_WORKER = "local-worker"  # its folder and log
LOCAL = "the local worker"


def command() -> click.Command:
    """Return the command."""
    from coordinator.config import CoordinatorConfig

    parameters: list[click.Parameter] = [
        click.Argument(["given_model"], metavar="[MODEL]", required=False),
        *settings_options(CoordinatorConfig, UpConfig, LogSettings, without=("model", "exit_on_stdin_close")),
    ]
    text = (
        "Serve MODEL: a folder, OWNER/NAME on the Hugging Face hub, or demo for the small one that comes along. "
        "Starts a coordinator and a worker on this machine and prints the link with which others join. Ctrl-C ends all."
    )
    return click.Command("up", params=parameters, callback=run, help=text)


def run(given_model: str | None, **given: Any) -> int:
    """Serve until Ctrl-C or SIGTERM; raises what ended the coordinator, or the local worker for good."""
    from coordinator.config import CoordinatorConfig
    from worker.config import WorkerConfig

    configuration = Configuration(given)
    model = str(DEMO_MODEL) if given_model == "demo" else given_model
    coordinator = configuration.load(CoordinatorConfig, "coordinator", model=model)
    up = configuration.load(UpConfig, "up", uses_file=False)
    logs = configuration.load(LogSettings, "logging")
    own = {name.removeprefix("worker_"): value for name, value in as_texts(up).items()}
    worker = configuration.load_file_only(WorkerConfig, "worker", **own)
    if configuration.wants_print:
        print_settings(coordinator, up, worker, logs)
        return exits.OK
    if not coordinator.config.model:
        raise click.UsageError("MODEL is needed: a folder, OWNER/NAME on the Hugging Face hub, or demo")
    require_torch()
    folder = coordinator.config.state_folder
    for_coordinator = {"model": coordinator.config.model} | as_texts(coordinator) | as_texts(logs)
    with _terminable():
        _serve(for_coordinator, as_texts(worker) | as_texts(logs), folder)
    return exits.OK


def _serve(for_coordinator: Mapping[str, str], for_worker: Mapping[str, str], folder: Path) -> None:
    children: dict[str, ChildProcess] = {}
    try:
        with WaitNote() as note:
            note.line(f"starting the coordinator (its log: {folder / 'coordinator.log'})")
            coordinator = start_coordinator(
                for_coordinator, folder, folder / "coordinator.log", START_TIMEOUT_S,
                lambda child: children.update(coordinator=child),
            )  # fmt: skip
            with Client(coordinator.link) as client:
                link = client.invite(trusted=True)
                log = folder / f"{LOCAL_WORKER}.log"

                def start_local(*, again: bool = True) -> None:
                    children[LOCAL] = start_worker(for_worker, link, folder / LOCAL_WORKER, log, continues_log=again)

                start_local(again=False)
                keeper = Keeper(LOCAL, lambda: children[LOCAL], start_local, note.line)
                _Watch(client, coordinator, note).run(keeper)
    finally:
        stop_all(children.values())


class _Watch:
    """Tells what happens to a cluster, and invites again whenever an invitation was used."""

    def __init__(self, client: Client, coordinator: Coordinator, note: WaitNote) -> None:
        self._client = client
        self._coordinator = coordinator
        self._note = note
        self._meter = LoadMeter()
        self._known: set[str] = set()

    def run(self, keeper: Keeper) -> None:
        """Look and tell until interrupted; raises when the coordinator is gone, or the worker for good."""
        status = self._client.status()
        self._note.line(f"model  {model_line(status)}")
        self._invite()
        self._tell({}, status)
        while True:
            time.sleep(LOOK_EVERY_S)
            self._coordinator.child.require_alive("coordinator")
            keeper.look(time.monotonic())
            before, status = status, self._client.status()
            self._tell(before, status)

    def _tell(self, before: Status, after: Status) -> None:
        for line in news(before, after):
            self._note.line(line)
        self._note.say(self._meter.see(after, time.monotonic()))
        joined = {worker["name"] for worker in after.get("workers", []) if worker.get("role") == "worker"}
        if joined - self._known:
            self._known |= joined
            self._invite()

    def _invite(self) -> None:
        """Print a fresh link, whole and alone on its line: it is copied from here."""
        where = ", ".join(self._coordinator.link.addresses)
        out = console()
        out.print(f"join   on another device that reaches {where} (once, for one device):")
        out.print(f"manyhands join {self._client.invite()}")
        if all(address.startswith(("127.", "[::1]", "localhost")) for address in self._coordinator.link.addresses):
            out.print("       only this machine reaches it; --host 0.0.0.0 lets the devices of your network join")


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block in order, as Ctrl-C does, but as a success."""

    class _Terminated(BaseException):
        pass

    def stop(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        return
    finally:
        signal.signal(signal.SIGTERM, before)
