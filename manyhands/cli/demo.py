"""`manyhands demo`: the model that comes along, on worker processes of this machine, with all there is to see.

Knows nothing of how a cluster is made (`manyhands.cluster`).
"""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import click

from manyhands.cli.flags import Configuration, print_settings, settings_options
from manyhands.cli.join import require_torch
from manyhands.cli.news import LoadMeter, news
from manyhands.cli.screen import WaitNote, console, table
from manyhands.cli.tables import PLAN_HEADINGS, STREAM_HEADINGS, model_line, plan_line, plan_rows, stream_rows
from manyhands.cluster import LocalCluster
from manyhands.config import DemoConfig
from manyhands.connection import Status
from manyhands.results import Generation
from manyhands.sync import GenerationStream

TOP_P = 0.9  # small models wander in the long tail
KILL_AFTER = 8  # pieces of the second answer


def command() -> click.Command:
    """Return the command."""
    parameters = settings_options(DemoConfig)
    text = "Run the small model that comes along on worker processes of this machine, and show who did what."
    return click.Command("demo", params=parameters, callback=run, help=text)


def run(**given: Any) -> None:
    """Start, generate, show, end; raises what `LocalCluster` and the client raise."""
    loaded = Configuration(given).load(DemoConfig, "demo", uses_file=False)
    if given["print_config"]:
        print_settings(loaded)
        return
    require_torch()
    config = loaded.config
    began = time.monotonic()
    with WaitNote(line_every_s=1.0) as note:
        note.line(f"starting a coordinator and its workers on this machine, plan {config.plan}")
        see, memory = Narrator(note).see, config.memory or None
        cluster = LocalCluster(plan=config.plan, dtype=config.dtype, memory=memory, on_status=see)
        note.line(f"up after {time.monotonic() - began:.1f} s")
    with cluster:
        status = cluster.status()
        console().print(f"model {model_line(status)}\n")
        answer = _speak(cluster, config)
        pids = {worker.name: worker.pid for worker in cluster.workers}
        _show(cluster.status(), pids, answer)
        if config.kill and len(pids) > 1:
            _lose_one(cluster, config, answer)


class Narrator:
    """Tells what happens while a cluster starts."""

    def __init__(self, note: WaitNote) -> None:
        self._note = note
        self._before: Status = {}
        self._meter = LoadMeter()

    def see(self, status: Status) -> None:
        """Take a look at the status and tell what is new."""
        for line in news(self._before, status):
            self._note.line(line)
        self._before = status
        self._note.say(self._meter.see(status, time.monotonic()))


def _stream(cluster: LocalCluster, config: DemoConfig) -> GenerationStream:
    return cluster.client().generate(
        config.prompt,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=TOP_P,
        seed=config.seed,
        stream=True,
    )


def _lose_one(cluster: LocalCluster, config: DemoConfig, before: Generation) -> None:
    """Ask for the same once more, kill the last worker in mid-answer, and tell how the answer went on."""
    victim = cluster.workers[-1].name
    arrivals: list[float] = []
    tokens: list[int] = []
    with _stream(cluster, config) as stream:
        for piece in stream:
            tokens += piece.token_ids
            arrivals.append(time.monotonic())
            if len(arrivals) == KILL_AFTER:
                cluster.kill(victim)
    if len(arrivals) <= KILL_AFTER:
        return  # too short an answer to lose anybody in it
    pause_s = max(later - earlier for earlier, later in itertools.pairwise(arrivals[KILL_AFTER - 1 :]))
    same = "with the same tokens" if tuple(tokens) == before.token_ids else "but with OTHER TOKENS, which is a bug"
    out = console(sys.stdout)
    out.print(f"\nThe same once more, and {victim} is killed after {KILL_AFTER} tokens:")
    out.print(f"the answer goes on after {pause_s:.2f} s on {plan_line(cluster.status())}, {same}")


def _speak(cluster: LocalCluster, config: DemoConfig) -> Generation:
    out = sys.stdout
    out.write(config.prompt)
    stream = _stream(cluster, config)
    with stream:
        for piece in stream:
            out.write(piece.text)
            out.flush()
        out.write("\n\n")
        return stream.result


def _show(status: Status, pids: dict[str, int], answer: Generation) -> None:
    out = console(sys.stdout)
    out.print(table(PLAN_HEADINGS, plan_rows(status, pids)))
    out.print()
    if flowing := stream_rows(status):
        out.print(table(STREAM_HEADINGS, flowing))
        out.print()
    out.print(f"time to first token  {answer.timings.first_token_s * 1000:.0f} ms")
    out.print(f"speed                {answer.tokens_per_second:.1f} tokens/s")
    out.print(f"tokens               {answer.usage.prompt_tokens} in, {answer.usage.completion_tokens} out")
    out.print(f"plan                 {plan_line(status)}")
    out.print("encrypted            yes (CURVE on every socket, keys pinned)")
