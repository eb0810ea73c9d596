"""The kinds of values a setting may have, and how each is read from TOML or from text.

Knows nothing of where a value comes from or which settings there are.
"""

from __future__ import annotations

import enum
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

from protocol.sizes import check_size


class _SizeText:
    """Marks a text that must be a size."""


NumBytesText = Annotated[str, _SizeText]
"""A size as text, e.g. "900MB", "1.5GiB" or "30%"; checked when loaded, read with `parse_bytes`."""


class Kind(NamedTuple):
    """How a field's value is read; `words` tell people what it is."""

    words: str
    read: Callable[[Any], Any]  # from TOML or from text; raises ValueError, TypeError or ConfigInvalid


def _text(raw: Any) -> str:
    if not isinstance(raw, str):
        raise TypeError("write it in quotes")
    return raw


def _whole_number(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int | str):
        raise TypeError("it must be digits only")
    return int(raw)


def _number(raw: Any) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float | str):
        raise TypeError("it must be a number")
    value = float(raw)
    if not math.isfinite(value):
        raise ValueError("it must be finite")
    return value


def _yes_no(raw: Any) -> bool:
    if isinstance(raw, bool):
        return raw
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not isinstance(raw, str) or raw.lower() not in words:
        raise ValueError("say true or false")
    return words[raw.lower()]


def _size(raw: Any) -> str:
    if isinstance(raw, int) and not isinstance(raw, bool):
        return check_size(str(raw))
    return check_size(_text(raw))


def _path(raw: Any) -> Path:
    text = _text(raw)
    if not text or "\0" in text:
        raise ValueError("it is empty or holds a NUL")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # "~somebody" whom this machine does not know
        raise ValueError(f"its home folder is not known: {error}") from error


def _texts(raw: Any) -> tuple[str, ...]:
    if isinstance(raw, list):
        return tuple(_text(item) for item in raw)
    return tuple(part.strip() for part in _text(raw).split(",") if part.strip())


_KINDS: Final[dict[Any, Kind]] = {
    str: Kind("text", _text),
    int: Kind("whole number", _whole_number),
    float: Kind("number", _number),
    bool: Kind("yes/no", _yes_no),
    Path: Kind("path", _path),
    tuple[str, ...]: Kind("list of texts", _texts),
    NumBytesText: Kind("size", _size),
}


def kind_of(annotation: Any) -> Kind:
    """Return the kind of a field with this annotation; raises TypeError when there is none (a bug)."""
    if annotation in _KINDS:
        return _KINDS[annotation]
    if isinstance(annotation, type) and issubclass(annotation, enum.StrEnum):
        return Kind(f"choice ({', '.join(annotation)})", annotation)
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        kinds = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        if len(kinds) == 1:
            return kind_of(kinds[0])
    if typing.get_origin(annotation) is Annotated:
        return kind_of(typing.get_args(annotation)[0])
    raise TypeError(f"a setting can't be of type {annotation!r}")
