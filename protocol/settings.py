"""Configuration: one frozen dataclass a process, built once from defaults < TOML file < environment < flags.

Knows nothing of any process's settings; it reads a dataclass whose fields are made by `setting`, and can say of every
value where it came from.

Kinds of a field: str, int, float, bool, Path, `NumBytesText`, StrEnum, any of these `| None`, and tuple[str, ...]
(comma separated). The field `chunk_bytes` is the key `chunk_bytes`, the flag `--chunk-bytes` and the variable
`MANYHANDS_CHUNK_BYTES`; an empty variable counts as not set.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, NoReturn, TypeVar

from protocol import exits
from protocol.errors import ConfigInvalid, ManyhandsError
from protocol.logs import LEVELS, setup_logging
from protocol.setting_kinds import Kind, NumBytesText, kind_of
from protocol.sizes import parse_bytes
from protocol.version import SOFTWARE

__all__ = ["Loaded", "NumBytesText", "Setting", "describe", "load", "parse_bytes", "render", "run_main", "setting"]

_log = logging.getLogger(__name__)
SECTIONS: Final = ("coordinator", "worker", "client", "logging")
ENV_PREFIX: Final = "MANYHANDS_"
MASK: Final = "********"
MAX_FILE_BYTES: Final = 1_000_000
C = TypeVar("C")


class Setting(NamedTuple):
    """One setting in all its names. `kind` is for people: "text", "number", "yes/no", "size", ..."""

    name: str
    flag: str
    env: str
    kind: str
    default: Any
    help: str
    secret: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded(Generic[C]):
    """A configuration and, for each of its fields, where the value came from."""

    config: C
    sources: dict[str, str]
    section: str


def setting(default: Any, help: str, *, secret: bool = False) -> Any:
    """Declare a field of a configuration dataclass: its default, its help, and whether its value must never show."""
    return dataclasses.field(default=default, metadata={"help": help, "secret": secret})


def describe(cls: type[Any]) -> list[Setting]:
    """Return every setting of a configuration dataclass, in order."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return [
        Setting(
            name=field.name,
            flag="--" + field.name.replace("_", "-"),
            env=ENV_PREFIX + field.name.upper(),
            kind=kind_of(hints[field.name]).words,
            default=field.default,
            help=field.metadata["help"],
            secret=field.metadata["secret"],
        )
        for field in dataclasses.fields(cls)
    ]


def load(
    cls: type[C],
    flags: Mapping[str, str | bool | None],
    environ: Mapping[str, str],
    file: Path | None,
    section: str,
) -> Loaded[C]:
    """Build the configuration `cls` from its defaults, table `[section]` of a TOML file, environment and flags.

    `flags` are keyed by field name; None means not given. Raises ConfigInvalid naming key, value and source for an
    unknown key or a bad value, and for whatever the dataclass itself refuses with ValueError.
    """
    settings = {one.name: one for one in describe(cls)}
    hints = typing.get_type_hints(cls, include_extras=True)
    sources: dict[str, str] = dict.fromkeys(settings, "default")
    values: dict[str, Any] = {
        one.name: one.default.expanduser() for one in settings.values() if isinstance(one.default, Path)
    }
    for name, raw, source in _given(settings, flags, environ, file, section):
        if name not in settings:
            raise ConfigInvalid(f"{name!r:.80} ({source}) is no setting; there are: {', '.join(settings)}")
        values[name] = _convert(settings[name], kind_of(hints[name]), raw, source)
        sources[name] = source
    try:
        return Loaded(config=cls(**values), sources=sources, section=section)
    except ValueError as error:  # an invariant between settings
        where = ", ".join(sorted({source for source in sources.values() if source != "default"}))
        raise ConfigInvalid(f"settings from {where or 'defaults'}: {error}") from error


Given = tuple[str, Any, str]  # name, raw value, source


def _given(
    settings: Mapping[str, Setting],
    flags: Mapping[str, str | bool | None],
    environ: Mapping[str, str],
    file: Path | None,
    section: str,
) -> list[Given]:
    """Return what was given anywhere, weakest source first."""
    found: list[Given] = []
    if file is not None:
        found += [(name, raw, f"file {file} [{section}]") for name, raw in _table(file, section).items()]
    found += [(one.name, environ[one.env], f"env {one.env}") for one in settings.values() if environ.get(one.env)]
    for name, raw in flags.items():
        if raw is not None:
            found.append((name, raw, f"flag --{name.replace('_', '-')}"))
    return found


