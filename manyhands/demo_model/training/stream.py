"""The token stream, cut into the windows that the model is trained and measured on.

Shape legend: B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training.tokenizer import BOS, BOS_ID, NEWLINE, SPACE, Ids


class Stream:
    """The token stream of the training files, cut anew into windows for every epoch."""

    def __init__(self, tokenizer: Tokenizer, ids: Ids, seed: int, split_share: float = 0.04) -> None:
        self.ids = ids
        self.random = np.random.default_rng(seed)
        self.split_share = split_share
        numbers = tokenizer.get_vocab()
        pieces = sorted(numbers, key=lambda piece: numbers[piece])
        self.space_id = numbers[SPACE]
        self.ends_line = np.array([set(piece) == {NEWLINE} or piece == BOS for piece in pieces])
        self.without_space = np.array(
            [numbers.get(p[1:], -1) if p[0] == SPACE and p[1:].strip(SPACE) else -1 for p in pieces]
        )

    def with_split_spaces(self) -> Ids:
        """Split a few " word" tokens into " " and "word", so that a prompt may end with a space."""
        bare = self.without_space[self.ids]
        chosen = (bare >= 0) & (self.random.random(len(self.ids)) < self.split_share)
        ids = np.where(chosen, bare, self.ids)
        return np.insert(ids, np.flatnonzero(chosen), self.space_id)

    def epoch(self, length: int) -> tuple[Ids, Ids]:
        """Return (stream, starts): windows of length + 1 tokens that start after a line end, in random order."""
        ids = self.with_split_spaces()
        starts = line_windows(ids, self.ends_line, length, int(self.random.integers(length)))
        return ids, self.random.permutation(starts)

    def batches(self, tokens: int, length: Callable[[], int]) -> Iterator[Tensor]:
        """Yield batches (B, T+1) of about `tokens` positions for ever; length() is asked at the start of an epoch."""
        ids, starts, size = self.ids, np.zeros(0, dtype=np.int64), 0
        while True:
            rows = tokens // max(size, 1)
            if size != length() or len(starts) < rows:
                size = length()
                rows = tokens // size
                ids, starts = self.epoch(size)
            yield windows(ids, starts[:rows], size)
            starts = starts[rows:]


def line_windows(ids: Ids, ends_line: npt.NDArray[np.bool_], length: int, offset: int) -> Ids:
    """Return window starts about `length` apart; each is the last token before a line (a line end or BOS)."""
    line_ends = np.flatnonzero(ends_line[ids])
    wanted = np.arange(offset, len(ids) - 2 * length, length)
    return line_ends[np.searchsorted(line_ends, wanted)]


def windows(ids: Ids, starts: Ids, length: int) -> Tensor:
    """Cut windows (B, T+1) and put BOS first, as a prompt has it."""
    rows = np.stack([ids[start : start + length + 1] for start in starts])
    rows[:, 0] = BOS_ID
    return torch.from_numpy(rows)


def held_out_batches(stream: Stream, ids: Ids, length: int, limit: int = 160) -> list[Tensor]:
    """Cut the held-out stream into batches of eight windows, at most `limit` windows in all."""
    starts = line_windows(ids, stream.ends_line, length, 0)[:limit]
    return [windows(ids, starts[i : i + 8], length) for i in range(0, len(starts) - 7, 8)]
