"""Follow one answer: its text as it comes, what it waits for meanwhile, and what it cost at the end.

Knows nothing of how it is asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import asdict

from manyhands.client import AsyncGenerationStream
from manyhands.results import Generation

LOOK_EVERY_S = 0.5

Write = Callable[[str], None]


async def follow(stream: AsyncGenerationStream, write: Write, note: Write) -> Generation:
    """Write the text of a stream piece by piece; `note` is told what it waits for, whenever that changes.

    Cancelling it stops the work. Raises what the stream raises.
    """
    async with stream:
        waits_for = ""
        while True:
            piece = asyncio.ensure_future(stream.next_piece())
            try:
                while not (await asyncio.wait({piece}, timeout=LOOK_EVERY_S))[0]:
                    if stream.waits_for != waits_for:
                        waits_for = stream.waits_for
                        note(waits_for)
            finally:
                piece.cancel()
            if waits_for:
                waits_for = ""
                note("")
            if (got := piece.result()) is None:
                return stream.result
            if got.text:
                write(got.text)


def stats_text(answer: Generation) -> str:
    """Return one line on what an answer cost."""
    first_ms = answer.timings.first_token_s * 1000
    return (
        f"{answer.usage.completion_tokens} tokens ({answer.usage.prompt_tokens} in the prompt), "
        f"first after {first_ms:.0f} ms, {answer.tokens_per_second:.1f} tokens/s, ended by {answer.finish_reason.value}"
    )


def json_text(answer: Generation) -> str:
    """Return an answer as one JSON object."""
    return json.dumps(asdict(answer) | {"tokens_per_second": answer.tokens_per_second}, ensure_ascii=False)
