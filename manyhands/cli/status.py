"""`manyhands status`: what the cluster looks like, for people or as JSON.

Knows nothing of sockets.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import click
from rich.console import Console

from manyhands.cli.flags import client_settings, settings_options
from manyhands.cli.screen import console, table
from manyhands.cli.tables import (
    MEMORY_HEADINGS,
    STREAM_HEADINGS,
    WORK_HEADINGS,
    WORKER_HEADINGS,
    event_rows,
    memory_rows,
    model_line,
    plan_line,
    state_rows,
    stream_rows,
    work_rows,
    worker_rows,
)
from manyhands.config import ClientConfig
from manyhands.connection import Status
from manyhands.sync import Client

CLIENT_ONLY = ("link", "timeout_s")
SAMPLING = tuple(name for name in ClientConfig.__dataclass_fields__ if name not in CLIENT_ONLY)


def command() -> click.Command:
    """Return the command."""
    parameters: list[click.Parameter] = [
        *settings_options(ClientConfig, without=SAMPLING),
        click.Option(["--json", "as_json"], is_flag=True, help="Print the whole status as JSON."),
    ]
    return click.Command("status", params=parameters, callback=run, help="Show model, plan and workers of the cluster.")


def run(as_json: bool, **given: Any) -> None:
    """Print the status; raises what the client raises."""
    config = client_settings(given)
    if config is None:
        return
    with Client(config.link or None, config.timeout_s) as client:
        status = client.status()
    if as_json:
        click.echo(json.dumps(status, ensure_ascii=False, indent=2))
        return
    show(status)


def show(status: Status) -> None:
    """Print the status for people."""
    out = console(sys.stdout)
    sessions, totals = status.get("sessions", {}), status.get("totals", {})
    out.print(f"cluster   {status.get('cluster', '?')} ({status.get('version', '?')})")
    out.print(f"model     {model_line(status)}")
    out.print(f"phase     {status.get('phase', '?')}" + (f": {status['detail']}" if status.get("detail") else ""))
    out.print(f"plan      {plan_line(status)}")
    out.print(f"sessions  {sessions.get('running', 0)} running, {sessions.get('waiting', 0)} waiting")
    out.print(f"served    {totals.get('requests', 0)} requests, {totals.get('completion_tokens', 0)} tokens")
    if kv := status.get("kv"):
        out.print(f"memory    {kv['used']} of {kv['positions']} positions for keys and values are taken")
    if status.get("last_error"):
        out.print(f"trouble   {status['last_error']}")
    out.print()
    rows = worker_rows(status)
    if not rows:
        out.print("no workers: `manyhands join LINK` on a device brings one")
        return
    out.print(table(WORKER_HEADINGS, rows))
    for name, state in state_rows(status):
        out.print(f"{name}: {state}")
    show_memory(out, status)
    if events := event_rows(status):
        out.print()
        out.print(table(("when", "what happened"), events))


def show_memory(out: Console, status: Status) -> None:
    """Print what the workers' memory and time go to and, when weights flow from a disk, how that keeps up."""
    for headings, rows in (
        (MEMORY_HEADINGS, memory_rows(status)),
        (WORK_HEADINGS, work_rows(status)),
        (STREAM_HEADINGS, stream_rows(status)),
    ):
        if rows:
            out.print()
            out.print(table(headings, rows))
