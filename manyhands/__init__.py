"""One big model on many small devices: the client, a cluster on this machine, and the errors they raise.

Imports no torch; the processes that compute are started, not imported.
"""

from __future__ import annotations

from manyhands.client import AsyncClient, AsyncGenerationStream
from manyhands.cluster import LocalCluster
from manyhands.options import Options
from manyhands.results import Generation, Piece
from manyhands.sync import Client, GenerationStream
from protocol.errors import (
    AccessRefused,
    BudgetTooSmall,
    Cancelled,
    CheckpointInvalid,
    ConfigInvalid,
    CoordinatorLost,
    DeadlineExceeded,
    LinkInvalid,
    ManyhandsError,
    ModelUnsupported,
    Overloaded,
    PeerLost,
    PlanImpossible,
    PromptTooLong,
    RequestInvalid,
    RequestUnknown,
    SessionLost,
    StepFailed,
    StorageFailed,
    StorageFull,
    TileUnavailable,
    TokenizerMissing,
    VersionMismatch,
)
from protocol.messages import FinishReason, Leg, Timings, Usage
from protocol.version import release

__version__ = release()

__all__ = [
    "AccessRefused",
    "AsyncClient",
    "AsyncGenerationStream",
    "BudgetTooSmall",
    "Cancelled",
    "CheckpointInvalid",
    "Client",
    "ConfigInvalid",
    "CoordinatorLost",
    "DeadlineExceeded",
    "FinishReason",
    "Generation",
    "GenerationStream",
    "Leg",
    "LinkInvalid",
    "LocalCluster",
    "ManyhandsError",
    "ModelUnsupported",
    "Options",
    "Overloaded",
    "PeerLost",
    "Piece",
    "PlanImpossible",
    "PromptTooLong",
    "RequestInvalid",
    "RequestUnknown",
    "SessionLost",
    "StepFailed",
    "StorageFailed",
    "StorageFull",
    "TileUnavailable",
    "Timings",
    "TokenizerMissing",
    "Usage",
    "VersionMismatch",
    "__version__",
]
