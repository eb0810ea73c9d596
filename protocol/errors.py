"""The one tree of errors, with a wire code and a remedy for each.

Knows nothing of sockets: an error travels as an `ErrorReport` message and becomes the same class on the other side.

    ManyhandsError
    ├── LocalError                  this side was asked for something it can't do
    │   ├── ConfigInvalid           a flag, environment variable or configuration file
    │   ├── LinkInvalid             a join or client link that can't be read
    │   ├── RequestInvalid          a prompt or sampling value
    │   │   ├── RequestUnknown      a request to go on with that nobody remembers
    │   │   └── PromptTooLong       prompt and max_tokens don't fit the context
    │   ├── ModelUnsupported        architecture or config field we don't compute
    │   ├── CheckpointInvalid       missing, misshapen, truncated or altered model file
    │   ├── TokenizerMissing        text asked of a model folder that has no tokenizer
    │   ├── PlanImpossible          no plan fits the devices or the words of the plan
    │   ├── BudgetTooSmall          a worker's memory budget can't hold what it was asked to
    │   ├── StorageFull             no room on this disk
    │   ├── StorageFailed           this disk can't be read or written
    │   └── InvariantBroken         a bug of ours, told instead of hidden
    └── RemoteError                 the other side, or the way to it, failed
        ├── ProtocolViolation       a frame that breaks the protocol
        │   ├── FrameMalformed      can't be decoded, or a field is out of bounds
        │   ├── FrameTooLarge       larger than its bound; refused before memory is taken
        │   └── VersionMismatch     no protocol version in common
        ├── AccessRefused           unknown key, spent or wrong token, role not allowed
        ├── PeerLost                a worker vanished, froze or left
        ├── CoordinatorLost         the coordinator does not answer
        ├── CoordinatorStale        a coordinator that was replaced, and does not know
        ├── SessionLost             a session's state is gone, and can't be computed again
        ├── StepFailed              a worker could not compute a step
        ├── TileUnavailable         a tile can't be had, or arrives altered again and again
        ├── Overloaded              try again later: queue or memory full, or the model is still forming
        ├── Cancelled               somebody asked to stop
        └── DeadlineExceeded        a wait made no progress until its deadline
"""

from __future__ import annotations

from typing import ClassVar


