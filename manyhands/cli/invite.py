"""`manyhands invite`: print a join link for one more worker.

Knows nothing of what is in the link.
"""

from __future__ import annotations

from typing import Any

import click

from manyhands.cli.flags import client_settings, settings_options
from manyhands.cli.status import SAMPLING
from manyhands.config import ClientConfig
from manyhands.sync import Client


def command() -> click.Command:
    """Return the command."""
    trusted = "The worker may be the head, which sees the text of every request."
    parameters: list[click.Parameter] = [
        *settings_options(ClientConfig, without=SAMPLING),
        click.Option(["--trusted"], is_flag=True, help=trusted),
    ]
    text = "Print a join link. It lets one worker in, once; `manyhands join LINK` uses it."
    return click.Command("invite", params=parameters, callback=run, help=text)


def run(trusted: bool, **given: Any) -> None:
    """Print the link; raises what the client raises."""
    config = client_settings(given)
    if config is None:
        return
    with Client(config.link or None, config.timeout_s) as client:
        click.echo(client.invite(trusted))
