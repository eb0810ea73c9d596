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

`is_tight`, `is_loose` and `retention_period` are these formulas; the tests hold them against a simulation of `Window`.
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


class _Slot(NamedTuple):
    """A slot that is being read into, or is read, for use number `use`."""

    use: int
    is_read: bool


class Window:
    """The ring: uses of streamed blocks, numbered through all steps, and which slots hold which of them.

    Use number n is of block `streamed[n % len(streamed)]`. The computing thread says `seek`, `ready_slot`, `release`;
    the loader asks `next_read` and says `read_done` or `read_failed`. At most one read is under way.
    """

    def __init__(self, streamed: Sequence[int], num_slots: int) -> None:
        if not streamed or num_slots < 1:
            raise InvariantBroken(f"a ring of {num_slots} slots for {len(streamed)} streamed blocks")
        self._streamed = tuple(streamed)
        self._slots: list[_Slot | None] = [None] * num_slots
        self._wanted = 0
        self._ordered = 0
        self._reading: int | None = None
        self._held: int | None = None

    def next_read(self) -> Read | None:
        """Return the next order, or None while a read is under way or no slot is free."""
        if self._reading is not None or None not in self._slots:
            return None
        slot = self._slots.index(None)
        self._slots[slot] = _Slot(self._ordered, is_read=False)
        self._reading = slot
        self._ordered += 1
        return Read(self._block(self._ordered - 1), slot)

    def read_done(self) -> None:
        """The read under way has ended; nobody may want it any more after a `seek`."""
        slot, found = self._end_read()
        self._slots[slot] = _Slot(found.use, is_read=True) if found.use >= self._wanted else None

    def read_failed(self) -> None:
        """The read under way has failed: the same block is ordered again."""
        slot, found = self._end_read()
        self._slots[slot] = None
        self._ordered = max(found.use, self._wanted)

    def seek(self, block: int) -> None:
        """The computing thread wants `block` next.

        In the usual order this changes nothing. After an aborted step the uses in between are passed over: what was
        read ahead for them is given up, a read under way ends into a slot that is then free again.
        """
        if self._held is not None:
            raise InvariantBroken(f"block {block} is wanted while another is held")
        if block not in self._streamed:
            raise InvariantBroken(f"block {block} is not streamed")
        while self._block(self._wanted) != block:
            self._wanted += 1
        for number, slot in enumerate(self._slots):
            if slot is not None and slot.is_read and slot.use < self._wanted:
                self._slots[number] = None
        self._ordered = max(self._ordered, self._wanted)

    def ready_slot(self) -> int | None:
        """Hold the wanted block and return its slot once it is read; None: wait for `read_done`."""
        for number, slot in enumerate(self._slots):
            if slot is not None and slot.is_read and slot.use == self._wanted:
                self._held = number
                return number
        return None

    def release(self) -> None:
        """The held block is computed: its slot may be overwritten."""
        if self._held is None:
            raise InvariantBroken("a block is released that is not held")
        self._slots[self._held] = None
        self._held = None
        self._wanted += 1

    def _end_read(self) -> tuple[int, _Slot]:
        slot = self._reading
        found = self._slots[slot] if slot is not None else None
        if slot is None or found is None:
            raise InvariantBroken("a read ended that was never ordered")
        self._reading = None
        return slot, found

    def _block(self, use: int) -> int:
        return self._streamed[use % len(self._streamed)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """Seconds for one layer: computing, its allreduce, and reading, of the attention and of the FFN block."""

    attention_s: float
    ffn_s: float
    allreduce_s: float
    read_attention_s: float
    read_ffn_s: float


def is_tight(times: BlockTimes) -> bool:
    """Proposition 3: every read hides behind the computing and adding of the block before it."""
    return (
        times.attention_s + times.allreduce_s >= times.read_ffn_s
        and times.ffn_s + times.allreduce_s >= times.read_attention_s
    )


def is_loose(times: BlockTimes, layers: int, retained_every: int = 0) -> bool:
    """Proposition 4 (with `retained_every` T > 0: Proposition 6): reads hide behind whole layers, given read-ahead."""

    def kept(count: int) -> int:
        return math.ceil(count / retained_every) if retained_every else 0

    def half(count: int) -> bool:
        full, less = count, count - 1
        sums = (2 * count - 1) * times.allreduce_s
        starts_with_attention = full * times.attention_s + less * times.ffn_s + sums >= (
            (full - kept(full)) * times.read_ffn_s + less * times.read_attention_s
        )
        starts_with_ffn = less * times.attention_s + full * times.ffn_s + sums >= (
            max(less - kept(less), 0) * times.read_ffn_s + full * times.read_attention_s
        )
        return starts_with_attention or starts_with_ffn

    def whole(count: int) -> bool:
        computed = count * (times.attention_s + times.ffn_s + 2 * times.allreduce_s)
        return computed >= (count - kept(count)) * times.read_ffn_s + count * times.read_attention_s

    return all(half(count) and whole(count) for count in range(1, layers + 1))


def retention_period(times: BlockTimes, layers: int) -> int | None:
    """Return the largest T for which keeping one FFN block in every T hides all reading (Proposition 6), or None.

    0 says that nothing needs to be kept.
    """
    if is_loose(times, layers):
        return 0
    return next((period for period in range(layers, 0, -1) if is_loose(times, layers, period)), None)
