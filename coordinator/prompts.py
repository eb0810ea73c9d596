"""Turns the payload of `Generate` into token ids, whatever kind of prompt it is.

Knows nothing of clients or sessions. Blocking, up to seconds for a long text: run it in a thread.
"""

from __future__ import annotations

import json
from typing import Any

from coordinator.events import token_bytes, token_ids
from coordinator.tokens import TextCodec
from protocol.errors import RequestInvalid, TokenizerMissing
from protocol.messages import PromptKind

MAX_CHAT_MESSAGES = 4096
CHAT_FORM = 'a chat is a JSON list of {"role": text, "content": text}'


def read_prompt(codec: TextCodec | None, kind: PromptKind, payload: bytes) -> bytes:
    """Return the prompt's token ids as little-endian int32.

    Raises RequestInvalid for a payload that is not of its kind, TokenizerMissing for text without a tokenizer, and
    what the tokenizer and the chat template raise. Whether the ids are in the vocabulary is for the core to say.
    """
    if kind is PromptKind.IDS:
        return _checked_ids(payload)
    if codec is None:
        raise TokenizerMissing("this model has no tokenizer, so it takes no text")
    if kind is PromptKind.TEXT:
        return token_bytes(codec.encode(_text(payload)))
    return token_bytes(codec.encode(codec.render_chat(_chat(payload)), add_special_tokens=False))


def _checked_ids(payload: bytes) -> bytes:
    try:
        token_ids(payload)
    except ValueError as error:
        raise RequestInvalid(
            f"token ids of {len(payload)} bytes are not little-endian int32", remedy="send 4 bytes a token"
        ) from error
    return payload


def _text(payload: bytes) -> str:
    try:
        return payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RequestInvalid(f"the prompt is not UTF-8: byte {error.start} ({error.reason})") from error


def _chat(payload: bytes) -> list[dict[str, Any]]:
    try:
        messages = json.loads(_text(payload))
    except (ValueError, RecursionError) as error:
        raise RequestInvalid(f"the chat is not JSON: {error!s:.200}", remedy=CHAT_FORM) from error
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_CHAT_MESSAGES:
        raise RequestInvalid(f"the chat is not a list of 1 to {MAX_CHAT_MESSAGES} messages", remedy=CHAT_FORM)
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise RequestInvalid(f"message {number} of the chat has no role or no content", remedy=CHAT_FORM)
    return messages
