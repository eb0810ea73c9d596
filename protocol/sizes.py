"""Sizes as people write them: "900MB", "1.5GiB", "30%".

Knows nothing of memory or disks; what a percentage is of, the caller says.
"""

from __future__ import annotations

import re
from typing import Final

from protocol.errors import ConfigInvalid

_SIZE = re.compile(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*|%)\s*")
_UNITS: Final = {
    "": 1,
    "b": 1,
    **{letter + "b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{letter + "ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
    **{letter: 1024**power for power, letter in enumerate("kmgt", start=1)},  # as ulimit, docker and systemd read it
}
MAX_BYTES: Final = 2**53


def parse_bytes(text: str, whole: int | None = None) -> int:
    """Return the bytes that `text` means: "900MB" (1000s), "1.5GiB" or "2G" (1024s), "4096", or "30%" of `whole`.

    Raises ConfigInvalid when it is no size, exceeds 2**53, or is a percentage where none makes sense.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigInvalid(f"size {text!r:.40} is not like 900MB, 1.5GiB or 30%")
    number, unit = match.groups()
    if unit == "%":
        if whole is None:
            raise ConfigInvalid(f"size {text!r:.40}: a percentage makes no sense here")
        if float(number) > 100:
            raise ConfigInvalid(f"size {text!r:.40} is more than 100%")
        return int(whole * float(number) / 100)
    if unit.lower() not in _UNITS:
        raise ConfigInvalid(f"size {text!r:.40}: unknown unit {unit!r}")
    num_bytes = int(float(number) * _UNITS[unit.lower()]) if "." in number else int(number) * _UNITS[unit.lower()]
    if num_bytes > MAX_BYTES:
        raise ConfigInvalid(f"size {text!r:.40} is more than {MAX_BYTES} bytes")
    return num_bytes


def check_size(text: str) -> str:
    """Return the text unchanged when it is a size or a percentage; raises ConfigInvalid."""
    parse_bytes(text, whole=MAX_BYTES)
    return text
