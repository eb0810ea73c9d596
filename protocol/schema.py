"""Typed fields from plain values: bounds written as annotations, checked while a dataclass is built from msgpack.

Knows nothing of messages or sockets; it turns `list` into a frozen dataclass and back, or says which field is wrong.

A dataclass travels as the array of its fields in order. Fields may only be added at the end and with a default:
a shorter array takes the defaults, surplus values of a newer peer are ignored.
"""

from __future__ import annotations

import dataclasses
import enum
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


Name = Annotated[str, Within(1, 64)]
Text = Annotated[str, Within(0, 4096)]
Digest = Annotated[bytes, Within(32, 32)]
PublicKey = Annotated[bytes, Within(40, 40)]
Count = Annotated[int, Within(0, 2**31 - 1)]
NumBytes = Annotated[int, Within(0, 2**53)]
Epoch = Annotated[int, Within(0, 2**53)]
Seconds = Annotated[float, Within(0.0, 1e9)]

T = TypeVar("T")
Decode = Callable[[Any, str], Any]


def pack(value: Any) -> Any:
    """Turn a dataclass (nested, with tuples and enums) into plain lists that msgpack can carry."""
    if dataclasses.is_dataclass(value):
        return [pack(getattr(value, name)) for name in _field_names(value.__class__)]
    if isinstance(value, tuple):
        return [pack(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return value


def unpack(kind: type[T], value: Any) -> T:
    """Build `kind` from plain lists; raises FrameMalformed naming the field, its value and its bound."""
    decoder: Decode = _decoder(typing.cast(Any, kind))
    return typing.cast(T, decoder(value, kind.__name__))


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@cache
def _decoder(annotation: Any) -> Decode:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        base, *notes = typing.get_args(annotation)
        bound = next((note for note in notes if isinstance(note, Within)), None)
        return _bounded(_decoder(base), bound) if bound else _decoder(base)
    if origin in (typing.Union, types.UnionType):
        return _optional(annotation)
    if origin is tuple:
        return _tuple(typing.get_args(annotation))
    if isinstance(annotation, typing.NewType):
        return _decoder(annotation.__supertype__)
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return _enum(annotation)
    if dataclasses.is_dataclass(annotation):
        return _dataclass(typing.cast(type, annotation))
    if annotation in (int, str, bytes, bool, float):
        return _plain(annotation)
    raise TypeError(f"no wire form for {annotation!r}")


def _plain(kind: type) -> Decode:
    def decode(value: Any, where: str) -> Any:
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise FrameMalformed(f"{where}: expected {kind.__name__}, got {type(value).__name__}")
        return value

    return decode


def _bounded(inner: Decode, bound: Within) -> Decode:
    def decode(value: Any, where: str) -> Any:
        result = inner(value, where)
        size = result if isinstance(result, int | float) else len(result)
        if not bound.low <= size <= bound.high:  # also refuses NaN
            what = "value" if isinstance(result, int | float) else "length"
            raise FrameMalformed(f"{where}: {what} {size} is outside [{bound.low}, {bound.high}]")
        return result

    return decode


def _optional(annotation: Any) -> Decode:
    kinds = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"only `X | None` has a wire form, not {annotation!r}")
    inner = _decoder(kinds[0])
    return lambda value, where: None if value is None else inner(value, where)


def _tuple(args: tuple[Any, ...]) -> Decode:
    variable = len(args) == 2 and args[1] is Ellipsis
    decoders = [_decoder(args[0])] if variable else [_decoder(arg) for arg in args]

    def decode(value: Any, where: str) -> Any:
        if type(value) not in (list, tuple):
            raise FrameMalformed(f"{where}: expected a list, got {type(value).__name__}")
        if len(value) > MAX_ITEMS or (not variable and len(value) != len(decoders)):
            raise FrameMalformed(f"{where}: {len(value)} items are not allowed here")
        if variable:
            return tuple(decoders[0](item, f"{where}[{i}]") for i, item in enumerate(value))
        return tuple(one(item, f"{where}[{i}]") for i, (one, item) in enumerate(zip(decoders, value, strict=True)))

    return decode


def _enum(kind: type[enum.Enum]) -> Decode:
    by_value = {member.value: member for member in kind}

    def decode(value: Any, where: str) -> Any:
        if not isinstance(value, int | str) or value not in by_value:
            raise FrameMalformed(f"{where}: {value!r:.40} is no {kind.__name__}")
        return by_value[value]

    return decode


def _dataclass(kind: type) -> Decode:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = dataclasses.fields(kind)
    decoders = [_decoder(hints[field.name]) for field in fields]
    names = [field.name for field in fields]
    num_required = sum(1 for field in fields if field.default is dataclasses.MISSING)

    def decode(value: Any, where: str) -> Any:
        if type(value) not in (list, tuple):
            raise FrameMalformed(f"{where}: expected a list, got {type(value).__name__}")
        if len(value) < num_required:
            raise FrameMalformed(f"{where}: {len(value)} of {num_required} required fields")
        found = zip(names, decoders, value, strict=False)
        values = {name: one(item, f"{where}.{name}") for name, one, item in found}
        try:
            return kind(**values)
        except ValueError as error:  # an invariant of the dataclass itself
            raise FrameMalformed(f"{where}: {error}") from error

    return decode
