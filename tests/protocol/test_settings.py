"""Settings: precedence, sources, refused values, masked secrets, and the plain front with its exit codes."""

from __future__ import annotations

import enum
import errno
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import errors, exits
from protocol.errors import ConfigInvalid
from protocol.settings import (
    Loaded,
    NumBytesText,
    describe,
    load,
    parse_bytes,
    render,
    run_main,
    setting,
)
from protocol.sizes import MAX_BYTES
from protocol.version import SOFTWARE


class Reduce(enum.StrEnum):
    STAR = "star"
    MESH = "mesh"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    join: str | None = setting(None, "the join link", secret=True)
    name: str = setting("pi", "this worker's name")
    memory: NumBytesText = setting("30%", "how much memory it may take")
    cache_limit: NumBytesText | None = setting(None, "how much disk the cache may take")
    cache_dir: Path = setting(Path("~/tiles"), "where tiles are kept")
    threads: int = setting(0, "compute threads, 0: all")
    lease_s: float = setting(3.0, "seconds of silence until lost")
    relay_only: bool = setting(False, "never listen")
    advertise: tuple[str, ...] = setting((), "addresses told to peers")
    reduce: Reduce = setting(Reduce.STAR, "shape of the sum")

    def __post_init__(self) -> None:
        if self.threads > 64 and self.relay_only:
            raise ValueError("threads above 64 need a listener")


SECRET = "s3cret-token"


def loaded(
    flags: dict[str, str | bool | None] | None = None, env: dict[str, str] | None = None, file: Path | None = None
) -> Loaded[WorkerConfig]:
    """Load with only the sources that the case needs."""
    return load(WorkerConfig, flags or {}, env or {}, file, "worker")


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    """Write a configuration file."""

    def write(text: str) -> Path:
        path = tmp_path / "manyhands.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


# ---------------------------------------------------------------- where a value comes from


def test_defaults() -> None:
    result = loaded()
    assert result.config == WorkerConfig(cache_dir=Path("~/tiles").expanduser())
    assert set(result.sources.values()) == {"default"}
    assert list(result.sources) == [one.name for one in describe(WorkerConfig)]


def test_flags_beat_environment_beats_file_beats_defaults(toml: Callable[[str], Path]) -> None:
    file = toml('[worker]\nname = "file"\nthreads = 1\nlease_s = 1\nmemory = "1GB"\n[coordinator]\nport = 5')
    env = {"MANYHANDS_NAME": "env", "MANYHANDS_THREADS": "2", "MANYHANDS_MEMORY": "", "OTHER": "x"}
    result = loaded({"name": "flag", "lease_s": None}, env, file)
    assert (result.config.name, result.config.threads, result.config.lease_s) == ("flag", 2, 1.0)
    assert result.config.memory == "1GB", "an empty variable is not set"
    assert result.sources["name"] == "flag --name"
    assert result.sources["threads"] == "env MANYHANDS_THREADS"
    assert result.sources["lease_s"] == f"file {file} [worker]"
    assert result.sources["reduce"] == "default"


KINDS: list[tuple[str, str, str, Any]] = [
    ("name", "x", '"x"', "x"),
    ("threads", "4", "4", 4),
    ("lease_s", "2.5", "2.5", 2.5),
    ("lease_s", "2", "2", 2.0),
    ("relay_only", "true", "true", True),
    ("relay_only", "Off", "false", False),
    ("relay_only", "1", '"yes"', True),
    ("cache_dir", "/a/b", '"/a/b"', Path("/a/b")),
    ("memory", "900MB", '"900MB"', "900MB"),
    ("memory", "1000000", "1000000", "1000000"),
    ("memory", "30%", '"30%"', "30%"),
    ("cache_limit", "1.5GiB", '"1.5GiB"', "1.5GiB"),
    ("advertise", "a:1, b:2,", '["a:1", "b:2"]', ("a:1", "b:2")),
    ("reduce", "mesh", '"mesh"', Reduce.MESH),
    ("join", SECRET, f'"{SECRET}"', SECRET),
]


@pytest.mark.parametrize(("name", "text", "in_toml", "value"), KINDS)
def test_each_kind_from_each_source(
    toml: Callable[[str], Path], name: str, text: str, in_toml: str, value: object
) -> None:
    for result in (
        loaded({name: text}),
        loaded(env={f"MANYHANDS_{name.upper()}": text}),
        loaded(file=toml(f"[worker]\n{name} = {in_toml}")),
    ):
        assert getattr(result.config, name) == value
        assert type(getattr(result.config, name)) is type(value)


def test_a_tilde_is_the_home_folder() -> None:
    assert loaded({"cache_dir": "~/x"}).config.cache_dir == Path.home() / "x"


# ---------------------------------------------------------------- what is refused

