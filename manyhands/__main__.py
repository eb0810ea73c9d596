"""`python -m manyhands`: the command.

Knows nothing else.
"""

from __future__ import annotations

import sys

from manyhands.cli import main

if __name__ == "__main__":
    sys.exit(main())
