"""The tree of errors: codes, the drawing in its docstring, and the way through `ErrorReport` and back."""

from __future__ import annotations

import re

import pytest

from protocol import errors, exits
from protocol.frames import decode, encode
from protocol.messages import ErrorReport


def all_kinds(root: type[errors.ManyhandsError] = errors.ManyhandsError) -> list[type[errors.ManyhandsError]]:
    """Every class of the tree that the module defines."""
    children = [kind for child in root.__subclasses__() for kind in all_kinds(child)]
    return [kind for kind in [root, *children] if kind.__module__ == errors.__name__]


KINDS = all_kinds()
EACH_KIND = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


def test_every_class_has_a_code_of_its_own() -> None:
    assert len({kind.code for kind in KINDS}) == len(KINDS)
    assert all("code" in vars(kind) for kind in KINDS)
    assert {errors.BY_CODE[kind.code] for kind in KINDS} == set(KINDS)


def test_the_drawing_shows_the_tree_as_it_is() -> None:
    drawn: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ((?:[│ ]   )*(?:[├└]── )?)([A-Z]\w+)", line)
        if match:
            drawn.append((len(match[1]) // 4, match[2]))
    actual = [(len(kind.__mro__) - len(errors.ManyhandsError.__mro__), kind.__name__) for kind in KINDS]
    assert sorted(drawn) == sorted(actual)


@EACH_KIND
def test_an_error_keeps_its_class_and_words_over_the_wire(kind: type[errors.ManyhandsError]) -> None:
    sent = kind("it broke", remedy="mend it", node="beta", phase="step")
    report = decode(encode(ErrorReport.of(sent, request="r", digest=bytes(32)))).message
    assert (report.request, report.digest) == ("r", bytes(32))
    found = report.error()
    assert type(found) is kind
    assert str(found) == str(sent) == "it broke [beta, step] (mend it)"
    assert found.can_retry == kind.can_retry


@EACH_KIND
def test_every_error_has_an_exit_code(kind: type[errors.ManyhandsError]) -> None:
    assert 64 <= exits.exit_code(kind("x")) <= 130


def test_an_unknown_code_of_a_newer_peer_is_a_remote_error() -> None:
    found = errors.from_code("from-the-future", "x", remedy="y")
    assert type(found) is errors.RemoteError
    assert str(found) == "x (y)"


def test_a_report_is_cut_to_its_bounds_and_always_sendable() -> None:
    sent = errors.StorageFull("\udcff" + "m" * 9000, remedy="r" * 9000, node="n" * 9000, phase="p" * 9000)
    report = decode(encode(ErrorReport.of(sent))).message
    assert (len(report.text), len(report.remedy), len(report.node), len(report.phase)) == (1000, 1000, 200, 200)
    assert report.text.startswith("?m")


def test_the_node_that_reports_is_named_unless_the_error_names_one() -> None:
    assert ErrorReport.of(errors.PeerLost("x"), node="alpha").node == "alpha"
    assert ErrorReport.of(errors.PeerLost("x", node="beta"), node="alpha").node == "beta"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (errors.RequestInvalid("no prompt"), "no prompt"),
        (errors.RequestInvalid("no prompt", node="a"), "no prompt [a]"),
        (errors.RequestInvalid("no prompt", phase="b"), "no prompt [b]"),
        (errors.RequestInvalid("no prompt", remedy="send one"), "no prompt (send one)"),
    ],
)
def test_words(error: errors.ManyhandsError, text: str) -> None:
    assert str(error) == text
