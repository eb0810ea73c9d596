"""Typed fields from plain values: bounds written as annotations, checked while a dataclass is built from msgpack.

Knows nothing of messages or sockets; it turns `list` into a frozen dataclass and back, or says which field is wrong.

A dataclass travels as the array of its fields in order. Fields may only be added at the end and with a default:
a shorter array takes the defaults, surplus values of a newer peer are ignored.

Headers are built and checked between any two allreduces, so each class is compiled once into closures, and the path of
a refused field ("Load.plan.stages[1].hub") is put together on the way up, only when something was refused.
"""

from __future__ import annotations

import dataclasses
import enum
import operator
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from protocol.errors import FrameMalformed

MAX_ITEMS = 65_536


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number (inclusive), of a string's or byte string's length, or of a tuple's number of items."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Spelled:
    """The spelling of a string, as a whole."""

    pattern: re.Pattern[str]


Name = Annotated[str, Within(1, 64)]
Text = Annotated[str, Within(0, 4096)]
Digest = Annotated[bytes, Within(32, 32)]
PublicKey = Annotated[bytes, Within(40, 40)]
Count = Annotated[int, Within(0, 2**31 - 1)]
NumBytes = Annotated[int, Within(0, 2**53)]
Epoch = Annotated[int, Within(0, 2**53)]
Seconds = Annotated[float, Within(0.0, 1e9)]

T = TypeVar("T")
Encode = Callable[[Any], Any]
Decode = Callable[[Any], Any]


