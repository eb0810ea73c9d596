"""Who gets how much: the words of a plan, and dealing whole things out in proportion to weights.

Knows nothing of models or workers. Whole numbers throughout, so the same weights are dealt alike on every machine.

    words    1,1/2,1      stages by "/", members by ","; each number is that worker's share of the whole model
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from protocol.errors import PlanImpossible

MAX_WORDS = 64  # characters; the plan carries its words as a Name
MAX_SHARE = 1_000_000
_SHARE = re.compile(r"[1-9][0-9]{0,6}")
_REMEDY = 'write whole numbers from 1, members by "," and stages by "/", such as 1,1/2,1'

StageShares = tuple[int, ...]


def parse_words(words: str) -> tuple[StageShares, ...]:
    """Read the words of a plan; raises PlanImpossible naming the spot that is wrong."""
    if len(words) > MAX_WORDS:
        raise PlanImpossible(f"plan of {len(words)} characters exceeds {MAX_WORDS}", remedy="use smaller numbers")
    stages = []
    for number, stage in enumerate(words.split("/"), start=1):
        members = []
        for place, text in enumerate(stage.split(","), start=1):
            share = text.strip()
            if not _SHARE.fullmatch(share) or int(share) > MAX_SHARE:
                where = f"stage {number}, member {place}"
                raise PlanImpossible(f"plan {words!r}: {share!r} ({where}) is no share", remedy=_REMEDY)
            members.append(int(share))
        stages.append(tuple(members))
    return tuple(stages)


def format_words(stages: Sequence[StageShares]) -> str:
    """Write shares as the words of a plan."""
    return "/".join(",".join(str(share) for share in stage) for stage in stages)


def deal(num_items: int, weights: Sequence[int], least: Sequence[int]) -> tuple[int, ...]:
    """Deal items in proportion to positive weights by largest remainder; receiver i gets at least `least[i]`.

    A heavier receiver never gets fewer than a lighter one, as long as `least` itself never says otherwise. Ties go to
    the earlier receiver. Raises ValueError when `least` asks for more than there is.
    """
    if sum(least) > num_items:
        raise ValueError(f"{num_items} items can't give {sum(least)}")
    total = sum(weights)
    counts = [num_items * weight // total for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda i: (-(num_items * weights[i] % total), -weights[i], i))
    for i in by_remainder[: num_items - sum(counts)]:
        counts[i] += 1
    for i, needed in enumerate(least):
        while counts[i] < needed:
            # The richest gives; among equals the lightest and last, so that the order by weight stays.
            spare = [j for j in range(len(counts)) if counts[j] > least[j]]
            giver = max(spare, key=lambda j: (counts[j], -weights[j], j))
            counts[giver] -= 1
            counts[i] += 1
    return tuple(counts)


def deal_stage(shares: StageShares, num_groups: int, num_ffn: int) -> tuple[tuple[int, int], ...]:
    """Return how many (KV-head groups, FFN tiles) each member of a stage holds; none is left without any.

    With more members than FFN tiles, every member gets a group; with more members than groups too, the heaviest get
    the groups and the others FFN tiles only. Raises PlanImpossible when there are more members than both together.
    """
    members = len(shares)
    if members > num_groups + num_ffn:
        raise PlanImpossible(
            f"a stage of {members} members can't share {num_groups} KV-head groups and {num_ffn} FFN tiles a layer",
            remedy=f"give a stage at most {num_groups + num_ffn} members, and the others a stage of their own",
        )
    none, one = [0] * members, [1] * members
    if num_ffn >= members:
        groups, ffn = deal(num_groups, shares, none), deal(num_ffn, shares, one)
    elif num_groups >= members:
        groups, ffn = deal(num_groups, shares, one), deal(num_ffn, shares, none)
    else:
        heaviest = sorted(range(members), key=lambda i: (-shares[i], i))[:num_groups]
        groups = tuple(int(i in heaviest) for i in range(members))
        ffn = deal(num_ffn, shares, [1 - count for count in groups])
    return tuple(zip(groups, ffn, strict=True))
