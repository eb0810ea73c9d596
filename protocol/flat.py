"""A second, flat form of messages that are only numbers and choices: fixed places instead of msgpack.

Knows nothing of payloads or sockets. Headers of sums are built and checked between any two sums, in processor caches
that other processes have just filled, where every Python call costs microseconds. A message has one flat form only, so
who knows what is due need not decode what came: it builds the `header` that is due and compares bytes. What differs is
decoded, to say in what; every bound is checked then, as it is with msgpack.

    byte 0       MARK (no msgpack array begins so)
    byte 1       the message's code
    bytes 2-7    zero; with them a payload that follows is aligned
    then         8 bytes a field, unsigned, little-endian; a choice is its place in the order of definition
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import operator
import struct
import typing
from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple

from protocol.errors import FrameMalformed, InvariantBroken
from protocol.frames import Buffer
from protocol.messages import ROW_OF, Partial, Sum
from protocol.schema import Within

MARK: Final = 0xC2


class _Place(NamedTuple):
    name: str
    low: float
    high: float
    choices: tuple[enum.Enum, ...]
    put: Callable[[Any, Any], None]


class FlatForm:
    """The places of one message's fields and their bounds, compiled once from its annotations."""

    def __init__(self, kind: type) -> None:
        """Raises TypeError for a field that is neither a bounded whole number nor a choice."""
        hints = typing.get_type_hints(kind, include_extras=True)
        self._places = tuple(_place(kind, field.name, hints[field.name]) for field in dataclasses.fields(kind))
        self._choices = tuple((at, place.choices) for at, place in enumerate(self._places) if place.choices)
        self._kind = kind
        self._read = operator.attrgetter(*(place.name for place in self._places))
        self._layout = struct.Struct(f"<BB6x{len(self._places)}Q")
        self.row = ROW_OF[kind]
        self.header: Callable[..., bytes] = functools.partial(self._layout.pack, MARK, self.row.code)
        """Pack the fields, given as numbers in their order, a choice as its place (`place_of`); raises struct.error."""
        self.num_bytes = self._layout.size

    def pack(self, message: object) -> bytes:
        """Return the `num_bytes` of a message; raises InvariantBroken for a number that has no place there."""
        values = list(self._read(message))
        for at, choices in self._choices:
            values[at] = choices.index(values[at])
        try:
            return self.header(*values)
        except struct.error as error:
            raise InvariantBroken(f"{self._kind.__name__} can't be packed: {error}") from error

    def unpack(self, header: Buffer) -> Any:
        """Build the message from the first `num_bytes` of a frame that has as many; raises FrameMalformed."""
        message: Any = object.__new__(self._kind)
        for (name, low, high, choices, put), value in zip(
            self._places, self._layout.unpack_from(header)[2:], strict=True
        ):
            if not low <= value <= high:
                raise FrameMalformed(f"{self._kind.__name__}.{name}: value {value} is outside [{low}, {high}]")
            put(message, choices[value] if choices else value)
        return message


def place_of(choice: enum.Enum) -> int:
    """Return the number that stands for a choice."""
    return tuple(type(choice)).index(choice)


def epoch_of(header: Buffer) -> int:
    """Return the epoch of a header of any message here: it is the first field of all."""
    return int.from_bytes(header[8:16], "little")


def unpack(header: Buffer) -> Any:
    """Build the message from a header that begins with MARK and a code known here; raises FrameMalformed."""
    return FORM_OF_CODE[header[1]].unpack(header)


def _place(kind: type, name: str, annotation: Any) -> _Place:
    put = kind.__dict__[name].__set__
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        choices = tuple(annotation)
        return _Place(name, 0, len(choices) - 1, choices, put)
    if typing.get_origin(annotation) is Annotated:
        base, *notes = typing.get_args(annotation)
        if base is int and len(notes) == 1 and isinstance(notes[0], Within) and notes[0].low >= 0:
            return _Place(name, notes[0].low, notes[0].high, (), put)
    raise TypeError(f"{kind.__name__}.{name} has no place in a flat form")


FORMS: Final[dict[type, FlatForm]] = {kind: FlatForm(kind) for kind in (Partial, Sum)}
FORM_OF_CODE: Final = {form.row.code: form for form in FORMS.values()}
