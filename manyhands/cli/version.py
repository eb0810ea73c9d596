"""`manyhands version`.

Knows nothing but the release.
"""

from __future__ import annotations

import click

from protocol.version import SOFTWARE


def command() -> click.Command:
    """Return the command."""
    return click.Command("version", callback=run, help="Print the release.")


def run() -> None:
    """Print the release."""
    click.echo(SOFTWARE)