BAD: list[tuple[str, str, str, str]] = [
    ("threads", "four", '"four"', "whole number"),
    ("threads", "1.5", "1.5", "whole number"),
    ("threads", "true", "true", "whole number"),
    ("lease_s", "soon", '"soon"', "number"),
    ("lease_s", "nan", "nan", "number"),
    ("lease_s", "inf", "true", "number"),
    ("relay_only", "maybe", "2", "yes/no"),
    ("cache_dir", "a\0b", "3", "path"),
    ("memory", "lots", '"lots"', "size"),
    ("memory", "5XB", '"5XB"', "size"),
    ("memory", "101%", '"101%"', "size"),
    ("memory", "-5GB", "-5", "size"),
    ("reduce", "ring", '"ring"', "choice (star, mesh)"),
]


@pytest.mark.parametrize(("name", "text", "in_toml", "kind"), BAD)
def test_a_bad_value_is_named_with_its_source(
    toml: Callable[[str], Path], name: str, text: str, in_toml: str, kind: str
) -> None:
    file = toml(f"[worker]\n{name} = {in_toml}")
    for where, build in (
        (f"flag --{name.replace('_', '-')}", lambda: loaded({name: text})),
        (f"env MANYHANDS_{name.upper()}", lambda: loaded(env={f"MANYHANDS_{name.upper()}": text})),
        (f"file {file} [worker]", lambda: loaded(file=file)),
    ):
        with pytest.raises(ConfigInvalid, match=rf"^{name} = .* \({re.escape(where)}\) is not a {re.escape(kind)}"):
            build()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[worker]\nnmae = "x"', r"'nmae' \(file .*\) is no setting; there are: join, name, memory"),
        ("[wroker]\nname = 1", r"'wroker' \(file .*\) is no section; there are: coordinator, worker"),
        ('name = "x"', r"'name' \(file .*\) is no section"),
        ("worker = 5", r"'worker' \(file .*\) is no section"),
        ("[worker\n", r"is not TOML: .*line 1"),
        ("[worker]\nadvertise = [1]", "advertise = "),
        ('[worker]\nname = ["a"]', "name = "),
        ("[worker]\ncache_dir = ''", "cache_dir = "),
    ],
)
def test_a_file_with_a_mistake_is_refused(toml: Callable[[str], Path], text: str, words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        loaded(file=toml(text))


def test_an_unknown_flag_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"'nmae' \(flag --nmae\) is no setting"):
        loaded({"nmae": "x"})


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe")
    large = tmp_path / "large"
    large.write_bytes(b"#" * 1_000_001)
    for path, words in (
        (tmp_path / "none", "No such file"),
        (tmp_path, "irectory|denied"),
        (binary, "not TOML"),
        (large, "larger than"),
    ):
        with pytest.raises(ConfigInvalid, match=words):
            loaded(file=path)


def test_a_rule_between_settings_names_the_sources() -> None:
    with pytest.raises(ConfigInvalid, match=r"env MANYHANDS_RELAY_ONLY, flag --threads: threads above 64 need"):
        loaded({"threads": "65"}, {"MANYHANDS_RELAY_ONLY": "yes"})


@settings(max_examples=100, deadline=None)
@given(st.sampled_from([one.name for one in describe(WorkerConfig)]), st.text(max_size=20))
def test_any_text_is_a_value_or_config_invalid(name: str, text: str) -> None:
    try:
        result = loaded({name: text})
    except ConfigInvalid as error:
        assert name in error.message
    else:
        tomllib.loads(render(result))


def test_a_home_that_is_not_known_is_told() -> None:
    name = next(one.name for one in describe(WorkerConfig) if one.kind == "path")
    with pytest.raises(ConfigInvalid, match="home folder"):
        loaded({name: "~nobody-of-this-name/x"})


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("900MB", 900_000_000),
        ("900 mb", 900_000_000),
        ("1.5GiB", 1_610_612_736),
        ("2G", 2 * 2**30),
        ("1k", 1024),
        ("3TiB", 3 * 2**40),
        ("30%", 300),
        ("0.5%", 5),
        ("100%", 1000),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text, whole=1000) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "1,5GB", "1 0GB", "5ZB", "1GiBB", "101%", "1.2.3", "9" * 18, "٣"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigInvalid, match="size"):
        parse_bytes(text, whole=1000)


def test_a_percentage_needs_a_whole() -> None:
    with pytest.raises(ConfigInvalid, match="a percentage makes no sense here"):
        parse_bytes("30%")


@given(st.integers(0, MAX_BYTES))
def test_plain_bytes_are_exact(num_bytes: int) -> None:
    assert parse_bytes(str(num_bytes)) == num_bytes


# ---------------------------------------------------------------- showing


