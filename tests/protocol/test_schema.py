"""The schema: bounds, paths of refused fields, and how an older or newer array is read."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from typing import Annotated, Any, NewType

import pytest

from protocol.errors import FrameMalformed
from protocol.schema import MAX_ITEMS, Count, Spelled, Within, pack, unpack


class Colour(enum.StrEnum):
    RED = "red"
    BLUE = "blue"


class Level(enum.Enum):
    LOW = 1


Tag = NewType("Tag", Annotated[str, Within(1, 4)])


@dataclass(frozen=True, slots=True)
class Point:
    x: Count
    y: Count

    def __post_init__(self) -> None:
        if self.x > self.y:
            raise ValueError(f"x {self.x} exceeds y {self.y}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    number: Annotated[int, Within(-5, 5)]
    plain: int
    share: Annotated[float, Within(0.0, 1.0)]
    text: Annotated[str, Within(1, 3), Spelled(re.compile("[a-z]*"))]
    raw: Annotated[bytes, Within(2, 2)]
    yes: bool
    colour: Colour
    tag: Tag
    point: Point
    maybe: Point | None
    points: Annotated[tuple[Point, ...], Within(1, 3)]
    pair: tuple[int, Colour]


SAMPLE = Everything(
    number=-5,
    plain=2**60,
    share=0.5,
    text="abc",
    raw=b"ab",
    yes=True,
    colour=Colour.BLUE,
    tag=Tag("t"),
    point=Point(1, 2),
    maybe=None,
    points=(Point(0, 0), Point(3, 4)),
    pair=(7, Colour.RED),
)
PLAIN = [-5, 2**60, 0.5, "abc", b"ab", True, "blue", "t", [1, 2], None, [[0, 0], [3, 4]], [7, "red"]]


def as_lists(value: Any) -> Any:
    """Sequences as msgpack would give them back."""
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def test_every_kind_of_field_goes_both_ways() -> None:
    assert as_lists(pack(SAMPLE)) == PLAIN
    assert unpack(Everything, PLAIN) == SAMPLE
    assert type(unpack(Everything, PLAIN).colour) is Colour


def test_an_optional_value_that_is_there_goes_both_ways() -> None:
    plain = [*PLAIN[:9], [5, 6], *PLAIN[10:]]
    built = unpack(Everything, plain)
    assert built.maybe == Point(5, 6)
    assert as_lists(pack(built)) == plain


@pytest.mark.parametrize(
    ("index", "wrong", "words"),
    [
        (0, 6, "Everything.number: value 6 is outside [-5, 5]"),
        (0, True, "Everything.number: expected int, got bool"),
        (0, 1.0, "Everything.number: expected int, got float"),
        (0, None, "Everything.number: expected int, got NoneType"),
        (1, "1", "Everything.plain: expected int, got str"),
        (2, 1.5, "Everything.share: value 1.5 is outside [0.0, 1.0]"),
        (2, float("nan"), "Everything.share: value nan is outside [0.0, 1.0]"),
        (2, True, "Everything.share: expected float, got bool"),
        (3, "", "Everything.text: length 0 is outside [1, 3]"),
        (3, "abcd", "Everything.text: length 4 is outside [1, 3]"),
        (3, "aB", "Everything.text: 'aB' is not spelled [a-z]*"),
        (3, b"ab", "Everything.text: expected str, got bytes"),
        (4, b"abc", "Everything.raw: length 3 is outside [2, 2]"),
        (5, 1, "Everything.yes: expected bool, got int"),
        (6, "green", "Everything.colour: 'green' is no Colour"),
        (6, ["red"], "Everything.colour: 'list' is no Colour"),
        (7, "tagged", "Everything.tag: length 6 is outside [1, 4]"),
        (8, 5, "Everything.point: expected a list, got int"),
        (8, [1], "Everything.point: 1 of 2 required fields"),
        (8, [1, -1], "Everything.point.y: value -1 is outside [0, 2147483647]"),
        (8, [3, 2], "Everything.point: x 3 exceeds y 2"),
        (9, [3, 2], "Everything.maybe: x 3 exceeds y 2"),
        (10, [], "Everything.points: length 0 is outside [1, 3]"),
        (10, [[0, 0]] * 4, "Everything.points: length 4 is outside [1, 3]"),
        (10, [[0, 0], [0, "1"]], "Everything.points[1].y: expected int, got str"),
        (10, [[0, 0]] * (MAX_ITEMS + 1), f"Everything.points: {MAX_ITEMS + 1} items, at most {MAX_ITEMS} are allowed"),
        (11, [7], "Everything.pair: 1 items, not 2"),
        (11, [7, "green"], "Everything.pair[1]: 'green' is no Colour"),
        (11, {}, "Everything.pair: expected a list, got dict"),
    ],
)
def test_what_is_wrong_is_named(index: int, wrong: object, words: str) -> None:
    with pytest.raises(FrameMalformed) as caught:
        unpack(Everything, [*PLAIN[:index], wrong, *PLAIN[index + 1 :]])
    assert caught.value.message == words


def test_a_whole_number_is_taken_for_a_float() -> None:
    built = unpack(Everything, [*PLAIN[:2], 1, *PLAIN[3:]])
    assert built.share == 1.0
    assert type(built.share) is float


@pytest.mark.parametrize("value", [None, {}, "abc", 5])
def test_only_a_list_is_a_dataclass(value: object) -> None:
    with pytest.raises(FrameMalformed, match="Point: expected a list"):
        unpack(Point, value)


# ---------------------------------------------------------------- evolution


@dataclass(frozen=True, slots=True, kw_only=True)
class Old:
    a: int


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    a: int
    b: tuple[int, ...] = (1,)
    c: str = "c"


def test_an_older_peers_shorter_array_takes_the_defaults() -> None:
    assert unpack(New, pack(Old(a=5))) == New(a=5)
    assert unpack(New, [5, [2]]) == New(a=5, b=(2,))


def test_a_newer_peers_surplus_is_ignored() -> None:
    assert unpack(Old, list(pack(New(a=5)))) == Old(a=5)


def test_a_required_field_is_never_made_up() -> None:
    with pytest.raises(FrameMalformed, match="New: 0 of 1 required fields"):
        unpack(New, [])


def test_defaults_are_held_to_the_invariants_too() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Pair:
        low: int
        high: int = 10

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("out of order")

    with pytest.raises(FrameMalformed, match="Pair: out of order"):
        unpack(Pair, [11])


# ---------------------------------------------------------------- what has no wire form is a bug, told at once


@dataclass(frozen=True, slots=True)
class HasDict:
    values: dict[str, int]


@dataclass(frozen=True)
class HasNoSlots:
    value: int


@dataclass(frozen=True, slots=True)
class HasUnion:
    value: int | str


@dataclass(frozen=True, slots=True)
class HasLevel:
    value: Level


@pytest.mark.parametrize(
    ("kind", "words"),
    [(HasDict, "no wire form"), (HasNoSlots, "slots=True"), (HasUnion, "only `X | None`")],
)
def test_a_class_without_a_wire_form_is_refused(kind: type, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        unpack(kind, [1])


def test_an_enum_that_is_no_text_is_refused() -> None:
    with pytest.raises(TypeError, match="StrEnum"):
        pack(HasLevel(Level.LOW))
