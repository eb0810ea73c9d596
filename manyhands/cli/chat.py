"""`manyhands chat`: a conversation in the terminal; Ctrl-C stops an answer, Ctrl-D ends.

Knows nothing of chat templates: the coordinator renders the messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

import click

from manyhands.cli.flags import client_settings, settings_options
from manyhands.cli.follow import follow, legs_text, provenance_option
from manyhands.cli.screen import WaitNote, console
from manyhands.client import AsyncClient
from manyhands.config import ClientConfig
from manyhands.results import Generation
from protocol.errors import ManyhandsError
from protocol.exits import tell

PROMPT = "> "
Message = dict[str, str]


def command() -> click.Command:
    """Return the command."""
    parameters: list[click.Parameter] = [
        *settings_options(ClientConfig),
        click.Option(["--system"], help="Tell the model beforehand how to answer."),
        provenance_option(),
    ]
    text = "Talk with the model. Ctrl-C stops an answer, Ctrl-D ends; /new forgets what was said."
    return click.Command("chat", params=parameters, callback=run, help=text)


def run(system: str | None, provenance: bool, **given: Any) -> None:
    """Read lines and answer them until the end of input; raises what the client raises before the first line."""
    config = client_settings(given)
    if config is None:
        return
    config.options()
    with contextlib.suppress(ImportError):  # line editing and history, where Python was built with it
        import readline  # noqa: F401
    with asyncio.Runner() as runner:
        client = runner.run(_greet(config))
        try:
            beginning = [{"role": "system", "content": system}] if system else []
            _talk(runner, client, config, beginning, provenance=provenance)
        finally:
            runner.run(client.close())


async def _greet(config: ClientConfig) -> AsyncClient:
    return await AsyncClient(config.link or None, config.timeout_s, config.reconnect_s).__aenter__()


def _talk(
    runner: asyncio.Runner, client: AsyncClient, config: ClientConfig, beginning: list[Message], *, provenance: bool
) -> None:
    messages = list(beginning)
    while (line := _read_line()) is not None:
        if line.strip() == "/new":
            messages = list(beginning)
            continue
        if not line.strip():
            continue
        said: list[str] = []
        asked = [*messages, {"role": "user", "content": line}]
        try:
            answer = runner.run(_answer(client, config, asked, said))
            if provenance:
                console().print(legs_text(answer.legs))
        except KeyboardInterrupt:
            click.echo(" [stopped]")
        except ManyhandsError as error:  # a worker may be back for the next question
            click.echo()
            tell(error)
            continue
        messages = [*asked, {"role": "assistant", "content": "".join(said)}]


async def _answer(client: AsyncClient, config: ClientConfig, messages: list[Message], said: list[str]) -> Generation:
    def write(text: str) -> None:
        said.append(text)
        sys.stdout.write(text)
        sys.stdout.flush()

    stream = await client.chat(messages, stream=True, **config.options())
    with WaitNote() as note:
        answer = await follow(stream, write, note.say)
    click.echo()
    return answer


def _read_line() -> str | None:
    try:
        return input(PROMPT if sys.stdin.isatty() else "")
    except EOFError:
        return None
    except KeyboardInterrupt:  # an empty line, as in a shell
        click.echo()
        return ""
