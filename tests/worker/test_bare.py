"""A worker computes where phones are: without safetensors, tokenizers and uvloop."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_cluster import SPEC, TinyCluster, plan_of

from protocol.plans import Plan
from protocol.specs import Span

ABSENT = ("safetensors", "tokenizers", "uvloop", "transformers", "jinja2", "huggingface_hub")
PROMPT = [3, 1, 4, 1, 5]
HERE = Path(__file__).parent
SCRIPT = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
import worker.daemon
from pathlib import Path
from test_bare import tokens
print(tokens(Path(sys.argv[1])))
"""


def two_hands() -> Plan:
    """Two members and a star."""
    members = [("a", Span(0, 1), Span(0, 2)), ("b", Span(1, 2), Span(2, 3))]
    return plan_of([(Span(0, SPEC.layers), members, 0)], head="a")


def tokens(folder: Path) -> list[int]:
    """What two workers' compute threads answer."""
    cluster = TinyCluster(folder)
    try:
        cluster.add("a")
        cluster.add("b")
        plan = two_hands()
        cluster.form(plan)
        return cluster.greedy(plan, PROMPT, 8)
    finally:
        cluster.close()


def test_the_same_tokens_without_the_packages_that_phones_lack(tmp_path: Path) -> None:
    path = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "bare")],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tokens(tmp_path / "full"))
