"""Follow one answer: its text as it comes, what it waits for meanwhile, and what it cost at the end.

Knows nothing of how it is asked for.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

import click

from manyhands.client import AsyncGenerationStream
from manyhands.results import Generation
from protocol.messages import Leg

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


def provenance_option() -> click.Option:
    """Return the flag that has `legs_text` printed."""
    return click.Option(["--provenance"], is_flag=True, help="Say at the end who computed what (on standard error).")


def legs_text(legs: Sequence[Leg]) -> str:
    """Return who computed an answer, in lines: for every plan its tokens, its stages, and why the one before ended."""
    lines = []
    for number, leg in enumerate(legs):
        end = f" to {legs[number + 1].start}" if number + 1 < len(legs) else " on"
        why = f", after {leg.cause}" if leg.cause else ""
        of = f"layers {leg.layers.start} to {leg.layers.end - 1} of " if len(leg.layers) else ""
        again = f"; {of}{leg.repeated} positions were computed again" if leg.repeated else ""
        lines.append(f"from token {leg.start + 1}{end}: plan {leg.words}{why}{again}")
        lines += [f"  {stage}" for stage in leg.stages]
    return "\n".join(lines)


def json_text(answer: Generation) -> str:
    """Return an answer as one JSON object."""
    return json.dumps(asdict(answer) | {"tokens_per_second": answer.tokens_per_second}, ensure_ascii=False)
