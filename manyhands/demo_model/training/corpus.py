"""The corpus: the Python source of a standard library, divided into what is trained on and what is held out.

Knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

# Folders left out: third-party code, tests, and big tables that are data rather than code.
SKIPPED_FOLDERS = frozenset({"site-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"})


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every module under root, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        try:
            text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\f", "")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield relative.as_posix(), text


def is_held_out(name: str) -> bool:
    """Choose about one file in thirty for evaluation, by the hash of its path, so the choice never moves."""
    return hashlib.sha256(name.encode()).digest()[0] < 9


def read_corpus(root: Path) -> tuple[list[str], list[str]]:
    """Return the training texts and the held-out texts."""
    train: list[str] = []
    held_out: list[str] = []
    for name, text in source_files(root):
        (held_out if is_held_out(name) else train).append(text)
    return train, held_out
