"""What goes wrong in a run, from its seed alone: plan, model, streams, and who suffers what at which moment.

Knows nothing of processes. The same seed always gives the same scenario, whatever runs before or beside it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from enum import StrEnum

PLANS = ("1,1,1", "1/1/1", "1,1/1")
MODELS = ("random", "demo")
NUM_ORDERS = 5  # streams to choose from, the same number for each model
LONG_ORDERS = (2, 4)  # whose prompts take several steps
FEWEST_TOKENS = 12  # that any of them brings
HEAD = "worker-1"
WORKERS = (HEAD, "worker-2", "worker-3")
COORDINATOR = "coordinator"


class Harm(StrEnum):
    """What is done to a process or to its line."""

    KILL = "kill"
    FREEZE = "freeze"
    RESET = "reset"
    HALF_OPEN = "half-open"
    ONE_WAY = "one-way"
    SLOW = "slow"
    CORRUPT = "corrupt"


class Line(StrEnum):
    """A connection that runs over a wire of the tests."""

    CONTROL = "to the coordinator"
    PEERS = "from its neighbours"


# Only some lines run over wires, which cost time: those of one worker, and the head's way to the coordinator.
LINES = (("worker-2", Line.CONTROL), ("worker-2", Line.PEERS), (HEAD, Line.CONTROL))


class Moment(StrEnum):
    """When it happens."""

    LOAD = "load"  # the streams are asked while a plan is loading, because somebody was killed just before
    PREFILL = "prefill"
    DECODE = "decode"  # right after a token
    ALLREDUCE = "allreduce"  # somewhere in the step that follows a token
    RECOVERY = "recovery"  # when the cluster has begun to deal with the trouble before


class Until(StrEnum):
    """How long it lasts; of a kill: when the process is started again."""

    SOON = "soon"
    NOTICED = "noticed"  # the cluster has a new plan, or says that it waits
    THE_END = "the end"  # of all streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """One thing that goes wrong.

    `tokens`: how many the first stream has brought before; `jitter_s`: a little later, but before it has `last_tokens`.
    """

    moment: Moment
    harm: Harm
    victim: str
    line: Line | None
    tokens: int
    jitter_s: float
    until: Until

    def __str__(self) -> str:
        """Say it in words."""
        line = f" line {self.line}" if self.line else ""
        return (
            f"{self.moment}: {self.harm} {self.victim}{line} after {self.tokens} tokens "
            f"+ {1e3 * self.jitter_s:.0f} ms until {self.until}"
        )

    @property
    def last_tokens(self) -> float:
        """When the moment is over, however fast the machine, in tokens of the first stream."""
        ends = {Moment.PREFILL: 1, Moment.DECODE: self.tokens, Moment.ALLREDUCE: FEWEST_TOKENS - 1}
        return ends.get(self.moment, math.inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run. `first_loss`: who is killed before anything is asked, so that there is a plan to load."""

    seed: int
    plan: str
    model: str
    orders: tuple[int, ...]
    troubles: tuple[Trouble, ...]
    first_loss: str = ""

    def __str__(self) -> str:
        """Say it in words."""
        first = f"; first lost: {self.first_loss}" if self.first_loss else ""
        troubles = "; ".join(map(str, self.troubles))
        return f"seed {self.seed}: {self.model} on {self.plan}, orders {self.orders}{first}; {troubles}"


def scenario_of(seed: int) -> Scenario:
    """Return what happens under this number."""
    dice = random.Random(f"churn {seed}")
    plan = PLANS[seed % len(PLANS)]
    model = MODELS[seed // len(PLANS) % len(MODELS)]
    orders = dice.sample(range(NUM_ORDERS), dice.randint(1, 3))
    first = _trouble(dice, dice.choice([Moment.LOAD, Moment.PREFILL, Moment.DECODE, Moment.DECODE, Moment.ALLREDUCE]))
    if first.moment is Moment.PREFILL and orders[0] not in LONG_ORDERS:
        others = [one for one in LONG_ORDERS if one not in orders]
        if others:
            orders[0] = others[0]
        else:  # both are asked already: let one be the first
            orders.sort(key=lambda one: one not in LONG_ORDERS)
    troubles = [first]
    if dice.random() < 0.3:
        troubles.append(_trouble(dice, Moment.RECOVERY))
    first_loss = ""
    if first.moment is Moment.LOAD:
        first_loss = dice.choice([name for name in WORKERS if name != first.victim])
    return Scenario(
        seed=seed, plan=plan, model=model, orders=tuple(orders), troubles=tuple(troubles), first_loss=first_loss
    )


def _trouble(dice: random.Random, moment: Moment) -> Trouble:
    harm = Harm.KILL if dice.random() < 0.6 else dice.choice(list(Harm)[1:])
    line = None
    if harm in (Harm.KILL, Harm.FREEZE):
        victim = COORDINATOR if dice.random() < 0.12 else dice.choice(WORKERS)
    else:
        victim, line = dice.choice(LINES)
    allreduce_s, other_s = dice.uniform(0.0, 0.03), dice.uniform(0.0, 0.4)
    # A prompt takes some 0.1 s.
    jitter_s = {Moment.DECODE: 0.0, Moment.ALLREDUCE: allreduce_s, Moment.PREFILL: other_s / 4}.get(moment, other_s)
    until = dice.choice(list(Until))
    if victim in (HEAD, COORDINATOR) and until is Until.THE_END and harm is not Harm.SLOW:
        until = Until.NOTICED  # without these nothing goes on
    tokens = dice.randint(1, 8) if moment in (Moment.DECODE, Moment.ALLREDUCE) else 0
    return Trouble(moment=moment, harm=harm, victim=victim, line=line, tokens=tokens, jitter_s=jitter_s, until=until)
