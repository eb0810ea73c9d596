"""The settings of the `manyhands` command: as a client, as the parent of a local worker, and for the demo.

Knows nothing of flags, files or the environment; `protocol.settings` fills these in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from manyhands.options import OptionFields, Options
from protocol.settings import setting


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """Table `[client]`: what `ask`, `chat`, `status` and `invite` share."""

    link: str = setting("", "client link; default: the coordinator of this machine", secret=True)
    timeout_s: float = setting(10.0, "seconds that the coordinator may be silent")
    reconnect_s: float = setting(60.0, "seconds to try for another connection when one is lost; 0: none")
    max_tokens: int = setting(256, "longest answer, in tokens")
    temperature: float = setting(0.0, "0 takes the likeliest token each time; higher is more random")
    top_p: float = setting(1.0, "sample from the likeliest tokens that sum up to this probability")
    top_k: int = setting(0, "sample from this many likeliest tokens; 0: from all")
    min_p: float = setting(0.0, "leave out tokens less likely than this part of the likeliest")
    repetition_penalty: float = setting(1.0, "above 1: avoid tokens that were there already")
    seed: int = setting(0, "same seed, same answer")
    stop: tuple[str, ...] = setting((), "text that ends the answer (may be given several times)")

    def __post_init__(self) -> None:
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s {self.timeout_s} must be positive")
        if not 0 <= self.reconnect_s < math.inf:
            raise ValueError(f"reconnect_s {self.reconnect_s} must be a number of seconds, 0 or more")

    def options(self) -> OptionFields:
        """Return the part that says how an answer is made; raises RequestInvalid for a bad value."""
        fields = OptionFields(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
        )
        Options(**fields)
        return fields


@dataclass(frozen=True, slots=True, kw_only=True)
class UpConfig:
    """What `up` adds to the coordinator's settings: the worker beside it. In the file that one has `[worker]`."""

    worker_name: str = setting("", "name of the worker on this machine; default: its host name")
    worker_memory: str = setting("", "memory the worker on this machine may take, e.g. 4GB or 50%")
    worker_threads: int = setting(0, "threads of the worker on this machine; 0: one a core")
    worker_device: str = setting("auto", "device of the worker on this machine: auto, cpu, cuda, mps")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What `demo` runs. Not in the file: it is the same everywhere."""

    plan: str = setting("1,1/1", "who computes what: shares of layers, stages by '/', their members by ','")
    prompt: str = setting('class Stack:\n    """', "what the model continues")
    max_tokens: int = setting(96, "longest answer, in tokens")
    temperature: float = setting(0.6, "0 takes the likeliest token each time; higher is more random")
    seed: int = setting(1, "same seed, same answer")
    dtype: str = setting("float32", "number format of the weights: auto (as stored), float32, bfloat16, int8, int4")
    memory: str = setting("", "memory each worker process may take, e.g. 400MB")
    kill: bool = setting(True, "kill a worker in the middle of a second answer, to see how that goes on")
