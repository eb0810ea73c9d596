"""The rule that no message is slept through, on real sockets inside one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from worker.waker import Waker
from worker.watch import LOOK_EVERY, Watch

Pair = tuple[zmq.Socket[Any], zmq.Socket[Any]]


@pytest.fixture
def pairs() -> Iterator[list[Pair]]:
    context: zmq.Context[Any] = zmq.Context()
    found = []
    for name in ("one", "two"):
        here, there = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        here.bind(f"inproc://{name}")
        there.connect(f"inproc://{name}")
        found.append((here, there))
    yield found
    context.destroy(linger=0)


@pytest.fixture
def watch(pairs: list[Pair]) -> Iterator[tuple[Watch, Waker]]:
    waker = Waker()
    one = Watch(waker)
    one.watch(here for here, _ in pairs)
    yield one, waker
    one.close()
    waker.close()


def test_each_message_is_told_of_until_it_is_taken(pairs: list[Pair], watch: tuple[Watch, Waker]) -> None:
    here, there = pairs[0]
    assert watch[0].readable(0.0) == []
    there.send(b"1")
    there.send(b"2")
    for word in (b"1", b"2"):
        assert watch[0].readable(60.0) == [here]
        assert watch[0].readable(60.0) == [here]
        assert here.recv(zmq.NOBLOCK) == word
    assert watch[0].readable(0.0) == []


def test_a_message_whose_news_was_taken_by_a_send_is_not_slept_through(
    pairs: list[Pair], watch: tuple[Watch, Waker]
) -> None:
    here, there = pairs[0]
    assert watch[0].readable(0.0) == []
    there.send(b"x")
    assert here.get(zmq.EVENTS)  # as any call on the socket does: its descriptor says nothing from here on
    watch[0].touched.add(here)
    assert watch[0].readable(60.0) == [here]


def test_a_forgotten_touch_costs_time_and_no_message(pairs: list[Pair], watch: tuple[Watch, Waker]) -> None:
    here, there = pairs[0]
    assert watch[0].readable(0.0) == []
    there.send(b"x")
    assert here.get(zmq.EVENTS)
    assert any(here in watch[0].readable(0.0) for _ in range(2))


def test_the_waker_is_heard_alone_and_among_messages(pairs: list[Pair], watch: tuple[Watch, Waker]) -> None:
    one, waker = watch
    waker.wake()
    assert one.readable(60.0) == [waker]
    waker.clear()
    assert one.readable(0.0) == []
    pairs[1][1].send(b"never taken")
    waker.wake()
    assert any(waker in one.readable(60.0) for _ in range(LOOK_EVERY + 1))


def test_a_busy_socket_does_not_hide_another(pairs: list[Pair], watch: tuple[Watch, Waker]) -> None:
    (busy, _), (other, _) = pairs
    pairs[0][1].send(b"never taken")
    assert watch[0].readable(60.0) == [busy]
    pairs[1][1].send(b"x")
    assert any(other in watch[0].readable(60.0) for _ in range(LOOK_EVERY + 1))
