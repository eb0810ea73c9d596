"""Run the small model that comes along on three worker processes of this machine, and ask it once.

    python examples/ask_once.py

The first two workers compute the first layers together, the third computes the rest: that is what "1,1/1" says.
"""

from __future__ import annotations

from manyhands import LocalCluster


def main() -> None:
    """Start, ask, show the answer and who computed it."""
    with LocalCluster(plan="1,1/1") as cluster:
        answer = cluster.client().generate("def fibonacci(n):\n", max_tokens=48, stop=("\n\n",))
        print(answer.text)
        print(f"\n{answer.usage.completion_tokens} tokens, {answer.tokens_per_second:.0f} a second, computed by:")
        for worker in cluster.workers:
            print(f"  {worker.name} (process {worker.pid})")


if __name__ == "__main__":
    main()
