"""The KV cache: what may follow what, what a repeated step takes back, and whose place is whose."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import SMALL
from tiles_of import CPU, make_model, spec_of

from protocol.batches import SessionRows
from protocol.errors import Overloaded, SessionLost, StepFailed
from protocol.ids import SessionId
from protocol.specs import Span
from runtime.kv import KvCache

SPEC = spec_of(make_model("llama3-gqa"))
BYTES_PER_POSITION = 2 * SMALL["num_hidden_layers"] * 2 * SPEC.head_dim * 4


def make_cache(positions=100, groups=2):
    return KvCache(
        SPEC,
        layers=Span(0, SPEC.layers),
        groups=Span(0, groups),
        positions=positions,
        device=CPU,
    )


def row(session, start, count, capacity=20, at=None):
    """Session n lies at 20 (n - 1) unless said otherwise."""
    place = 20 * (session - 1) if at is None else at
    return SessionRows(session=SessionId(session), start=start, count=count, capacity=capacity, at=place)


def step(cache, *rows):
    kvs = cache.begin(rows)
    cache.commit(rows)
    return kvs


def test_rows_come_back_as_they_were_written():
    cache = make_cache()
    keys = torch.randn(7, 2, SPEC.head_dim)
    values = torch.randn(7, 2, SPEC.head_dim)
    for start, end in ((0, 4), (4, 5), (5, 7)):
        (kv,) = cache.begin((row(1, start, end - start),))
        for layer in range(SPEC.layers):
            found_keys, found_values = kv.extend(layer, start, keys[start:end] + layer, values[start:end] - layer)
            assert torch.equal(found_keys, (keys[:end] + layer).transpose(0, 1))
            assert torch.equal(found_values, (values[:end] - layer).transpose(0, 1))
        cache.commit((row(1, start, end - start),))
    assert cache.lengths() == {1: 7}
    assert cache.num_bytes == 20 * BYTES_PER_POSITION


LOST = [
    ("unknown session", [], row(1, 3, 1), "is not here"),
    ("gap", [row(1, 0, 3)], row(1, 5, 1), "has 3 positions"),
    ("beyond what was reserved", [row(1, 0, 3)], row(1, 3, 20, capacity=40), "has 20 positions at 0"),
    ("another place", [row(1, 0, 3)], row(1, 3, 1, at=7), "has 20 positions at 0"),
    ("released", [row(1, 0, 3), None], row(1, 3, 1), "is not here"),
]


@pytest.mark.parametrize("name,before,then,message", LOST, ids=[case[0] for case in LOST])
def test_rows_without_their_history_are_refused(name, before, then, message):
    cache = make_cache()
    for part in before:
        if part is None:
            cache.release(SessionId(1))
        else:
            step(cache, part)
    lengths = cache.lengths()
    with pytest.raises(SessionLost, match=message):
        cache.begin((row(2, 0, 2), then))
    assert cache.lengths() == lengths


def test_a_session_twice_in_one_step_is_refused():
    with pytest.raises(StepFailed, match="twice"):
        make_cache().begin((row(1, 0, 2), row(1, 2, 1)))


def test_a_step_that_failed_can_be_repeated():
    cache = make_cache()
    step(cache, row(1, 0, 4))
    cache.begin((row(1, 4, 2),))  # never committed
    assert cache.lengths() == {1: 4}
    step(cache, row(1, 4, 2))
    step(cache, row(1, 2, 1))  # taken back further
    assert cache.lengths() == {1: 3}


def test_a_session_may_start_again_with_more_room():
    cache = make_cache()
    step(cache, row(1, 0, 4, capacity=8))
    step(cache, row(1, 0, 4, capacity=6))
    assert cache.num_bytes == 6 * BYTES_PER_POSITION
    step(cache, row(1, 0, 4, capacity=90))
    assert cache.num_bytes == 90 * BYTES_PER_POSITION


def test_the_arena_is_kept_and_named():
    cache = make_cache(positions=50)
    step(cache, row(1, 0, 4))
    with pytest.raises(Overloaded, match=r"session 3 is placed at \[40, 60\), the KV cache has 50 positions"):
        cache.begin((row(2, 0, 1), row(3, 0, 1)))
    assert cache.lengths() == {1: 4}
    assert cache.arena_bytes == 50 * BYTES_PER_POSITION


def test_a_place_given_away_belongs_to_the_newcomer():
    """The coordinator's word that the old session is over may arrive later than the new one's first step."""
    cache = make_cache()
    step(cache, row(1, 0, 4), row(2, 0, 3), row(3, 0, 2))
    step(cache, row(4, 0, 5, at=10, capacity=15))
    assert cache.lengths() == {3: 2, 4: 5}
    cache.release(SessionId(1))
    assert cache.lengths() == {3: 2, 4: 5}
    with pytest.raises(SessionLost):
        cache.begin((row(2, 3, 1),))


def test_a_member_without_groups_still_counts_positions():
    cache = make_cache(groups=0)
    step(cache, row(1, 0, 4))
    assert (cache.lengths(), cache.num_bytes) == ({1: 4}, 0)
    with pytest.raises(SessionLost):
        cache.begin((row(2, 4, 1),))


def test_commit_tells_of_a_session_released_during_its_step():
    cache = make_cache()
    cache.begin((row(1, 0, 4),))
    cache.release(SessionId(1))
    with pytest.raises(SessionLost, match="during its own step"):
        cache.commit((row(1, 0, 4),))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(0, 12), st.integers(1, 6), st.integers(6, 30), st.booleans()),
        max_size=30,
    )
)
def test_any_order_of_events_keeps_places_and_lengths(events):
    cache = make_cache(positions=90)
    for session, start, count, extra, is_release in events:
        before = cache.lengths()
        if is_release:
            cache.release(SessionId(session))
            assert session not in cache.lengths()
            continue
        part = row(session, start, count, capacity=start + count + extra)
        try:
            step(cache, part)
        except (SessionLost, Overloaded):
            assert cache.lengths() == before
        else:
            assert cache.lengths()[SessionId(session)] == start + count
            assert start <= before.get(SessionId(session), 0)
            assert cache.lengths().items() - {(session, start + count)} <= before.items()
        places = sorted((kv.at, kv.at + kv.capacity) for kv in cache._sessions.values())
        assert all(end <= at for (_, end), (at, _) in itertools.pairwise(places))
        assert cache.num_bytes <= cache.arena_bytes


def test_a_restored_session_goes_on_where_it_was():
    cache = make_cache()
    step(cache, row(1, 0, 4))
    cache.restore(SessionId(2), at=20, capacity=20, lengths=[6] * SPEC.layers)
    step(cache, row(2, 6, 1))
    step(cache, row(2, 3, 2))  # another worker held less of it
    assert cache.lengths() == {1: 4, 2: 5}
    with pytest.raises(Overloaded):
        cache.restore(SessionId(3), at=90, capacity=20, lengths=[1] * SPEC.layers)
    with pytest.raises(SessionLost, match="21 positions of 20"):
        cache.restore(SessionId(3), at=40, capacity=20, lengths=[21] * SPEC.layers)


def test_a_step_through_some_layers_leaves_the_others_as_they_are():
    cache, some = make_cache(), Span(1, 2)
    lengths = [6] * SPEC.layers
    lengths[1] = 0
    cache.restore(SessionId(1), at=0, capacity=20, lengths=lengths)
    assert cache.lengths() == {1: 0}
    for start, count in ((0, 4), (4, 2)):
        (kv,) = cache.begin((row(1, start, count),), some)
        assert kv.lengths == [6 if layer != 1 else start for layer in range(SPEC.layers)]
        cache.commit((row(1, start, count),), some)
    assert cache.lengths() == {1: 6}
    step(cache, row(1, 6, 1))
    assert cache.lengths() == {1: 7}


def test_rows_of_some_layers_need_their_history_there_alone():
    cache, some = make_cache(), Span(0, 1)
    cache.restore(SessionId(1), at=0, capacity=20, lengths=[4] + [2] * (SPEC.layers - 1))
    with pytest.raises(SessionLost, match="has 2 positions"):
        cache.begin((row(1, 4, 1),))
    cache.begin((row(1, 4, 1),), some)
    with pytest.raises(SessionLost, match="has 20 positions at 0"):
        cache.begin((row(1, 0, 1, at=40),), some)


def test_some_layers_of_a_session_that_is_not_here_begin_at_its_beginning():
    cache, some = make_cache(), Span(0, 1)
    with pytest.raises(SessionLost, match="is not here"):
        cache.begin((row(1, 2, 1),), some)
    cache.begin((row(1, 0, 2),), some)
    cache.commit((row(1, 0, 2),), some)
    assert cache.find(SessionId(1)).lengths == [2] + [0] * (SPEC.layers - 1)
