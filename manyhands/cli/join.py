"""`manyhands join`: lend this machine to a cluster. The worker runs in this process.

Knows nothing of what a worker does.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import click

from manyhands.cli.flags import Configuration, print_settings, settings_options
from protocol.errors import ConfigInvalid
from protocol.logs import setup_logging
from protocol.process import end_quietly_when_told
from protocol.settings import LogSettings


def command() -> click.Command:
    """Return the command."""
    from worker.config import WorkerConfig

    parameters: list[click.Parameter] = [
        click.Argument(["given_link"], metavar="[LINK]", required=False),
        *settings_options(WorkerConfig, LogSettings, without=("exit_on_stdin_close",)),
    ]
    text = (
        "Lend this machine to the cluster of LINK, which `manyhands up` or `manyhands invite` printed. "
        "A machine that was let in once needs no fresh link to come back. Ctrl-C takes it back."
    )
    return click.Command("join", params=parameters, callback=run, help=text)


def run(given_link: str | None, **given: Any) -> int:
    """Run the worker until it ends and return its exit code; raises ConfigInvalid without torch."""
    from worker.config import WorkerConfig

    configuration = Configuration(given)
    worker = configuration.load(WorkerConfig, "worker", link=given_link)
    logs = configuration.load(LogSettings, "logging")
    if configuration.wants_print:
        print_settings(worker, logs)
        return 0
    require_torch()
    setup_logging(logs.config.log_level, logs.config.log_json)
    end_quietly_when_told()
    from worker.daemon import run as work  # torch is loaded only now

    return work(worker.config)


def require_torch() -> None:
    """Raise ConfigInvalid when this machine can't compute for lack of torch."""
    if importlib.util.find_spec("torch") is None:
        raise ConfigInvalid("a worker needs torch, which is not installed", remedy="pip install 'manyhands[worker]'")