class ManyhandsError(Exception):
    """Base of all errors of this project.

    `message` says what happened, `remedy` what the reader can do, `node` and `phase` where and when.
    """

    code: ClassVar[str] = "internal"
    can_retry: ClassVar[bool] = False
    default_remedy: ClassVar[str] = ""

    def __init__(self, message: str, *, remedy: str = "", node: str = "", phase: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy or self.default_remedy
        self.node = node
        self.phase = phase

    def __str__(self) -> str:
        where = f" [{', '.join(part for part in (self.node, self.phase) if part)}]" if self.node or self.phase else ""
        remedy = f" ({self.remedy})" if self.remedy else ""
        return f"{self.message}{where}{remedy}"


class LocalError(ManyhandsError):
    """This side was asked for something it can't do."""

    code = "local"


class ConfigInvalid(LocalError):
    """A flag, environment variable or configuration file can't be used."""

    code = "config-invalid"
    default_remedy = "see --print-config for every key and where its value comes from"


class LinkInvalid(LocalError):
    """A join or client link can't be read."""

    code = "link-invalid"
    default_remedy = "copy the whole link that `manyhands up` or `manyhands invite` printed"


class RequestInvalid(LocalError):
    """A prompt or a sampling value is unusable."""

    code = "request-invalid"


class RequestUnknown(RequestInvalid):
    """A request that was to go on is not known: it ended long ago, or was never here."""

    code = "request-unknown"
    default_remedy = "ask again; ended requests are remembered for ten minutes"


class PromptTooLong(RequestInvalid):
    """Prompt and max_tokens don't fit the model's context."""

    code = "prompt-too-long"
    default_remedy = "shorten the prompt or lower max_tokens"


class ModelUnsupported(LocalError):
    """An architecture, or a config field that changes the arithmetic, is not computed here."""

    code = "model-unsupported"


class CheckpointInvalid(LocalError):
    """A model file is missing, misshapen, truncated or altered."""

    code = "checkpoint-invalid"
    default_remedy = "download or copy the model folder again"


class TokenizerMissing(LocalError):
    """Text was asked of a model folder that has no tokenizer.json."""

    code = "tokenizer-missing"
    default_remedy = "put the model's tokenizer.json into its folder, or send token ids instead of text"


class PlanImpossible(LocalError):
    """No plan fits the devices, or the plan's words can't be carried out."""

    code = "plan-impossible"


class BudgetTooSmall(LocalError):
    """A worker's memory budget can't hold what it was asked to hold."""

    code = "budget-too-small"
    default_remedy = "give more memory (--memory), fewer tiles here (--plan), or a smaller dtype (--dtype)"


class StorageFull(LocalError):
    """There is no room on this disk, or under its limit."""

    code = "storage-full"
    default_remedy = "free space, or point the cache elsewhere (--cache-dir) or raise its limit (--cache-limit)"


class StorageFailed(LocalError):
    """A file on this disk can't be read or written."""

    code = "storage-failed"
    can_retry = True
    default_remedy = "check the disk; what was cached on it is fetched again"


class InvariantBroken(LocalError):
    """A bug of ours, told instead of hidden."""

    code = "invariant-broken"
    default_remedy = "please report this with the log of the node it names"


class RemoteError(ManyhandsError):
    """The other side, or the way to it, failed."""

    code = "remote"


class ProtocolViolation(RemoteError):
    """A frame breaks the protocol."""

    code = "protocol-violation"


class FrameMalformed(ProtocolViolation):
    """A frame can't be decoded, or one of its fields is out of bounds."""

    code = "frame-malformed"


class FrameTooLarge(ProtocolViolation):
    """A frame is larger than its bound; it was refused before memory was taken."""

    code = "frame-too-large"


class VersionMismatch(ProtocolViolation):
    """Two nodes have no protocol version in common."""

    code = "version-mismatch"
    default_remedy = "install the same release of manyhands on both"


class AccessRefused(RemoteError):
    """A key is unknown, a token is spent or wrong, or the role does not allow this."""

    code = "access-refused"
    default_remedy = "get a fresh link with `manyhands invite`"


class PeerLost(RemoteError):
    """A worker vanished, froze or left."""

    code = "peer-lost"
    can_retry = True
    default_remedy = "ask again; the model re-forms over the workers that are left, or when the lost one is back"


class CoordinatorLost(RemoteError):
    """The coordinator does not answer."""

    code = "coordinator-lost"
    can_retry = True
    default_remedy = "check that `manyhands up` runs and that the link's address and server key are right"


class CoordinatorStale(RemoteError):
    """A coordinator of an older term wants to be obeyed."""

    code = "coordinator-stale"
    can_retry = True
    default_remedy = (
        "stop this coordinator: a newer one has taken its place; if its folder came back from a backup, "
        "let the worker join anew from an empty state folder"
    )


class SessionLost(RemoteError):
    """A session's state is gone, from a worker or for the coordinator, and it can't go on as it was."""

    code = "session-lost"
    can_retry = True


class StepFailed(RemoteError):
    """A worker could not compute a step."""

    code = "step-failed"
    can_retry = True


class TileUnavailable(RemoteError):
    """A tile can't be had, or arrives altered again and again."""

    code = "tile-unavailable"
    can_retry = True


class Overloaded(RemoteError):
    """Try again later: a queue or memory is full, or the model is still forming."""

    code = "overloaded"
    can_retry = True


class Cancelled(RemoteError):
    """Somebody asked to stop."""

    code = "cancelled"


class DeadlineExceeded(RemoteError):
    """A wait made no progress until its deadline."""

    code = "deadline-exceeded"
    can_retry = True


def _subclasses(root: type[ManyhandsError]) -> list[type[ManyhandsError]]:
    return [root] + [leaf for child in root.__subclasses__() for leaf in _subclasses(child)]


BY_CODE: dict[str, type[ManyhandsError]] = {kind.code: kind for kind in _subclasses(ManyhandsError)}


def from_code(code: str, message: str, *, remedy: str = "", node: str = "", phase: str = "") -> ManyhandsError:
    """Rebuild an error that arrived by wire; an unknown code of a newer peer becomes a `RemoteError`."""
    kind = BY_CODE.get(code, RemoteError)
    return kind(message, remedy=remedy, node=node, phase=phase)
