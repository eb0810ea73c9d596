"""What happens to a worker's control side, and what it then does: the events and effects of `worker.state`.

Knows nothing of which event leads to which effect.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.errors import ManyhandsError
from protocol.ids import WorkerId
from protocol.messages import Fault, Holder, LinkOrder, Load, Loaded
from protocol.plans import Plan
from protocol.tiles import TileEntry
from worker.commands import NO_ORDERS, Failed, KvOrders, Ready, TilesSpoiled


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcomed:
    """The coordinator has let us in; another `term` than before means that it has restarted and counts anew."""

    worker: WorkerId
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ordered:
    """A `Load` came."""

    plan: Plan
    links: tuple[LinkOrder, ...]
    entries: tuple[TileEntry, ...]
    kv: KvOrders = NO_ORDERS
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """All tiles of this epoch are on disk."""

    epoch: int
    fetched_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchFailed:
    """The tiles of this epoch can't be had."""

    epoch: int
    error: ManyhandsError


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloaded:
    """An `Unload` came."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Silent:
    """The coordinator was not heard for the length of its lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldOver:
    """No plan has come for as long as the last one's leavings are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveWanted:
    """The owner wants this worker to end, and what it does to be handed over before."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LetGo:
    """A `Goodbye` came, or none within the time that handing over may take."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAsked:
    """The owner wants this worker to end now."""

    reason: str


News = Fetched | FetchFailed | Ready | TilesSpoiled | Failed
Event = Welcomed | Ordered | Unloaded | Silent | HoldOver | LeaveWanted | LetGo | StopAsked | News


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginPlan:
    """Tell the compute thread of the plan, and admit its neighbours."""

    plan: Plan
    links: tuple[LinkOrder, ...]
    kv: KvOrders = NO_ORDERS


@dataclass(frozen=True, slots=True, kw_only=True)
class StartFetch:
    """Fetch what is missing of these tiles, from these holders if they can, in place of any fetch under way."""

    epoch: int
    entries: tuple[TileEntry, ...]
    holders: tuple[Holder, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StopFetch:
    """Give up the fetch under way; what came stays on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartLoad:
    """Have the compute thread load the tiles."""

    epoch: int
    entries: tuple[TileEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldPlan:
    """Have the compute thread end this epoch and keep what it left; say `HoldOver` when that has been long."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DropPlan:
    """Have the compute thread free everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Send this to the coordinator."""

    message: Loaded | Fault


@dataclass(frozen=True, slots=True, kw_only=True)
class AskToLeave:
    """Ask the coordinator to take over; say `LetGo` when that takes too long."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Say goodbye and end."""

    reason: str


Effect = BeginPlan | StartFetch | StopFetch | StartLoad | HoldPlan | DropPlan | Tell | AskToLeave | End


def ordered_by(load: Load, entries: tuple[TileEntry, ...]) -> Ordered:
    """Return the event of a `Load` whose payload is the manifest lines `entries`."""
    kv = KvOrders(carries=load.carries, gives=load.gives, takes=load.takes, mirrors=load.mirrors)
    return Ordered(plan=load.plan, links=load.links, entries=entries, kv=kv, holders=load.holders)
