"""The public face: what it names, in order, and what importing it does not import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import manyhands
from protocol.errors import BY_CODE

ROOT = Path(manyhands.__file__).parent.parent


def test_all_is_sorted_and_complete() -> None:
    assert manyhands.__all__ == sorted(manyhands.__all__)
    public = {
        name
        for name, value in vars(manyhands).items()
        if not name.startswith("_") and getattr(value, "__module__", "").split(".")[0] in ("manyhands", "protocol")
    }
    assert public - {"release"} == set(manyhands.__all__) - {"__version__"}


def test_errors_that_a_caller_meets_are_exported() -> None:
    internal = {"LocalError", "RemoteError", "ProtocolViolation", "FrameMalformed", "FrameTooLarge", "InvariantBroken"}
    internal |= {"CoordinatorStale"}  # only workers meet it
    names = {kind.__name__ for kind in BY_CODE.values()}
    assert names - internal <= set(manyhands.__all__)


def test_a_client_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import manyhands; manyhands.AsyncClient; print(len(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
