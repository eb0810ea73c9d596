"""Text to token ids and back: the model folder's tokenizer, streaming decoding, stop strings, chat prompts.

Knows nothing of sessions or HTTP. `tokenizers` and `jinja2` (extra `serve`) are imported when a folder is loaded, so
that a coordinator that only serves token ids needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from coordinator.json_file import JsonFields, read_json_object
from protocol.errors import CheckpointInvalid, ConfigInvalid, RequestInvalid, TokenizerMissing

if TYPE_CHECKING:
    from coordinator.chat_template import ChatTemplate

MAX_TEMPLATE_BYTES = 4 << 20
REPLACEMENT = "\ufffd"
MAX_HELD_IDS = 32  # more without a whole character is no UTF-8, and is shown as it is
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _TemplateSource(NamedTuple):
    text: str
    where: str


class TextCodec:
    """The tokenizer of one model folder. Calls are thread-safe; a `TextStream` belongs to one session."""

    def __init__(
        self,
        tokenizer: Any,
        special_tokens: Mapping[str, str],
        template: _TemplateSource | None,
        now: Callable[[], datetime],
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self._source = template
        self._template: ChatTemplate | None = None
        self._now = now

    @classmethod
    def load(cls, folder: Path, now: Callable[[], datetime] = datetime.now) -> TextCodec:
        """Load tokenizer.json and the chat template; `now` is the local time that templates may print.

        Raises TokenizerMissing without a tokenizer.json, ConfigInvalid when the extra `serve` is not installed,
        CheckpointInvalid for a file that can't be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise TokenizerMissing(f"{folder} has no tokenizer.json")
        try:
            import jinja2  # noqa: F401 - told here, not at the first chat
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ConfigInvalid(
                f"text needs a package that is not installed: {error.name}",
                remedy="pip install 'manyhands[serve]', or send token ids instead of text",
            ) from error
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointInvalid(f"{path} is no tokenizer: {error}") from error
        tokenizer.no_truncation()  # a file may carry its training's cut; a prompt must never be cut silently
        tokenizer.no_padding()
        config = _optional_object(folder / "tokenizer_config.json")
        special = _special_tokens(config) | _special_tokens(_optional_object(folder / "special_tokens_map.json"))
        return cls(tokenizer, special | _special_tokens(config), _template_source(folder, config), now)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return token ids, with those that the tokenizer's post-processor adds unless `add_special_tokens` is false.

        A prompt made by `render_chat` holds its special tokens already. Raises RequestInvalid for lone surrogates.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestInvalid(f"the prompt is not valid Unicode: {error.reason} at {error.start}") from error
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Return a decoder for one answer, fed id by id."""
        return TextStream(self._tokenizer, skip_special_tokens)

    @property
    def can_chat(self) -> bool:
        """Whether the folder has a chat template."""
        return self._source is not None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return the prompt for `messages`; encode it with `add_special_tokens=False`.

        Raises RequestInvalid when there are no messages or no template, or the template refuses them, and
        CheckpointInvalid when the template itself is broken.
        """
        if not messages:
            raise RequestInvalid("a chat needs at least one message")
        if self._source is None:
            raise RequestInvalid("this model has no chat template", remedy="send a plain prompt to /v1/completions")
        if self._template is None:
            from coordinator.chat_template import ChatTemplate

            self._template = ChatTemplate(self._source.text, self._source.where, self._now)
        variables = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        return self._template.render(messages, {**variables, **self._special_tokens})


class TextStream:
    """Decodes one answer as its ids arrive; holds back the bytes of an unfinished character.

    The pieces joined, with that of `finish`, are the decoding of all ids at once, as long as the ids spell valid UTF-8.
    Ids that don't never raise, unlike `tokenizers.decoders.DecodeStream` ("Invalid prefix encountered"): a model may
    sample any bytes. The window over the last ids is that of the same algorithm (text-generation-inference).
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window: list[int] = []  # ids of the last piece, whose text gives the context, and those held back
        self._num_shown = 0  # of the window, how many ids
        self._shown = ""  # and their text

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=self._skip_special_tokens))

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, possibly none."""
        self._window.append(token_id)
        text = self._decode()
        is_unfinished = text.endswith(REPLACEMENT) and len(self._window) - self._num_shown <= MAX_HELD_IDS
        if is_unfinished or len(text) <= len(self._shown):
            return ""
        piece = text[len(self._shown) :]
        del self._window[: self._num_shown]
        self._num_shown, self._shown = len(self._window), self._decode()
        return piece

    def finish(self) -> str:
        """Return what was held back: an unfinished character becomes U+FFFD, as in a whole decoding."""
        rest = self._decode()[len(self._shown) :]
        self._num_shown, self._shown = len(self._window), self._shown + rest
        return rest


class Found(NamedTuple):
    """Text that may be shown, and whether a stop string ended it."""

    text: str
    stopped: bool


class StopFinder:
    """Cuts a stream of text at the first stop string, however the pieces fall.

    First is the one that ends first, and of those the one that starts first. Text that may yet become a stop string is
    held back. Pure: the result depends only on the joined text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raise RequestInvalid for an empty stop string, which would end every answer at once."""
        if not all(stops):
            raise RequestInvalid("a stop string is empty", remedy="leave it out")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> Found:
        """Return the text up to a stop string or a possible beginning of one; nothing once stopped."""
        if self._stopped:
            return Found("", True)
        text = self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held, self._stopped = "", True
            return Found(text[: min(ends)[1]], True)
        keep = self._num_held(text)
        self._held = text[len(text) - keep :]
        return Found(text[: len(text) - keep], False)

    def finish(self) -> str:
        """Return what was held back, as no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0


def _optional_object(path: Path) -> JsonFields:
    return JsonFields(read_json_object(path) if path.exists() else {}, str(path))


def _special_tokens(config: JsonFields) -> dict[str, str]:
    """Return the special tokens a file names, as strings or as objects with `content`."""
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = config.values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is None:
            continue
        if not isinstance(value, str):
            raise config.invalid(name, "a token's text")
        tokens[name] = value
    return tokens


def _template_source(folder: Path, config: JsonFields) -> _TemplateSource | None:
    """Return chat_template.jinja, else the template in tokenizer_config.json: a string, or the "default" of a list."""
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            with path.open("rb") as file:
                data = file.read(MAX_TEMPLATE_BYTES + 1)
            if len(data) > MAX_TEMPLATE_BYTES:
                raise CheckpointInvalid(f"{path} exceeds {MAX_TEMPLATE_BYTES} bytes")
            return _TemplateSource(data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointInvalid(f"can't read {path}: {error}") from error
    template = config.values.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if template is None:
        return None
    if not isinstance(template, str):
        raise CheckpointInvalid(f"{config.where}: 'chat_template' is neither a string nor a list of named ones")
    return _TemplateSource(template, config.where)
