"""`python -m coordinator`: a coordinator without the comfort of the `manyhands` command.

Knows nothing of settings or of serving. Prints one line a join link on standard output; it holds a one-time token.
"""

from __future__ import annotations

import sys

from coordinator.config import CoordinatorConfig
from coordinator.daemon import Callbacks, Ready
from coordinator.process import run_process
from coordinator.startup import CLIENT_LINK_FILE
from protocol.settings import run_main


def _run(config: CoordinatorConfig) -> int:
    def tell_ready(ready: Ready) -> None:
        print(f"ready: {','.join(ready.addresses)}", flush=True)
        print(f"client link: {config.state_folder / CLIENT_LINK_FILE}", flush=True)

    def tell_join_link(link: str) -> None:
        print(f"join: {link}", flush=True)

    return run_process(config, Callbacks(on_ready=tell_ready, on_join_link=tell_join_link))


def main() -> int:
    """Run with the arguments of this process; returns the exit code."""
    return run_main(CoordinatorConfig, "coordinator", sys.argv[1:], _run)


if __name__ == "__main__":
    sys.exit(main())
