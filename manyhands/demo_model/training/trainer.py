"""The training loop: updates under a schedule that follows the progress of the run, with reports and exports between.

Progress is elapsed time over the minutes of the budget, so a run on a busy machine still ends fully annealed, or step
over its steps, which makes a run repeatable on the same machine.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.model import Llama, loss_of
from training.record import Record
from training.stream import Stream

# Progress at which the windows grow from a quarter of the context to a half, and to the whole.
LONGER_AT = (0.45, 0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How long a run is, how fast it learns, and how often it tells of itself."""

    minutes: float
    steps: int  # 0: the run follows the clock
    batch_tokens: int
    muon_rate: float
    adam_rate: float
    report_minutes: float
    export_minutes: float


def optimizers(model: Llama, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    hidden = [w for w in model.layers.parameters() if w.ndim == 2]
    chosen = {id(w) for w in hidden}
    others = [w for w in model.parameters() if id(w) not in chosen]
    adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    if muon_rate <= 0:
        return [adam, torch.optim.AdamW(hidden, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)]
    muon = torch.optim.Muon(hidden, lr=muon_rate, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return [adam, muon]


def rate_factor(progress: float, warm_up: float = 0.02, decay_from: float = 0.35) -> float:
    """Warm up, hold, then decay linearly to nothing at progress 1."""
    if progress < warm_up:
        return (progress + 0.001) / (warm_up + 0.001)
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - decay_from)))


@torch.inference_mode()
def evaluate(model: Llama, batches: list[Tensor]) -> float:
    """Return the mean loss over the held-out batches."""
    return sum(loss_of(model, batch).item() for batch in batches) / len(batches)


class Trainer:
    """The training loop, with reports and exports on the way."""

    def __init__(self, budget: Budget, model: Llama, stream: Stream, record: Record) -> None:
        self.budget, self.model, self.stream, self.record = budget, model, stream, record
        self.optimizers = optimizers(model, budget.muon_rate, budget.adam_rate)
        self.base_rates = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]
        self.begun = self.reported = self.exported = time.monotonic()
        self.smooth = math.nan

    def progress(self) -> float:
        """Return how much of the run is done, 0 to 1."""
        if self.budget.steps:
            return self.record.steps / self.budget.steps
        return (time.monotonic() - self.begun) / (60.0 * self.budget.minutes)

    def length(self) -> int:
        """Return the window length: short at first, the whole context at the end."""
        progress, longest = self.progress(), self.model.shape.positions
        first, second = LONGER_AT
        return longest // 4 if progress < first else longest // 2 if progress < second else longest

    def step(self, batch: Tensor) -> None:
        """Make one update."""
        factor = rate_factor(self.progress())
        for optimizer, rate in zip(self.optimizers, self.base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * factor
        loss = loss_of(self.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.count(loss.item(), batch[:, 1:].numel())

    def count(self, loss: float, tokens: int) -> None:
        """Keep the books after an update."""
        self.record.steps += 1
        self.record.tokens_seen += tokens
        self.record.minutes = round((time.monotonic() - self.begun) / 60, 2)
        self.smooth = loss if math.isnan(self.smooth) else 0.98 * self.smooth + 0.02 * loss
        self.record.train_loss = round(self.smooth, 4)

    def report(self, held_out: list[Tensor]) -> None:
        """Measure the held-out loss and print a line."""
        record = self.record
        record.held_out_loss = round(evaluate(self.model, held_out), 4)
        bits = record.held_out_loss / math.log(2) * record.held_out_tokens / record.held_out_bytes
        record.held_out_bits_per_byte = round(bits, 4)
        line: dict[str, float] = {
            "step": record.steps,
            "tokens": record.tokens_seen,
            "minutes": record.minutes,
            "train_loss": record.train_loss,
            "held_out_loss": record.held_out_loss,
        }
        record.history.append(line)
        speed = record.tokens_seen / (60 * max(record.minutes, 0.01))
        print(json.dumps(line), f"progress {self.progress():.3f}  {speed:.0f} tokens/s", flush=True)

    def run(self, held_out: list[Tensor], export: Callable[[], None]) -> None:
        """Train to the end of the budget."""
        for batch in self.stream.batches(self.budget.batch_tokens, self.length):
            if self.progress() >= 1.0:
                break
            self.step(batch)
            now = time.monotonic()
            if now - self.reported > 60 * self.budget.report_minutes:
                self.report(held_out)
                self.reported = time.monotonic()
            if now - self.exported > 60 * self.budget.export_minutes:
                export()
                self.exported = time.monotonic()
        self.report(held_out)
        export()
