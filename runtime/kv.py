"""Keys and values of the sessions that this worker computes, for its layers and KV-head groups.

Knows nothing of attention or of where rows come from. A step first calls `begin`, which changes nothing but lengths
that a repeated step takes back; only `commit` moves them on, so a step that fails half-way can be repeated.

Shapes: L layers, G groups, C capacity in positions, S positions so far, T new rows, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from protocol.batches import SessionRows
from protocol.errors import Overloaded, SessionLost, StepFailed
from protocol.ids import SessionId
from protocol.specs import ModelSpec, Span
from runtime.tensors import dtype_of


class SessionKv:
    """One session's preallocated keys and values, each `[L, G, C, d]`, and how many positions are valid."""

    __slots__ = ("_keys_LGCd", "_values_LGCd", "capacity", "length")

    def __init__(self, shape_LGCd: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            self._keys_LGCd = torch.empty(shape_LGCd, dtype=dtype, device=device)
            self._values_LGCd = torch.empty(shape_LGCd, dtype=dtype, device=device)
        self.capacity = shape_LGCd[2]
        self.length = 0

    @property
    def num_bytes(self) -> int:
        """Bytes reserved."""
        return self._keys_LGCd.nbytes + self._values_LGCd.nbytes

    def extend(self, layer: int, start: int, keys_TGd: Tensor, values_TGd: Tensor) -> tuple[Tensor, Tensor]:
        """Write T rows at `start` of the cache's layer `layer` and return all up to them, `[G, S, d]` views each."""
        end = start + keys_TGd.shape[0]
        keys_GCd, values_GCd = self._keys_LGCd[layer], self._values_LGCd[layer]
        keys_GCd[:, start:end] = keys_TGd.transpose(0, 1)
        values_GCd[:, start:end] = values_TGd.transpose(0, 1)
        return keys_GCd[:, :end], values_GCd[:, :end]


class KvCache:
    """All sessions of one worker; the bytes reserved never exceed `budget_bytes`."""

    def __init__(
        self, spec: ModelSpec, *, layers: Span, num_groups: int, budget_bytes: int, device: torch.device
    ) -> None:
        self.layers = layers
        self.budget_bytes = budget_bytes
        self._num_groups = num_groups
        self._head_dim = spec.head_dim
        self._dtype = dtype_of(spec.activations)
        self._device = device
        self._bytes_per_position = spec.kv_bytes_per_token(num_groups, len(layers))
        self._sessions: dict[SessionId, SessionKv] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes reserved by all sessions."""
        return sum(kv.capacity for kv in self._sessions.values()) * self._bytes_per_position

    def lengths(self) -> dict[SessionId, int]:
        """Return how many positions are valid, by session."""
        return {session: kv.length for session, kv in self._sessions.items()}

    def begin(self, rows: tuple[SessionRows, ...]) -> tuple[SessionKv, ...]:
        """Return the caches that these rows extend, in order; opens sessions that start at 0, truncates repeated ones.

        Raises SessionLost when rows continue what is not here, Overloaded when new sessions don't fit the budget,
        StepFailed for a session that stands twice. Then nothing has changed.
        """
        if len({part.session for part in rows}) != len(rows):
            raise StepFailed("a session stands twice in one step", remedy="split its rows over two steps")
        for part in rows:
            self._require_history(part)
        fresh = [part for part in rows if self._needs_memory(part)]
        if fresh:
            self._require_room(fresh)
        for part in fresh:
            self._sessions.pop(part.session, None)  # before the new one is allocated, so that both never coexist
            shape = (len(self.layers), self._num_groups, part.capacity, self._head_dim)
            self._sessions[part.session] = SessionKv(shape, self._dtype, self._device)
        for part in rows:
            self._sessions[part.session].length = part.start
        return tuple(self._sessions[part.session] for part in rows)

    def commit(self, rows: tuple[SessionRows, ...]) -> None:
        """Count the rows of a finished step as valid; raises SessionLost for a session released meanwhile."""
        for part in rows:
            kv = self._sessions.get(part.session)
            if kv is None or kv.length != part.start:
                raise SessionLost(f"session {part.session} changed during its own step")
            kv.length = part.start + part.count

    def release(self, session: SessionId) -> None:
        """Forget a session; one that is not here is no error (the release may arrive twice)."""
        self._sessions.pop(session, None)

    def _require_history(self, part: SessionRows) -> None:
        if part.start == 0:
            return
        kv = self._sessions.get(part.session)
        if kv is None:
            raise SessionLost(f"session {part.session} is not here, its rows start at {part.start}")
        if kv.length < part.start:
            raise SessionLost(f"session {part.session} has {kv.length} positions here, its rows start at {part.start}")
        if part.start + part.count > kv.capacity:
            raise SessionLost(
                f"session {part.session} reserved {kv.capacity} positions, rows end at {part.start + part.count}",
                remedy="start it again from position 0 with the larger capacity",
            )

    def _needs_memory(self, part: SessionRows) -> bool:
        kv = self._sessions.get(part.session)
        return kv is None or (part.start == 0 and kv.capacity < part.capacity)

    def _require_room(self, fresh: list[SessionRows]) -> None:
        replaced = {part.session for part in fresh}
        kept = sum(kv.capacity for session, kv in self._sessions.items() if session not in replaced)
        wanted = kept * self._bytes_per_position
        for part in fresh:
            num_bytes = part.capacity * self._bytes_per_position
            if wanted + num_bytes > self.budget_bytes:
                raise Overloaded(
                    f"session {part.session} needs {num_bytes} bytes of KV cache, "
                    f"{max(0, self.budget_bytes - wanted)} of {self.budget_bytes} are free",
                    remedy="wait for a session to end, lower max_tokens, or give this worker more memory (--memory)",
                )
            wanted += num_bytes
