"""Keys and values of the sessions that this worker computes, for its layers and KV-head groups.

Knows nothing of attention or of where rows come from. All positions of all sessions lie in one arena that is allocated
and touched when the plan is loaded; the coordinator hands out the places (`SessionRows.at`), alike for every worker.

A step first calls `begin`, which changes nothing but lengths that a repeated step takes back; only `commit` moves them
on, so a step that fails half-way can be repeated. Each layer has a length of its own: after a change of plan some
layers may lack what others have, and steps through those alone (`layers`) compute it again.

Shapes: L layers, G groups, P positions of the arena, S positions of a session so far, T new rows, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protocol.batches import SessionRows
from protocol.errors import Overloaded, SessionLost, StepFailed
from protocol.ids import SessionId
from protocol.specs import ModelSpec, Span
from runtime.tensors import dtype_of


class SessionKv:
    """One session's place in the arena, `[at, at + capacity)`, and how many of its positions are valid, by layer."""

    __slots__ = ("_first_layer", "_keys_LGPd", "_values_LGPd", "at", "capacity", "lengths")

    def __init__(self, arena: KvCache, at: int, capacity: int) -> None:
        self._first_layer = arena.layers.start
        self._keys_LGPd = arena.keys_LGPd
        self._values_LGPd = arena.values_LGPd
        self.at = at
        self.capacity = capacity
        self.lengths = [0] * len(arena.layers)

    @property
    def length(self) -> int:
        """Positions that are valid in all layers."""
        return min(self.lengths)

    def extend(self, layer: int, start: int, keys_TGd: Tensor, values_TGd: Tensor) -> tuple[Tensor, Tensor]:
        """Write T rows at `start` of a layer of the model and return all up to them, `[G, S, d]` views each."""
        first, end = self.at + start, self.at + start + keys_TGd.shape[0]
        number = layer - self._first_layer
        keys_GPd, values_GPd = self._keys_LGPd[number], self._values_LGPd[number]
        keys_GPd[:, first:end] = keys_TGd.transpose(0, 1)
        values_GPd[:, first:end] = values_TGd.transpose(0, 1)
        return keys_GPd[:, self.at : end], values_GPd[:, self.at : end]