def test_what_is_shown_can_be_read_again_and_hides_secrets(toml: Callable[[str], Path]) -> None:
    before = loaded({"join": SECRET, "name": 'a "b"\\\n\x7f', "advertise": "a,b", "relay_only": True, "threads": "2"})
    text = render(before)
    assert SECRET not in text
    assert 'join = "********"  # flag --join' in text
    assert 'memory = "30%"  # default' in text
    assert "# cache_limit is not set  # default" in text
    assert "# seconds of silence until lost" in text
    after = loaded(file=toml(text))
    assert after.config == loaded({"join": "********"}, {}, toml(text)).config
    assert after.config.name == before.config.name


def test_a_bad_secret_is_not_shown() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        pin: int = setting(0, "a secret number", secret=True)

    with pytest.raises(ConfigInvalid) as caught:
        load(Config, {"pin": SECRET}, {}, None, "worker")
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_every_setting_is_described() -> None:
    one = describe(WorkerConfig)[3]
    assert one[:4] == ("cache_limit", "--cache-limit", "MANYHANDS_CACHE_LIMIT", "size")
    assert (one.default, one.help, one.secret) == (None, "how much disk the cache may take", False)


def test_a_field_of_an_impossible_kind_is_a_bug() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        wrong: complex = setting(0, "x")

    with pytest.raises(TypeError, match="can't be of type"):
        describe(Config)


# ---------------------------------------------------------------- the plain front


def run_with(argv: list[str], run: Callable[[WorkerConfig], int] = lambda config: 0) -> int:
    """The front with an empty environment."""
    return run_main(WorkerConfig, "worker", argv, run, environ={})


def test_the_front_hands_the_configuration_over() -> None:
    seen: list[WorkerConfig] = []

    def run(config: WorkerConfig) -> int:
        seen.append(config)
        return 7

    assert run_with(["--name", "x", "--relay-only", "--cache-limit=5GB"], run) == 7
    assert (seen[0].name, seen[0].relay_only, seen[0].cache_limit) == ("x", True, "5GB")


def test_print_config_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(["--print-config", "--join", SECRET], lambda config: pytest.fail("ran")) == 0
    out = capsys.readouterr().out
    assert SECRET not in out
    assert set(tomllib.loads(out)) == {"worker", "logging"}


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--threads", "x"], 78, "error: threads = 'x' (flag --threads) is not a whole number"),
        (["--config", "/nowhere.toml"], 78, "error: file /nowhere.toml: No such file"),
        (["--log-level", "loud"], 78, "log_level 'loud' is none of debug"),
        (["--nmae", "x"], 64, "error: unrecognized arguments: --nmae x"),
        (["--thr", "4"], 64, "unrecognized arguments"),
        (["extra"], 64, "unrecognized arguments"),
    ],
)
def test_a_wrong_call_ends_with_its_code(
    capsys: pytest.CaptureFixture[str], argv: list[str], code: int, words: str
) -> None:
    assert run_with(argv) == code
    told = capsys.readouterr().err
    assert words in told
    assert "remedy: " in told
    assert "Traceback" not in told


@pytest.mark.parametrize("argv", [["--help"], ["--version"]])
def test_help_and_version(capsys: pytest.CaptureFixture[str], argv: list[str]) -> None:
    assert run_with(argv) == 0
    out = capsys.readouterr().out
    assert SOFTWARE in out or "MANYHANDS_CACHE_LIMIT; default not set" in " ".join(out.split())


ENDS: list[tuple[BaseException, int]] = [
    (errors.LinkInvalid("x"), 78),
    (errors.BudgetTooSmall("x"), 78),
    (errors.CheckpointInvalid("x"), 65),
    (errors.StorageFull("x"), 73),
    (errors.InvariantBroken("x"), 70),
    (errors.FrameMalformed("x"), 76),
    (errors.AccessRefused("x"), 77),
    (errors.CoordinatorLost("x"), 69),
    (errors.Overloaded("x"), 75),
    (errors.DeadlineExceeded("x"), 75),
    (errors.ManyhandsError("x"), 70),
    (OSError(errno.ENOSPC, "No space left"), 73),
    (OSError(errno.EIO, "Input/output error"), 74),
    (PermissionError(errno.EACCES, "Permission denied"), 77),
    (KeyboardInterrupt(), 130),
]


@pytest.mark.parametrize(("error", "code"), ENDS, ids=lambda value: type(value).__name__)
def test_each_failure_ends_with_its_code_and_without_a_traceback(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    def run(config: WorkerConfig) -> int:
        raise error

    assert run_with([], run) == exits.exit_code(error) == code
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "Traceback" not in told


def test_a_bug_is_told_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def run(config: WorkerConfig) -> int:
        raise ZeroDivisionError("one by none")

    assert run_with([], run) == exits.SOFTWARE
    told = capsys.readouterr().err
    assert "Traceback" in told
    assert told.endswith("error: one by none\n")
