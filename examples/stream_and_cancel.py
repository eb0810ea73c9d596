"""Follow an answer as it comes, and stop it half way: the workers stop, too.

    python examples/stream_and_cancel.py

With a coordinator of your own (`manyhands up MODEL`) replace the cluster by `Client()`.
"""

from __future__ import annotations

from manyhands import LocalCluster

ENOUGH = 60  # characters


def main() -> None:
    """Print the pieces until there is enough text, then leave the stream."""
    with LocalCluster(workers=2, plan="1/1") as cluster:
        client = cluster.client()
        text = ""
        with client.generate("class Queue:\n", max_tokens=500, ignore_eos=True, stream=True) as stream:
            for piece in stream:
                text += piece.text
                print(piece.text, end="", flush=True)
                if len(text) >= ENOUGH:
                    break  # leaving the `with` block cancels the request
        print(f"\n[stopped after {len(text)} characters]")
        # The cluster is free for the next question at once.
        answer = client.generate("import os\n", max_tokens=8)
        print(f"[then asked again: {answer.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    main()
