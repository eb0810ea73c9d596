"""`manyhands ask`: continue a text and stream the answer to standard output.

Knows nothing of sockets.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from manyhands.cli.flags import client_settings, settings_options
from manyhands.cli.follow import follow, json_text, legs_text, provenance_option, stats_text
from manyhands.cli.screen import WaitNote, console
from manyhands.cli.status import show_memory
from manyhands.client import AsyncClient
from manyhands.config import ClientConfig
from protocol.errors import RequestInvalid


def command() -> click.Command:
    """Return the command."""
    parameters: list[click.Parameter] = [
        click.Argument(["prompt"], required=False),
        *settings_options(ClientConfig),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object when the answer is complete."),
        click.Option(["--stats"], is_flag=True, help="Say at the end how long it took (on standard error)."),
        provenance_option(),
    ]
    text = "Continue PROMPT (or standard input, when PROMPT is - or absent) and print what comes, as it comes."
    return click.Command("ask", params=parameters, callback=run, help=text)


def run(prompt: str | None, as_json: bool, stats: bool, provenance: bool, **given: Any) -> None:
    """Ask and print; raises what the client raises."""
    config = client_settings(given)
    if config is None:
        return
    config.options()
    asyncio.run(_ask(config, _prompt(prompt), as_json=as_json, stats=stats, provenance=provenance))


async def _ask(config: ClientConfig, prompt: str, *, as_json: bool, stats: bool, provenance: bool) -> None:
    async with AsyncClient(config.link or None, config.timeout_s, config.reconnect_s) as client:
        stream = await client.generate(prompt, stream=True, **config.options())
        with WaitNote() as note:
            answer = await follow(stream, _drop if as_json else _write, note.say)
        click.echo(json_text(answer) if as_json else "")
        out = console()
        if provenance:
            out.print(legs_text(answer.legs))
        if stats:
            out.print(stats_text(answer))
            show_memory(out, await client.status())


def _prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("a PROMPT is needed, as an argument or on standard input")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RequestInvalid(f"standard input is no text: {error}") from error


def _drop(text: str) -> None:
    """JSON is printed when it is whole."""


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