class _Refused(Exception):
    """A value breaks its field's type or bound; grows its path on the way up, never leaves this module."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = ""

    def inside(self, step: str) -> _Refused:
        self.path = step + self.path
        return self


def pack(value: Any) -> Any:
    """Turn a dataclass (nested, with tuples and enums) into plain sequences that msgpack can carry.

    Nothing is checked: what we send is ours, and the other side checks it.
    """
    return _dataclass_encoder(value.__class__)(value)


def unpack(kind: type[T], value: Any) -> T:
    """Build `kind` from plain lists; raises FrameMalformed naming the field, its value and its bound."""
    try:
        return typing.cast(T, _decoder(typing.cast(Any, kind))(value))
    except _Refused as refused:
        raise FrameMalformed(f"{kind.__name__}{refused.path}: {refused.reason}") from refused.__cause__


# ---------------------------------------------------------------- to plain values


@cache
def _dataclass_encoder(kind: Any) -> Encode:
    """One C call fetches all fields; only nested ones cost a Python call more."""
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind)]
    nested = [(index, encode) for index, name in enumerate(names) if (encode := _encoder(hints[name])) is not None]
    if len(names) > 1 and not nested:
        return operator.attrgetter(*names)

    def encode_fields(value: Any) -> list[Any]:
        values = [getattr(value, name) for name in names]
        for index, encode in nested:
            values[index] = encode(values[index])
        return values

    return encode_fields


@cache
def _encoder(annotation: Any) -> Encode | None:
    """Return how values of this annotation become plain, or None when msgpack takes them as they are."""
    annotation = _bare(annotation)
    origin = typing.get_origin(annotation)
    if origin is tuple:
        return _tuple_encoder(typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        inner = _encoder(_only_kind(annotation))
        return None if inner is None else lambda value: None if value is None else inner(value)
    if dataclasses.is_dataclass(annotation):
        return _dataclass_encoder(typing.cast(type, annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum) and not issubclass(annotation, str):
        raise TypeError(f"{annotation!r} must be a StrEnum: msgpack sends those as their text")
    return None


def _tuple_encoder(args: tuple[Any, ...]) -> Encode | None:
    if _is_variable(args):
        each = _encoder(args[0])
        return None if each is None else lambda value: [each(item) for item in value]
    encoders = [_encoder(arg) or _as_it_is for arg in args]
    return lambda value: [encode(item) for encode, item in zip(encoders, value, strict=True)]


def _as_it_is(value: Any) -> Any:
    return value


# ---------------------------------------------------------------- annotations


def _bare(annotation: Any) -> Any:
    """Take off bounds and distinct types."""
    while True:
        if typing.get_origin(annotation) is Annotated:
            annotation = typing.get_args(annotation)[0]
        elif isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        else:
            return annotation


def _only_kind(annotation: Any) -> Any:
    kinds = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"only `X | None` has a wire form, not {annotation!r}")
    return kinds[0]


def _is_variable(args: tuple[Any, ...]) -> bool:
    return len(args) == 2 and args[1] is Ellipsis


# ---------------------------------------------------------------- from plain values


@cache
def _decoder(annotation: Any) -> Decode:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        base, *notes = typing.get_args(annotation)
        decode = _decoder(base)
        for note in notes:
            if isinstance(note, Within):
                decode = _bounded(base, note)
            elif isinstance(note, Spelled):
                decode = _spelled(decode, note.pattern)
        return decode
    if isinstance(annotation, typing.NewType):
        return _decoder(annotation.__supertype__)
    if origin in (typing.Union, types.UnionType):
        inner = _decoder(_only_kind(annotation))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return _tuple(typing.get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _enum(annotation)
    if dataclasses.is_dataclass(annotation):
        return _dataclass(typing.cast(type, annotation))
    if annotation in (int, str, bytes, bool, float):
        return _plain(annotation)
    raise TypeError(f"no wire form for {annotation!r}")


def _plain(kind: type) -> Decode:
    def decode(value: Any) -> Any:
        if type(value) is kind:  # `is`: True is no number here
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise _Refused(f"expected {kind.__name__}, got {type(value).__name__}")

    return decode


def _bounded(base: Any, bound: Within) -> Decode:
    low, high = bound.low, bound.high
    if _bare(base) is int:
        return _bounded_int(low, high)
    inner = _decoder(base)
    is_number = _bare(base) is float

    def decode(value: Any) -> Any:
        result = inner(value)
        size = result if is_number else len(result)
        if low <= size <= high:  # NaN is not
            return result
        raise _Refused(f"{'value' if is_number else 'length'} {size} is outside [{low}, {high}]")

    return decode


def _spelled(inner: Decode, pattern: re.Pattern[str]) -> Decode:
    def decode(value: Any) -> Any:
        text = inner(value)
        if pattern.fullmatch(text) is None:
            raise _Refused(f"{text[:40]!r} is not spelled {pattern.pattern}")
        return text

    return decode


def _bounded_int(low: float, high: float) -> Decode:
    """Most fields of most frames."""

    def decode(value: Any) -> Any:
        if type(value) is int and low <= value <= high:
            return value
        if type(value) is not int:
            raise _Refused(f"expected int, got {type(value).__name__}")
        raise _Refused(f"value {value} is outside [{low}, {high}]")

    return decode


def _tuple(args: tuple[Any, ...]) -> Decode:
    if not _is_variable(args):
        return _fixed_tuple([_decoder(arg) for arg in args])
    each = _decoder(args[0])

    def decode(value: Any) -> Any:
        items = _require_list(value)
        if len(items) > MAX_ITEMS:
            raise _Refused(f"{len(items)} items, at most {MAX_ITEMS} are allowed")
        result: list[Any] = []
        try:
            for item in items:
                result.append(each(item))  # a loop, so that its length names the item that was refused
        except _Refused as refused:
            raise refused.inside(f"[{len(result)}]") from refused.__cause__
        return tuple(result)

    return decode


def _fixed_tuple(decoders: list[Decode]) -> Decode:
    def decode(value: Any) -> Any:
        items = _require_list(value)
        if len(items) != len(decoders):
            raise _Refused(f"{len(items)} items, not {len(decoders)}")
        result: list[Any] = []
        try:
            for one, item in zip(decoders, items, strict=True):
                result.append(one(item))
        except _Refused as refused:
            raise refused.inside(f"[{len(result)}]") from refused.__cause__
        return tuple(result)

    return decode


def _require_list(value: Any) -> list[Any] | tuple[Any, ...]:
    if type(value) is not list and type(value) is not tuple:
        raise _Refused(f"expected a list, got {type(value).__name__}")
    return value


def _enum(kind: type[enum.Enum]) -> Decode:
    by_value = {member.value: member for member in kind}

    def decode(value: Any) -> Any:
        if isinstance(value, str) and value in by_value:
            return by_value[value]
        shown = value[:40] if isinstance(value, str) else type(value).__name__
        raise _Refused(f"{shown!r} is no {kind.__name__}")

    return decode


def _dataclass(kind: type) -> Decode:
    """Values are put straight into the slots: a frozen `__init__` would cost more than all the checks together.

    `__post_init__` runs as ever, so whatever is built here keeps its class's invariants.
    """
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [(f.name, _decoder(hints[f.name]), _slot(kind, f.name), f.default) for f in dataclasses.fields(kind)]
    num_required = sum(1 for *_, default in fields if default is dataclasses.MISSING)
    new, prove = object.__new__, getattr(kind, "__post_init__", None)

    def decode(value: Any) -> Any:
        items = _require_list(value)
        if len(items) < num_required:
            raise _Refused(f"{len(items)} of {num_required} required fields")
        result: Any = new(kind)
        name = ""
        try:
            for (name, one, put, _), item in zip(fields, items):  # noqa: B007, B905  `name` for the error; any length
                put(result, one(item))
        except _Refused as refused:
            raise refused.inside(f".{name}") from refused.__cause__
        for _, _, put, default in fields[len(items) :]:
            put(result, default)
        if prove is not None:
            try:
                prove(result)
            except ValueError as error:
                raise _Refused(str(error)) from error
        return result

    return decode


def _slot(kind: type, name: str) -> Callable[[Any, Any], None]:
    slot = kind.__dict__.get(name)
    if not isinstance(slot, types.MemberDescriptorType):
        raise TypeError(f"{kind.__name__} must be a dataclass with slots=True")
    return slot.__set__
