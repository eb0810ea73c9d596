"""The words of a plan, and dealing things out in proportion."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.shares import deal, deal_stage, format_words, parse_words
from protocol.errors import PlanImpossible

# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("words", "shares"),
    [
        ("1", ((1,),)),
        ("1,1/2,1", ((1, 1), (2, 1))),
        (" 3 , 1 / 2 ", ((3, 1), (2,))),
        ("1000000", ((1_000_000,),)),
    ],
)
def test_words_are_read(words: str, shares: tuple[tuple[int, ...], ...]) -> None:
    assert parse_words(words) == shares
    assert parse_words(format_words(shares)) == shares


@pytest.mark.parametrize(
    ("words", "spot"),
    [
        ("", "stage 1, member 1"),
        ("1,", "stage 1, member 2"),
        ("1//1", "stage 2, member 1"),
        ("1,0/1", "stage 1, member 2"),
        ("1/1,-2", "stage 2, member 2"),
        ("1.5", "stage 1, member 1"),
        ("01", "stage 1, member 1"),
        ("1_0", "stage 1, member 1"),
        ("１", "stage 1, member 1"),
        ("1000001", "stage 1, member 1"),
        ("one", "stage 1, member 1"),
        ("1," * 40 + "1", "81 characters"),
    ],
)
def test_wrong_words_name_the_spot(words: str, spot: str) -> None:
    with pytest.raises(PlanImpossible, match=spot):
        parse_words(words)


@given(st.text(alphabet="0123456789,/ -x", max_size=70))
def test_any_text_is_shares_or_impossible(words: str) -> None:
    try:
        shares = parse_words(words)
    except PlanImpossible:
        return
    assert all(share > 0 for stage in shares for share in stage)


# ---------------------------------------------------------------- dealing


@pytest.mark.parametrize(
    ("items", "weights", "least", "counts"),
    [
        (4, [1, 1], [0, 0], (2, 2)),
        (5, [1, 1], [0, 0], (3, 2)),
        (8, [2, 1], [0, 0], (5, 3)),
        (2, [1, 7], [0, 0], (0, 2)),
        (4, [1, 100], [1, 1], (1, 3)),
        (3, [1, 1, 100], [1, 1, 1], (1, 1, 1)),
        (7, [3, 2, 2], [0, 0, 0], (3, 2, 2)),
    ],
)
def test_dealing(items: int, weights: list[int], least: list[int], counts: tuple[int, ...]) -> None:
    assert deal(items, weights, least) == counts


WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


@given(WEIGHTS, st.integers(0, 200), st.booleans())
def test_dealing_is_complete_monotone_and_close(weights: list[int], items: int, at_least_one: bool) -> None:
    least = [int(at_least_one)] * len(weights)
    if items < sum(least):
        with pytest.raises(ValueError):
            deal(items, weights, least)
        return
    counts = deal(items, weights, least)
    assert sum(counts) == items
    assert all(count >= needed for count, needed in zip(counts, least, strict=True))
    for (one, one_weight), (other, other_weight) in itertools.permutations(zip(counts, weights, strict=True), 2):
        assert one >= other or one_weight <= other_weight
    if not at_least_one:
        exact = [items * weight / sum(weights) for weight in weights]
        assert all(abs(count - quota) < 1 for count, quota in zip(counts, exact, strict=True))


@given(WEIGHTS, st.integers(1, 12), st.integers(1, 12))
def test_a_stage_leaves_nobody_without_tiles(weights: list[int], groups: int, ffn: int) -> None:
    if len(weights) > groups + ffn:
        with pytest.raises(PlanImpossible, match=f"{len(weights)} members"):
            deal_stage(tuple(weights), groups, ffn)
        return
    dealt = deal_stage(tuple(weights), groups, ffn)
    assert sum(held for held, _ in dealt) == groups
    assert sum(held for _, held in dealt) == ffn
    assert all(held_groups or held_ffn for held_groups, held_ffn in dealt)
