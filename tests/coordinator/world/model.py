"""What stands for a model: the next token depends on all tokens before it, in their order.

Knows nothing of the cluster. `expected_answer` is what a single undisturbed machine would say.
"""

from __future__ import annotations

from core_cases import make_spec

VOCAB = 97
SPEC = make_spec(layers=4, max_positions=256, vocab=VOCAB)


class FoldedLog:
    """A log of tokens, of which only length and digest are kept."""

    def __init__(self) -> None:
        self.length = 0
        self._value = 1

    def extend(self, tokens: list[int]) -> None:
        for token in tokens:
            self._value = (self._value * 31 + token) % 1_000_003
        self.length += len(tokens)

    @property
    def next_token(self) -> int:
        return self._value % VOCAB


def expected_answer(prompt: list[int], max_tokens: int, stop_tokens: frozenset[int]) -> list[int]:
    """What a single machine would answer."""
    log, answer = FoldedLog(), list[int]()
    log.extend(prompt)
    while len(answer) < max_tokens and log.next_token not in stop_tokens:
        answer.append(log.next_token)
        log.extend(answer[-1:])
    return answer
