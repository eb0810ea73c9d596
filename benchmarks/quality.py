"""(f) What quantising costs: perplexity and KL divergence against float32 on the embedded model, over held-out code."""

from __future__ import annotations

import math
import sysconfig
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.report import table
from coordinator.catalogue import Catalogue
from coordinator.hf_config import read_hf_config
from coordinator.tokens import TextCodec
from manyhands.cluster import DEMO_MODEL
from protocol.batches import SessionRows
from protocol.ids import SessionId
from protocol.specs import ActivationFormat, Span, WeightFormat
from protocol.tiles import TileId
from runtime.kernels import measure
from runtime.loading import load_part
from runtime.page_cache import PageCache
from runtime.reduce import sum_partials
from runtime.shares import StageShare
from runtime.windowed import BlockOrder

CPU = torch.device("cpu")
LENGTH, WINDOWS = 512, 24
# Left out of the embedded model's training (its tests folders are), so nothing here was seen.
TEXTS = "test"


class Nowhere:
    """Everything fits: no block is ever written."""

    page_cache = PageCache.OFF

    def name_of(self, op: int) -> bytes:
        """Return a name for a block that nobody looks up."""
        return bytes((op,))

    def path_of(self, op: int, num_bytes: int, fill: object) -> Path:
        """Refuse."""
        raise RuntimeError("nothing should be streamed")


def windows() -> list[list[int]]:
    """Token windows of code that the model has not seen."""
    codec = TextCodec.load(DEMO_MODEL)
    folder = Path(sysconfig.get_path("stdlib")) / TEXTS
    found: list[list[int]] = []
    for path in sorted(folder.glob("test_[a-m]*.py")):
        ids = codec.encode(path.read_text(encoding="utf-8", errors="ignore"))
        if len(ids) > LENGTH:
            found.append(ids[:LENGTH])
        if len(found) == WINDOWS:
            break
    return found


def logprobs(weights: WeightFormat, activations: ActivationFormat, texts: list[list[int]]) -> list[torch.Tensor]:
    """Log-probabilities of every next token, `[T, V]` a window."""
    spec = replace(read_hf_config(DEMO_MODEL).spec, weights=weights, activations=activations)
    share = StageShare(layers=Span(0, spec.layers), groups=Span(0, spec.kv_heads), ffn=Span(0, spec.ffn_tiles))
    with tempfile.TemporaryDirectory() as cache, Catalogue.build(DEMO_MODEL, spec, Path(cache)) as tiles:

        def source(tile: TileId) -> memoryview:
            entry = tiles.entries[tile]
            return memoryview(tiles.read(entry.digest, 0, entry.num_bytes))

        part = load_part(
            BlockOrder(spec=spec, share=share, is_head=True, kernels=measure(CPU), device=CPU),
            source,
            lambda tile, offset, length: bytes(source(tile)[offset : offset + length]),
            Nowhere(),
            left_bytes=2**40,
            kv_positions=LENGTH,
        )
        if part.stage is None or part.head is None:
            raise RuntimeError("the whole model has a stage and a head")
        results = []
        for ids in texts:
            rows = (SessionRows(session=SessionId(1), start=0, count=len(ids), capacity=LENGTH),)
            hidden = part.stage.forward(
                part.head.embed(ids), rows, lambda op, own: sum_partials([own], spec.activations)
            )
            each = tuple(
                SessionRows(session=SessionId(n), start=0, count=1, capacity=1, sample=True) for n in range(len(ids))
            )
            results.append(part.head.logits(hidden, each).log_softmax(-1))
    return results


def main() -> None:
    """Compare every format with float32."""
    texts = windows()
    exact = logprobs(WeightFormat.FLOAT32, ActivationFormat.FLOAT32, texts)
    rows = []
    for weights, activations in (
        (WeightFormat.FLOAT32, ActivationFormat.FLOAT32),
        (WeightFormat.BFLOAT16, ActivationFormat.BFLOAT16),
        (WeightFormat.INT8, ActivationFormat.BFLOAT16),
        (WeightFormat.INT4, ActivationFormat.BFLOAT16),
    ):
        found = logprobs(weights, activations, texts)
        losses, kls, same = [], [], []
        for ids, one, other in zip(texts, exact, found, strict=True):
            target = torch.tensor(ids[1:])
            losses.append(-other[:-1].gather(1, target[:, None]).mean().item())
            kls.append((one.exp() * (one - other)).sum(-1).mean().item())
            same.append((one.argmax(-1) == other.argmax(-1)).float().mean().item())
        count = len(texts)
        rows.append(
            (
                weights.value,
                f"{math.exp(sum(losses) / count):.3f}",
                f"{sum(kls) / count:.1e}",
                f"{sum(same) / count:.1%}",
            )
        )
    table(
        f"(f) The embedded model over {len(texts)} windows of {LENGTH} tokens that it has not seen",
        ("weights", "perplexity", "KL to float32, nats", "same first choice"),
        rows,
    )


if __name__ == "__main__":
    main()