class KvCache:
    """All sessions of one worker, in an arena of `positions`."""

    def __init__(self, spec: ModelSpec, *, layers: Span, groups: Span, positions: int, device: torch.device) -> None:
        self.spec = spec
        self.layers = layers
        self.groups = groups
        self.positions = positions
        self._bytes_per_position = spec.kv_bytes_per_token(len(groups), len(layers))
        shape_LGPd = (len(layers), len(groups), positions, spec.head_dim)
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            # Zeroed, so that every page is there before the first session: the process never grows.
            self.keys_LGPd = torch.zeros(shape_LGPd, dtype=dtype_of(spec.activations), device=device).fill_(0)
            self.values_LGPd = torch.zeros(shape_LGPd, dtype=dtype_of(spec.activations), device=device).fill_(0)
        self._sessions: dict[SessionId, SessionKv] = {}

    @property
    def arena_bytes(self) -> int:
        """Bytes of the whole arena."""
        return self.keys_LGPd.nbytes + self.values_LGPd.nbytes

    @property
    def num_bytes(self) -> int:
        """Bytes reserved by sessions."""
        return sum(kv.capacity for kv in self._sessions.values()) * self._bytes_per_position

    def lengths(self) -> dict[SessionId, int]:
        """Return how many positions are valid, by session."""
        return {session: kv.length for session, kv in self._sessions.items()}

    def find(self, session: SessionId) -> SessionKv | None:
        """Return a session's place, None when it has none."""
        return self._sessions.get(session)

    def rows(self, layer: int, group: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Return views, `[T, d]` each, of keys and values of `count` positions of the arena, of one cell of the model.

        Raises KeyError for a cell that is not of this worker.
        """
        if layer not in self.layers or group not in self.groups:
            raise KeyError(f"layer {layer}, group {group}")
        number, place = layer - self.layers.start, group - self.groups.start
        span = slice(first, first + count)
        return self.keys_LGPd[number, place, span], self.values_LGPd[number, place, span]

    def cut(self, layers: Span, groups: Span, first: int, count: int) -> Tensor:
        """Return a copy of `count` positions of the arena, of some of its cells: `[layers, 2, groups, T, d]`."""
        spans = (
            slice(layers.start - self.layers.start, layers.end - self.layers.start),
            slice(groups.start - self.groups.start, groups.end - self.groups.start),
            slice(first, first + count),
        )
        return torch.stack((self.keys_LGPd[spans], self.values_LGPd[spans]), dim=1)

    def begin(self, rows: tuple[SessionRows, ...], layers: Span | None = None) -> tuple[SessionKv, ...]:
        """Return the caches that these rows extend, in order; opens sessions that start at 0, truncates repeated ones.

        `layers`: of a step that leaves the others as they are. A session that opens where others lie replaces them:
        the coordinator has given their place away, and its word that they are over may still be on the way. Raises
        SessionLost when rows continue what is not here, Overloaded when a place is outside the arena, StepFailed when a
        session stands twice. Then nothing has changed.
        """
        if len({part.session for part in rows}) != len(rows):
            raise StepFailed("a session stands twice in one step", remedy="split its rows over two steps")
        touched = self._touched(layers)
        opening = [part.start == 0 and (layers is None or part.session not in self._sessions) for part in rows]
        for part, opens in zip(rows, opening, strict=True):
            if opens:
                self.require_place(part.session, part.at, part.capacity)
            else:
                self._require_history(part, touched)
        for part, opens in zip(rows, opening, strict=True):
            if opens:
                self._open(part.session, part.at, part.capacity)
        for part in rows:
            self._sessions[part.session].lengths[touched] = [part.start] * (touched.stop - touched.start)
        return tuple(self._sessions[part.session] for part in rows)

    def commit(self, rows: tuple[SessionRows, ...], layers: Span | None = None) -> None:
        """Count the rows of a finished step as valid; raises SessionLost for a session released meanwhile."""
        touched = self._touched(layers)
        number = touched.stop - touched.start
        for part in rows:
            kv = self._sessions.get(part.session)
            if kv is None or kv.lengths[touched] != [part.start] * number:
                raise SessionLost(f"session {part.session} changed during its own step")
            kv.lengths[touched] = [part.start + part.count] * number

    def restore(self, session: SessionId, *, at: int, capacity: int, lengths: Sequence[int]) -> SessionKv:
        """Open a session that was computed before, elsewhere or under another plan.

        `lengths`: valid positions, by layer. Their rows are the caller's to write, by `rows`. Raises Overloaded as
        `begin` does.
        """
        if max(lengths) > capacity:
            raise SessionLost(f"session {session} is said to have {max(lengths)} positions of {capacity}")
        self.require_place(session, at, capacity)
        kv = self._open(session, at, capacity)
        kv.lengths = list(lengths)
        return kv

    def release(self, session: SessionId) -> None:
        """Forget a session; one that is not here is no error (the release may arrive twice)."""
        self._sessions.pop(session, None)

    def require_place(self, session: SessionId, at: int, capacity: int) -> None:
        """Raise Overloaded for a place outside the arena."""
        if at + capacity > self.positions:
            raise Overloaded(
                f"session {session} is placed at [{at}, {at + capacity}), the KV cache has {self.positions} positions",
                remedy="lower max_tokens, or raise --kv-positions",
            )

    def _touched(self, layers: Span | None) -> slice:
        """Return where the layers of a step stand among those of this worker."""
        if layers is None:
            return slice(0, len(self.layers))
        both = layers & self.layers
        return slice(both.start - self.layers.start, both.end - self.layers.start)

    def _require_history(self, part: SessionRows, touched: slice) -> None:
        kv = self._sessions.get(part.session)
        if kv is None:
            raise SessionLost(f"session {part.session} is not here, its rows start at {part.start}")
        length = min(kv.lengths[touched])
        if length < part.start:
            raise SessionLost(f"session {part.session} has {length} positions here, its rows start at {part.start}")
        if part.start + part.count > kv.capacity or part.at != kv.at:
            raise SessionLost(
                f"session {part.session} has {kv.capacity} positions at {kv.at}, "
                f"rows end at {part.start + part.count} of {part.at}",
                remedy="start it again from position 0 with the larger capacity",
            )

    def _open(self, session: SessionId, at: int, capacity: int) -> SessionKv:
        end = at + capacity
        for other, kv in list(self._sessions.items()):
            if other == session or (kv.at < end and at < kv.at + kv.capacity):
                del self._sessions[other]
        found = self._sessions[session] = SessionKv(self, at, capacity)
        return found
