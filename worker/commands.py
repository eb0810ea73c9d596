"""What the control side tells the compute thread, and what that reports back.

Knows nothing of queues or threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.errors import CoordinatorLost, ManyhandsError
from protocol.ids import SessionId, WorkerId
from protocol.messages import Carry, HeldKv, KvMove, LinkOrder
from protocol.plans import Plan
from protocol.tiles import TileEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Connect the data connection to this coordinator; `nonce` is the one of the control connection's name."""

    worker: WorkerId
    address: str
    server_key: bytes
    nonce: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvOrders:
    """What becomes of keys and values under a new plan, as `Load` says it."""

    carries: tuple[Carry, ...] = ()
    gives: tuple[KvMove, ...] = ()
    takes: tuple[KvMove, ...] = ()
    mirrors: tuple[KvMove, ...] = ()


NO_ORDERS: Final = KvOrders()


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """End the plan before and make the links of this one."""

    plan: Plan
    links: tuple[LinkOrder, ...]
    kv: KvOrders = NO_ORDERS


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTiles:
    """All tiles are on disk: load them."""

    epoch: int
    entries: tuple[TileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """This epoch, and any before it, is over: compute no more, and keep what is held for the next."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """There is no next plan to expect: free everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """These sessions are over."""

    sessions: tuple[SessionId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """End the thread."""


Command = Attach | Begin | LoadTiles | Rest | Drop | Forget | Stop
URGENT = (Begin, Rest, Drop, Stop)
"""Commands that end a step or a load that is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """Tiles are loaded and links are made: this worker can compute under this epoch."""

    epoch: int
    weight_bytes: int
    resident_bytes: int
    load_s: float
    predicted_bytes: int = 0
    pinned_bytes: int = 0
    window_bytes: int = 0
    held: tuple[HeldKv, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TilesSpoiled:
    """A tile on disk was missing or altered and has to be fetched again."""

    epoch: int
    error: ManyhandsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The compute thread could not go on under this epoch; `lost` names the neighbour that is gone, if that is why."""

    epoch: int
    error: ManyhandsError
    lost: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LineBroke:
    """The data connection that was attached under this nonce is gone, and maybe a frame with it."""

    nonce: str
    error: CoordinatorLost


Report = Ready | TilesSpoiled | Failed | LineBroke
