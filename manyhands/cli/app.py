"""The command itself: its sub-commands, imported when one is called, and the edge where errors become words and codes.

Knows nothing of what the sub-commands do.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence

import click

from protocol import exits
from protocol.errors import ManyhandsError
from protocol.heap import restart_with_steady_heap
from protocol.version import SOFTWARE

# name: (module in this folder, one line of help). A module is imported when its command is used, so that `ask` does
# not wait for what `up` needs.
COMMANDS = {
    "up": ("up", "Serve a model: start a coordinator and a worker here, and say how others join."),
    "join": ("join", "Lend this machine to a cluster."),
    "ask": ("ask", "Continue a text."),
    "chat": ("chat", "Talk with the model."),
    "status": ("status", "Show what the cluster looks like."),
    "drain": ("drain", "Let a worker hand over and leave."),
    "invite": ("invite", "Print a join link for one more worker."),
    "demo": ("demo", "Watch a small model run on three workers on this machine."),
    "version": ("version", "Print the release."),
}
log = logging.getLogger(__name__)


class Commands(click.Group):
    """Sub-commands that are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or return None when there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"manyhands.cli.{COMMANDS[cmd_name][0]}").command()
        if not isinstance(command, click.Command):
            raise TypeError(f"{cmd_name} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(message=SOFTWARE, version=SOFTWARE)
@click.option("--debug", is_flag=True, envvar="MANYHANDS_DEBUG", help="Show tracebacks and debug logs.")
@click.pass_context
def root(ctx: click.Context, debug: bool) -> None:
    """One big model on many small devices.

    \b
    manyhands up MODEL        on the machine that has the model
    manyhands join LINK       on every other device
    manyhands ask "Once upon" from the first machine
    """
    ctx.obj = debug
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR, stream=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code (sysexits.h): errors are told in two lines, never as a traceback."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if argv is None and next((word for word in arguments if not word.startswith("-")), "") == "join":
        restart_with_steady_heap()  # the worker will run in this process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a letter gets a question mark
            stream.reconfigure(errors="replace")
    try:
        code = root.main(arguments, prog_name="manyhands", standalone_mode=False)
        return code if isinstance(code, int) else exits.OK
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx else "manyhands"
        print(f"error: {error.format_message()}\nremedy: see {command} --help", file=sys.stderr)
        return exits.USAGE
    except (click.Abort, KeyboardInterrupt):
        return exits.INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does: nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at exit
        return exits.IO
    except Exception as error:  # the edge of the process
        if log.isEnabledFor(logging.DEBUG) or not isinstance(error, ManyhandsError | OSError):
            log.critical("stopped by", exc_info=True)
        exits.tell(error)
        return exits.exit_code(error)
