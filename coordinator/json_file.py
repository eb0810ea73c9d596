"""JSON of a model folder, read strictly: bounded, no duplicated keys, no NaN, an object at the top.

Knows nothing of what the keys mean.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NoReturn

from protocol.errors import CheckpointInvalid, ModelUnsupported

MAX_JSON_BYTES = 64 << 20
MAX_INT = 2**31 - 1


def read_json_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read one JSON object; raises CheckpointInvalid naming the file when it is absent, too large or not valid."""
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointInvalid(f"can't read {path}: {error.strerror or error}") from error
    if len(data) > max_bytes:
        raise CheckpointInvalid(f"{path} is larger than {max_bytes} bytes")
    return parse_json_object(data, str(path))


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """Parse one JSON object; `where` names it in the CheckpointInvalid that anything else raises."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointInvalid(f"{where} has the key {twice!r:.200} twice")
        return result

    def no_constant(name: str) -> NoReturn:
        raise CheckpointInvalid(f"{where} has the value {name}, which is no JSON")

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=without_duplicates, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointInvalid(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{where} holds a JSON {type(value).__name__}, not an object")
    return value


class JsonFields:
    """Typed access to one JSON object; every error names the file and the key."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def invalid(self, key: str, wanted: str) -> CheckpointInvalid:
        return CheckpointInvalid(f"{self.where}: {key!r} is {self.values.get(key)!r:.80}, expected {wanted}")

    def unsupported(self, key: str, why: str) -> ModelUnsupported:
        return ModelUnsupported(f"{self.where} has {key!r}: {self.values[key]!r:.80}, {why}")

    def positive(self, key: str, default: int | None = None) -> int:
        """A whole number in [1, 2^31); null counts as absent, and absent without a default is an error."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= MAX_INT:
            raise self.invalid(key, "a whole number from 1 on")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not _is_finite(value) or not value > 0:
            raise self.invalid(key, "a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; absent and null are false."""
        value = self.values.get(key)
        if value is not None and type(value) is not bool:
            raise self.invalid(key, "true or false")
        return bool(value)

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.invalid(key, "a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id, a list of them, or nothing."""
        value = self.values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(one) is not int or not 0 <= one <= MAX_INT for one in ids):
            raise self.invalid(key, "a token id or a list of them")
        return tuple(dict.fromkeys(ids))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False
