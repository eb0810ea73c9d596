"""From a caller's prompt and options to a checked `Generate` message with its payload.

Knows nothing of sockets. What can be judged without the model is refused here, before anything is sent.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict

from protocol.batches import Sampling
from protocol.errors import RequestInvalid
from protocol.ids import RequestId
from protocol.messages import MAX_PROMPT_BYTES, Generate, PromptKind

MAX_TOKENS = 2**31 - 1
MAX_STOPS = 16
MAX_STOP_LENGTH = 256
MAX_NAME_LENGTH = 64

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, str]]


class OptionFields(TypedDict, total=False):
    """The keyword arguments of `generate` and `chat`; `Options` says what they mean."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int
    stop: str | Sequence[str]
    ignore_eos: bool
    request: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How an answer is made.

    `temperature` 0 takes the likeliest token each time. `top_k` 0, `top_p` 1 and `min_p` 0 switch these filters off.
    The same seed gives the same tokens. The text ends before the first of the `stop` strings.

    `request` names the request, for who may ask twice: the same name is the same request, computed once, whoever says
    it until ten minutes after its end, and stopped for all by who closes it early; "": a fresh name. Raises
    RequestInvalid naming the value.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    request: str = ""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            _require(type(getattr(self, name)) is int, f"{name} must be an integer, not {getattr(self, name)!r:.80}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            _require(type(value) in (int, float), f"{name} must be a number, not {value!r:.80}")
        _require(1 <= self.max_tokens <= MAX_TOKENS, f"max_tokens {self.max_tokens} is outside [1, {MAX_TOKENS}]")
        _require(len(self.stops) <= MAX_STOPS, f"{len(self.stops)} stop strings exceed {MAX_STOPS}")
        for stop in self.stops:
            fits = isinstance(stop, str) and 1 <= len(stop) <= MAX_STOP_LENGTH
            _require(fits, f"stop string {stop!r:.80} must be text of 1 to {MAX_STOP_LENGTH} characters")
        _require(isinstance(self.request, str), f"request must be text, not {self.request!r:.80}")
        size = len(self.request)
        _require(size <= MAX_NAME_LENGTH, f"request has {size} characters, more than {MAX_NAME_LENGTH}")
        _utf8(self.request, "request's name")
        self.sampling()

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings; a lone string, which is also a sequence of its letters, is one stop string."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self) -> Sampling:
        """Return the part of the options that the head needs; raises RequestInvalid."""
        try:
            return Sampling(
                temperature=float(self.temperature),
                top_k=self.top_k,
                top_p=float(self.top_p),
                min_p=float(self.min_p),
                repetition_penalty=float(self.repetition_penalty),
                seed=self.seed,
            )
        except ValueError as error:
            raise RequestInvalid(str(error)) from error


class Order(NamedTuple):
    """A request ready to be sent."""

    message: Generate
    payload: bytes


def completion_order(request: RequestId, prompt: Prompt, options: Options) -> Order:
    """Ask to continue a text, or a sequence of token ids; raises RequestInvalid."""
    if isinstance(prompt, str):
        return _order(request, PromptKind.TEXT, _utf8(prompt, "prompt"), options)
    for position, token in enumerate(prompt):
        fits = type(token) is int and 0 <= token < 2**31
        _require(fits, f"prompt token {position} is {token!r:.80}, not an integer in [0, 2**31)")
    return _order(request, PromptKind.IDS, struct.pack(f"<{len(prompt)}i", *prompt), options)


def chat_order(request: RequestId, messages: Messages, options: Options) -> Order:
    """Ask for the next message of a conversation of {"role", "content"}; raises RequestInvalid."""
    _require(not isinstance(messages, str | Mapping) and len(messages) > 0, "a chat needs a list of messages")
    for number, message in enumerate(messages):
        fits = isinstance(message, Mapping) and set(message) == {"role", "content"}
        fits = fits and all(isinstance(value, str) for value in message.values())
        _require(fits, f"chat message {number} must be a mapping of text 'role' and 'content'")
    text = json.dumps([dict(message) for message in messages], ensure_ascii=False)
    return _order(request, PromptKind.CHAT, _utf8(text, "chat message"), options)


def _order(request: RequestId, kind: PromptKind, payload: bytes, options: Options) -> Order:
    size = len(payload)
    _require(size <= MAX_PROMPT_BYTES, f"the prompt has {size} bytes, more than {MAX_PROMPT_BYTES}")
    message = Generate(
        request=request,
        prompt_kind=kind,
        max_tokens=options.max_tokens,
        sampling=options.sampling(),
        stop=options.stops,
        ignore_eos=options.ignore_eos,
    )
    return Order(message, payload)


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # lone surrogates, as from a file name that is no UTF-8
        raise RequestInvalid(f"the {what} can't be written as UTF-8 at character {error.start}") from error


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise RequestInvalid(problem)
