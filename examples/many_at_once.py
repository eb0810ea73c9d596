"""Ask several questions at once over one connection: the workers compute them together, step by step.

    python examples/many_at_once.py

An answer does not depend on what else is computed with it: each equals the one that is asked alone.
"""

from __future__ import annotations

import asyncio
import time

from manyhands import AsyncClient, Generation, LocalCluster

PROMPTS = ("import json\n", "def main():\n", "class Point:\n", "for line in open(path):\n")


async def ask_all(link: str) -> list[Generation]:
    """Ask all prompts at once."""
    async with AsyncClient(link) as client:
        return list(await asyncio.gather(*(client.generate(prompt, max_tokens=24) for prompt in PROMPTS)))


def main() -> None:
    """Ask together, then one by one, and compare."""
    with LocalCluster(workers=2, plan="1,1") as cluster:
        began = time.monotonic()
        together = asyncio.run(ask_all(cluster.link))
        together_s = time.monotonic() - began
        client = cluster.client()
        began = time.monotonic()
        alone = [client.generate(prompt, max_tokens=24) for prompt in PROMPTS]
        alone_s = time.monotonic() - began
        for prompt, answer in zip(PROMPTS, together, strict=True):
            print(f"{prompt!r:28} -> {answer.text!r:.60}")
        same = [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
        print(f"\ntogether {together_s:.2f} s, one by one {alone_s:.2f} s, same answers: {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()