def _table(file: Path, section: str) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES:
            raise ConfigInvalid(f"file {file} is larger than {MAX_FILE_BYTES} bytes")
        document = tomllib.loads(content.decode("utf-8"))
    except OSError as error:
        raise ConfigInvalid(f"file {file}: {error.strerror or error}", remedy="check --config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigInvalid(f"file {file} is not TOML: {error}", remedy="check --config") from error
    for key, value in document.items():
        if key not in SECTIONS or not isinstance(value, dict):
            raise ConfigInvalid(f"{key!r:.80} (file {file}) is no section; there are: {', '.join(SECTIONS)}")
    return typing.cast(dict[str, Any], document.get(section, {}))


def _convert(one: Setting, kind: Kind, raw: Any, source: str) -> Any:
    try:
        return kind.read(raw)
    except (ValueError, TypeError, OverflowError, ConfigInvalid) as error:
        shown = MASK if one.secret else f"{raw!r:.80}"
        why = "" if one.secret else f": {error.message if isinstance(error, ConfigInvalid) else error}"
        raise ConfigInvalid(f"{one.name} = {shown} ({source}) is not a {one.kind}{why}") from None


# ---------------------------------------------------------------- showing


def render(loaded: Loaded[Any]) -> str:
    """Return the configuration as a TOML table, each value with its help and source as comments, secrets masked."""
    lines = [f"[{loaded.section}]"]
    for one in describe(type(loaded.config)):
        value = getattr(loaded.config, one.name)
        lines.append(f"# {one.help}")
        source = loaded.sources[one.name]
        if value is None:
            lines.append(f"# {one.name} is not set  # {source}")
        else:
            shown = json.dumps(MASK) if one.secret else _toml(value)
            lines.append(f"{one.name} = {shown}  # {source}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML strings escape as JSON does


# ---------------------------------------------------------------- the plain front of `python -m worker`


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """How every process logs: table `[logging]` of the file."""

    log_level: str = setting("info", f"least severity that is logged: {', '.join(LEVELS)}")
    log_json: bool = setting(False, "log one JSON object a line")

    def __post_init__(self) -> None:
        if self.log_level not in LEVELS:
            raise ValueError(f"log_level {self.log_level!r:.40} is none of {', '.join(LEVELS)}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}\nremedy: see {self.prog} --help", file=sys.stderr)
        raise SystemExit(exits.USAGE)


def run_main(
    cls: type[C],
    section: str,
    argv: Sequence[str],
    run: Callable[[C], int],
    environ: Mapping[str, str] | None = None,
) -> int:
    """Load `cls` from `argv` (without the program's name), file and environment, and return what `run` returns.

    Prints "error: ..." and the remedy instead of a traceback for every ManyhandsError and OSError, and returns the
    exit code that `protocol.exits` gives them.
    """
    kinds: list[type[Any]] = [cls, LogSettings]
    try:
        given = vars(_parser(kinds, section).parse_args(argv))
    except SystemExit as end:  # --help, --version, or a wrong flag, already told
        return int(end.code or 0)
    variables = os.environ if environ is None else environ
    try:
        file = Path(given["config"]) if given["config"] else None
        loaded = load(cls, _only(cls, given), variables, file, section)
        logging_loaded = load(LogSettings, _only(LogSettings, given), variables, file, "logging")
        if given["print_config"]:
            print(render(loaded) + "\n" + render(logging_loaded), end="")
            return exits.OK
        setup_logging(logging_loaded.config.log_level, logging_loaded.config.log_json)
        return run(loaded.config)
    except (ManyhandsError, OSError, KeyboardInterrupt) as error:
        _log.debug("stopped by", exc_info=True)
        exits.tell(error)
        return exits.exit_code(error)
    except Exception as error:  # noqa: BLE001  the edge of the process: a bug, told with its traceback
        _log.critical("stopped by a bug", exc_info=True)
        exits.tell(error)
        return exits.exit_code(error)


def _only(cls: type[Any], given: Mapping[str, Any]) -> dict[str, str | bool | None]:
    return {one.name: given[one.name] for one in describe(cls)}


def _parser(kinds: Sequence[type[Any]], section: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"python -m {section}", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=SOFTWARE)
    parser.add_argument("--config", metavar="FILE", help="TOML file with a table for each process")
    parser.add_argument("--print-config", action="store_true", help="show every setting, its value and source; stop")
    for one in (one for kind in kinds for one in describe(kind)):
        default = "not set" if one.default in (None, ()) else _toml(one.default)
        text = f"{one.help} ({one.env}; default {default})".replace("%", "%%")
        if one.kind == "yes/no":
            parser.add_argument(one.flag, dest=one.name, action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(one.flag, dest=one.name, metavar=one.kind.upper().replace(" ", "-"), help=text)
    return parser
