"""Flags from configuration dataclasses: each setting is a flag, a MANYHANDS_ variable and a key of the file.

Knows nothing of any command.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from manyhands.config import ClientConfig
from manyhands.home import config_file
from protocol.settings import Loaded, describe, load, render

C = TypeVar("C")
Given = Mapping[str, Any]


def settings_options(*kinds: type[Any], without: Collection[str] = ()) -> list[click.Parameter]:
    """Return a flag for every setting of these dataclasses, and --config and --print-config."""
    options = [_option(cls, name) for cls in kinds for name in _names(cls) if name not in without]
    where = "TOML file (default: config.toml in the user's configuration folder, where there is one)."
    return [
        *options,
        click.Option(["--config"], type=click.Path(path_type=Path), help=where),
        click.Option(["--print-config"], is_flag=True, help="Show every setting, its value and its source; stop."),
    ]


def _names(cls: type[Any]) -> list[str]:
    return [one.name for one in describe(cls)]


def _option(cls: type[Any], name: str) -> click.Option:
    one = next(one for one in describe(cls) if one.name == name)
    text = f"{one.help[:1].upper()}{one.help[1:]}."
    if one.kind == "yes/no":
        return click.Option([f"{one.flag}/--no-{one.flag.removeprefix('--')}"], default=None, help=text)
    if one.default not in (None, (), ""):
        text += f"  [default: {one.default!s}]"
    metavar = one.kind.split(" (")[0].upper().replace(" ", "-")
    several = one.kind == "list of texts"
    return click.Option([one.flag], metavar="TEXT" if several else metavar, multiple=several, default=None, help=text)


class Configuration:
    """What a command was given: flags, the environment, the file."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._environ = dict(os.environ)
        chosen: Path | None = given.get("config")
        usual = config_file(self._environ)
        self._file = chosen or (usual if usual.is_file() else None)
        self.wants_print = bool(given.get("print_config"))

    def load(self, cls: type[C], section: str, *, uses_file: bool = True, **flags: Any) -> Loaded[C]:
        """Build the settings of `cls`; `flags` override what was given. Raises ConfigInvalid."""
        own = {name: self._flag(name) for name in _names(cls)}
        own |= {name: value for name, value in flags.items() if value is not None}
        return load(cls, cast(Mapping[str, str | bool | None], own), self._environ, self._file_for(uses_file), section)

    def load_file_only(self, cls: type[C], section: str, **flags: Any) -> Loaded[C]:
        """Build settings of `cls` from the file and these flags alone: variables and flags are meant for others."""
        own = {name: value for name, value in flags.items() if value is not None}
        return load(cls, own, {}, self._file, section)

    def _file_for(self, uses_file: bool) -> Path | None:
        return self._file if uses_file else None

    def _flag(self, name: str) -> Any:
        value = self._given.get(name)
        if isinstance(value, tuple):
            return list(value) or None
        return value


def client_settings(given: Given) -> ClientConfig | None:
    """Return a client's settings, or None when they were only to be shown, which is done. Raises ConfigInvalid."""
    configuration = Configuration(given)
    loaded = configuration.load(ClientConfig, "client")
    if configuration.wants_print:
        print_settings(loaded)
        return None
    return loaded.config


def print_settings(*loaded: Loaded[Any]) -> None:
    """Print the effective settings as TOML, with the source of each; secrets are masked."""
    click.echo("\n".join(render(one) for one in loaded), nl=False)


def as_texts(loaded: Loaded[Any]) -> dict[str, str]:
    """Return what is not default as texts, for the environment of a child."""
    names = [name for name, source in loaded.sources.items() if source != "default"]
    return {name: _text(value) for name in names if (value := getattr(loaded.config, name)) is not None}


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return ",".join(value) if isinstance(value, tuple) else str(value)
