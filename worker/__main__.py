"""`python -m worker`: a worker without the comfort of the `manyhands` command.

Knows nothing of settings or of working.
"""

from __future__ import annotations

import sys

from protocol.heap import restart_with_steady_heap
from protocol.process import end_quietly_when_told
from protocol.settings import run_main
from worker.config import WorkerConfig


def _run(config: WorkerConfig) -> int:
    from worker.daemon import run  # torch is loaded only when there is work for it

    return run(config)


def main() -> int:
    """Run with the arguments of this process; returns the exit code."""
    end_quietly_when_told()
    return run_main(WorkerConfig, "worker", sys.argv[1:], _run)


if __name__ == "__main__":
    restart_with_steady_heap()
    sys.exit(main())
