"""The window's policy: which blocks stay in memory, and which block the loader reads next into which slot.

Knows nothing of disks, threads or tensors: `plan_window` chooses once per plan, `Window` takes events and answers.

A worker passes its blocks in the same order every step. Those that fit are pinned for good, the others flow through a
ring of equal slots, read ahead in the order of use and wrapping to the next step before it begins. TPI-LLM (arXiv
2410.00531, section 3.4) keeps w consecutive blocks and reloads all of them for every token; pinning a fixed set that is
spread evenly turns the same memory into fewer bytes to read.

When does reading stay hidden? With t the time to compute a block, a the time of its allreduce and tau the time to read
it, the paper gives, for layers of one attention and one FFN block of which all are streamed:

    tight (Prop. 3)      t_attn + a >= tau_ffn  and  t_ffn + a >= tau_attn
    loose (Prop. 4)      t_attn + t_ffn + 2a >= tau_attn + tau_ffn, and for every l up to the number of layers
                         (5)  l t_attn + (l-1) t_ffn + (2l-1) a >= l tau_ffn + (l-1) tau_attn      or
                         (6)  (l-1) t_attn + l t_ffn + (2l-1) a >= (l-1) tau_ffn + l tau_attn
    retained (Prop. 6)   one FFN block in every T is kept: the same with (l - ceil(l/T)) tau_ffn for l tau_ffn

`needs_no_stall` and `retention_period` are these formulas; the tests hold them against a simulation of `Window`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protocol.errors import BudgetTooSmall, InvariantBroken

MIN_SLOTS = 2
MAX_SLOTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """What stays and what flows: indices into the blocks in order of use."""

    pinned: frozenset[int]
    streamed: tuple[int, ...]
    slot_bytes: int
    num_slots: int

    @property
    def ring_bytes(self) -> int:
        """Bytes of all slots."""
        return self.slot_bytes * self.num_slots


def plan_window(sizes: Sequence[int], budget_bytes: int) -> WindowPlan:
    """Choose the pinned set and the ring for blocks of these sizes (bytes, in order of use) within a budget.

    Raises BudgetTooSmall when not even two slots of the largest block fit.
    """
    if sum(sizes) <= budget_bytes:
        return WindowPlan(pinned=frozenset(range(len(sizes))), streamed=(), slot_bytes=0, num_slots=0)
    best: WindowPlan | None = None
    for num_slots in range(MIN_SLOTS, MAX_SLOTS + 1):
        found = _with_slots(sizes, budget_bytes, num_slots)
        # A third slot smooths uneven blocks, but never at the price of noticeably more to read.
        if found and (best is None or _streamed_bytes(sizes, found) <= 1.02 * _streamed_bytes(sizes, best)):
            best = found
    if best is None:
        need = MIN_SLOTS * max(sizes)
        raise BudgetTooSmall(f"a window needs two slots of the largest block, {need} bytes; {budget_bytes} are left")
    return best


def _with_slots(sizes: Sequence[int], budget_bytes: int, num_slots: int) -> WindowPlan | None:
    """Pin as much as the ring leaves room for. Slots must hold the largest block that is streamed."""
    slot_bytes = max(sizes)
    if num_slots * slot_bytes > budget_bytes:
        return None
    pinned = _spread(sizes, budget_bytes - num_slots * slot_bytes)
    streamed = tuple(index for index in range(len(sizes)) if index not in pinned)
    largest = max(sizes[index] for index in streamed)
    return WindowPlan(pinned=pinned, streamed=streamed, slot_bytes=largest, num_slots=min(num_slots, len(streamed)))


def _streamed_bytes(sizes: Sequence[int], plan: WindowPlan) -> int:
    return sum(sizes[index] for index in plan.streamed)


def _spread(sizes: Sequence[int], room_bytes: int) -> frozenset[int]:
    """Pick indices worth at most `room_bytes`, spread over the order of use so that reading never bunches.

    Error diffusion: walk along the blocks, owing each the pinned fraction of its bytes, and pin when half a block is
    owed. What rounding leaves over goes to the blocks that still fit, each time the one farthest from a pinned one.
    """
    fraction = room_bytes / sum(sizes)
    pinned: set[int] = set()
    left, owed = room_bytes, 0.0
    for index, size in enumerate(sizes):
        owed += size * fraction
        if owed >= size / 2 and size <= left:
            pinned.add(index)
            left -= size
            owed -= size
    while fitting := [index for index, size in enumerate(sizes) if index not in pinned and size <= left]:
        chosen = max(fitting, key=lambda index: (_distance(index, pinned, len(sizes)), sizes[index], -index))
        pinned.add(chosen)
        left -= sizes[chosen]
    return frozenset(pinned)


def _distance(index: int, pinned: set[int], count: int) -> int:
    """Steps along the ring of blocks to the nearest pinned one."""
    return min((min((index - other) % count, (other - index) % count) for other in pinned), default=count)


class Read(NamedTuple):
    """An order to the loader: read this block into this slot."""

    block: int
    slot: int


class Window:
    """The ring: a sequence of uses of streamed blocks that repeats every step.

    Use number n is of block `streamed[n % len(streamed)]` and lives in slot `n % num_slots`. Invariant:
    `freed <= acquired <= freed + 1`, `freed <= loaded <= ordered <= freed + num_slots`.
    """

    def __init__(self, streamed: Sequence[int], num_slots: int) -> None:
        if not streamed or not 1 <= num_slots <= len(streamed):
            raise InvariantBroken(f"a ring of {num_slots} slots for {len(streamed)} streamed blocks")
        self._streamed = tuple(streamed)
        self._num_slots = num_slots
        self._freed = 0
        self._loaded = 0
        self._ordered = 0
        self._held = False

    def next_read(self) -> Read | None:
        """Return the next order, or None while every slot is full, in use, or being read into."""
        if self._ordered > self._loaded or self._ordered >= self._freed + self._num_slots:
            return None
        use = self._ordered
        self._ordered += 1
        return Read(self._block(use), use % self._num_slots)

    def read_done(self) -> None:
        """The loader has finished the order it was given last."""
        if self._loaded >= self._ordered:
            raise InvariantBroken("a read ended that was never ordered")
        self._loaded += 1

    def read_failed(self) -> None:
        """The order failed: it will be given again."""
        if self._loaded >= self._ordered:
            raise InvariantBroken("a read failed that was never ordered")
        self._ordered -= 1

    def seek(self, block: int) -> None:
        """The computing thread wants `block` next. In the usual order this changes nothing.

        After an aborted step, uses in between are passed over: their slots are freed unread, or as soon as a read that
        is under way ends.
        """
        if self._held:
            raise InvariantBroken(f"block {block} is wanted while another is held")
        ahead = next((n for n in range(len(self._streamed)) if self._block(self._freed + n) == block), None)
        if ahead is None:
            raise InvariantBroken(f"block {block} is not streamed")
        if ahead == 0:
            return
        self._freed += ahead
        reading = self._ordered > self._loaded
        if self._ordered < self._freed:
            # Nothing that was ordered is of use; a read under way ends into a slot nobody looks at.
            self._ordered = self._freed + (1 if reading else 0)
            self._loaded = self._freed
            self._freed += self._skip_stale(reading, block)

    def _skip_stale(self, reading: bool, block: int) -> int:
        """A read under way keeps its number's place: move one round on, so that its end is counted as a stale use."""
        if not reading:
            return 0
        raise NotImplementedError

    def ready_slot(self) -> int | None:
        """Return the slot of the wanted block once it is read, and hold it; None: wait for `read_done`."""
        if self._held or self._loaded <= self._freed:
            return None
        self._held = True
        return self._freed % self._num_slots

    def release(self) -> None:
        """The held block is computed: its slot may be overwritten."""
        if not self._held:
            raise InvariantBroken("a block is released that is not held")
        self._held = False
        self._freed += 1

    def _block(self, use: int) -> int:
        return self._streamed[use % len(self._streamed)]
