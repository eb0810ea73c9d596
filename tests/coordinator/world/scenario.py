"""What kind of world a seed gives: how the cluster is run, and how bad its luck is.

Knows nothing of how faults are done.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Final

from coordinator.policy import ClusterPolicy
from protocol.contract import SLACK_BYTES

BUDGET: Final = SLACK_BYTES + 1_440_000  # one worker alone has room for a few sessions only
NAMES: Final = ("a", "b", "c", "d")

_WAYS: Final = (  # plan, workers, head_only
    ("1", 1, False),
    ("1/1", 1, False),
    ("1/1/1", 1, False),
    ("1,1", 1, False),
    ("1,1/1", 1, False),
    ("2,1/1", 1, False),
    ("1,1,1", 1, False),
    ("1/1", 1, True),
    (None, 1, False),
    (None, 1, True),
    (None, 3, False),
)


class Trouble(StrEnum):
    """The kinds of things that go wrong."""

    KILL = "kill"
    FLAP = "flap"
    FREEZE = "freeze"
    PARTITION = "partition"
    RESET = "reset"
    BLIP = "blip"
    LINK = "link"
    DRAIN = "drain"
    SIGTERM = "sigterm"
    LEAVE = "leave"
    PAUSE = "pause"
    CRASH = "crash"
    STOP = "stop"
    JUMP = "jump"
    USURP = "usurp"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Probabilities, each of one occasion; `pause_s`: the mean time between two troubles."""

    policy: ClusterPolicy
    workers: tuple[str, ...]
    budgets: tuple[int, ...]
    troubles: tuple[Trouble, ...]
    weights: tuple[float, ...]
    pause_s: float
    num_requests: int
    loss: float
    doubling: float
    crash_between: float
    load_hang: float
    load_failure: float
    step_hang: float
    step_failure: float
    stock_silence: float
    stock_failure: float
    cancels: float
    spool_loss: float = 0.0  # of a session, when a plan ends: the disk is full
    poison: int | None = None  # the session that no worker can compute

    @property
    def is_calm(self) -> bool:
        """Whether nothing goes wrong by itself."""
        rates = (self.loss, self.crash_between, self.load_hang, self.load_failure, self.step_hang, self.step_failure)
        return not self.troubles and not any(rates)


def scenario_of(dice: random.Random, num_workers: int = 0) -> Scenario:
    """One of the ways to run a cluster, with short deadlines, and some kinds of trouble; 0: a few workers."""
    few = NAMES[: dice.choice([1, 2, 3, 3, 4])] if not num_workers else [f"w{n}" for n in range(num_workers - 1)]
    names = ("head", *few, *(["head2"] if dice.random() < 0.2 else []))
    troubles = tuple(dice.sample(list(Trouble), dice.choice([0, 1, 2, 4, 8, len(Trouble)])))
    lucky = dice.random() < 0.2

    def rate(most: float) -> float:
        return 0.0 if lucky else dice.choice([0.0, most * dice.random()])

    return Scenario(
        policy=_policy_of(dice, len(names)),
        workers=names,
        budgets=tuple(dice.choice([BUDGET, BUDGET, BUDGET * 2, BUDGET + 500_000]) for _ in names),
        troubles=troubles,
        weights=tuple(0.2 + dice.random() for _ in troubles),
        pause_s=dice.choice([0.7, 2.0, 6.0]) * len(NAMES) / max(len(NAMES), len(names) / 4),
        num_requests=dice.randint(1, 25),
        loss=rate(0.008),
        doubling=rate(0.06),
        crash_between=rate(0.002) if Trouble.CRASH in troubles else 0.0,
        load_hang=rate(0.02),
        load_failure=rate(0.04),
        step_hang=rate(0.003),
        step_failure=rate(0.004),
        stock_silence=rate(0.3),
        stock_failure=rate(0.4),
        cancels=rate(0.4),
        spool_loss=rate(0.3),
        poison=0 if dice.random() < 0.05 else None,
    )


def _policy_of(dice: random.Random, num_workers: int) -> ClusterPolicy:
    words, workers, head_only = dice.choice(_WAYS)
    needed = sum(part.count(",") + 1 for part in words.split("/")) + head_only if words else 1 + head_only
    if needed > num_workers:
        words, workers, head_only = None, 1, False
    return ClusterPolicy(
        plan_words=words,
        workers=min(workers, num_workers),
        head_only=head_only,
        load_timeout_s=5.0,
        step_timeout_s=5.0,
        form_timeout_s=20.0,
        retry_most_s=4.0,
        max_sessions=dice.choice([1, 3, 8]),
        max_waiting=dice.choice([2, 20, 20]),
        prefill_chunk=dice.choice([4, 16]),
        spares=dice.choice([0, 0, 1, 2]),
        replicate_kv=dice.random() < 0.4,
        probation_s=dice.choice([0.0, 1.0, 5.0]),
        return_s=dice.choice([0.0, 2.0, 5.0]),
    )


def calm_scenario(seed: int, *troubles: Trouble, **changes: object) -> Scenario:
    """A world of this seed in which only these troubles come, and nothing goes wrong by itself."""
    rates = {one.name: 0.0 for one in fields(Scenario) if one.type == "float" and one.name != "pause_s"}
    return replace(
        scenario_of(random.Random(seed)),
        **{**rates, "poison": None, "pause_s": 3.0, **changes},  # type: ignore[arg-type]
        troubles=troubles,
        weights=tuple(1.0 for _ in troubles),
    )
