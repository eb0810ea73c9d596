"""Random checkpoints of transformers, their `ModelSpec`, and their tiles cut straight from the state dict."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from random_models import random_model
from torch import Tensor

from coordinator import tile_cutter
from protocol.batches import Sampling, SessionRows
from protocol.ids import SessionId
from protocol.specs import ActivationFormat, ModelSpec, RopeKind, RopeSpec, Span, WeightFormat, default_ffn_tiles
from protocol.tiles import TileId, tile_bytes, tile_parts, tile_slices
from runtime import sampler
from runtime.decoder import Reduce, StageModel
from runtime.head import Head
from runtime.kernels import Kernels
from runtime.loading import LoadedPart, load_part
from runtime.packed import can_pack_bfloat16, can_view_packed
from runtime.page_cache import PageCache
from runtime.reduce import sum_partials
from runtime.shares import NO_SHARE, StageShare
from runtime.shelf import BlockShelf
from runtime.windowed import BlockFiles, BlockOrder

CPU = torch.device("cpu")
GREEDY = Sampling()

ALIKE: dict[str, Any] = {"max_position_embeddings": 512, "initializer_range": 0.15}
# What each of our names stands for: a family, and in what it differs from the family's small model.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2-mha": ("llama2", {}),
    "llama3-gqa": ("llama3", {}),
    "llama3-tied": ("llama3", {"num_attention_heads": 4, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": (
        "qwen2",
        {"tie_word_embeddings": False, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
}


def make_model(name: str, **changes: Any) -> Any:
    """Return a random model in eval mode."""
    family, own = FAMILIES[name]
    return random_model(family, **{**ALIKE, **own, **changes})


def spec_of(model: Any, activations: ActivationFormat = ActivationFormat.FLOAT32) -> ModelSpec:
    """Read a spec off a transformers config (the product has its own, strict reader)."""
    config, rope = model.config, model.config.rope_parameters
    state = model.state_dict()
    windows = [layer == "sliding_attention" for layer in getattr(config, "layer_types", None) or []]
    if config.model_type == "mistral":
        windows = [config.sliding_window is not None] * config.num_hidden_layers
    return ModelSpec(
        name="random",
        family=config.model_type,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        intermediate=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_eps=config.rms_norm_eps,
        rope=RopeSpec(
            theta=rope["rope_theta"],
            kind=RopeKind(rope["rope_type"]),
            factor=rope.get("factor", 1.0),
            low_freq_factor=rope.get("low_freq_factor", 1.0),
            high_freq_factor=rope.get("high_freq_factor", 4.0),
            original_max_positions=rope.get("original_max_position_embeddings", 0),
        ),
        ffn_tiles=default_ffn_tiles(config.intermediate_size),
        weights=WeightFormat(activations.value),
        activations=activations,
        qkv_bias="model.layers.0.self_attn.q_proj.bias" in state,
        o_bias="model.layers.0.self_attn.o_proj.bias" in state,
        mlp_bias="model.layers.0.mlp.down_proj.bias" in state,
        qk_norm="model.layers.0.self_attn.q_norm.weight" in state,
        tied_embeddings=config.tie_word_embeddings,
        sliding_windows=tuple(config.sliding_window if local else 0 for local in windows) if any(windows) else (),
    )


def cut_tile(spec: ModelSpec, state: dict[str, Tensor], tile: TileId) -> bytes:
    """Cut one tile's bytes from a state dict."""
    cut = bytearray(tile_bytes(spec, tile))
    for part, piece in zip(tile_parts(spec, tile), tile_slices(spec, tile), strict=True):
        tensor = state[piece.tensor]
        if piece.rows is not None:
            tensor = tensor[piece.rows.start : piece.rows.end]
        if piece.cols is not None:
            tensor = tensor[:, piece.cols.start : piece.cols.end]
        values = tensor.to(getattr(torch, part.dtype)).contiguous().flatten().view(torch.uint8).numpy().tobytes()
        if len(values) != part.num_bytes:
            raise AssertionError(f"{tile} {part.name}: {len(values)} != {part.num_bytes}")
        cut[part.offset : part.offset + part.num_bytes] = values
    return bytes(cut)


def source_of(spec: ModelSpec, model: Any) -> Callable[[TileId], memoryview]:
    """Return a tile source over a model's weights."""
    state = model.state_dict()
    return lambda tile: memoryview(cut_tile(spec, state, tile))


class StateMatrices:
    """A model's weights as the coordinator's tile cutter reads them."""

    def __init__(self, model: Any) -> None:
        self._state = model.state_dict()

    def read(self, name: str, rows: Span | None, cols: Span | None, dtype: str) -> Any:
        tensor = self._state[name].to(getattr(torch, dtype))
        tensor = tensor if rows is None else tensor[rows.start : rows.end]
        tensor = tensor if cols is None else tensor[:, cols.start : cols.end]
        return (tensor.view(torch.uint16) if dtype == "bfloat16" else tensor).numpy()


def quantised_source(spec: ModelSpec, model: Any) -> Callable[[TileId], memoryview]:
    """Return a tile source over a model's weights in the spec's format, as the coordinator cuts them."""
    matrices = StateMatrices(model)
    cut: dict[TileId, memoryview] = {}

    def source(tile: TileId) -> memoryview:
        if tile not in cut:
            cut[tile] = memoryview(tile_cutter.cut_tile(spec, tile, matrices))
        return cut[tile]

    return source


Shares = Sequence[Sequence[StageShare]]
"""For each stage in order, the shares of its members."""


def whole(spec: ModelSpec) -> Shares:
    """One worker that holds everything."""
    return [[StageShare(layers=Span(0, spec.layers), groups=Span(0, spec.kv_heads), ffn=Span(0, spec.ffn_tiles))]]


def shares(spec: ModelSpec, layers: Sequence[int], members: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Shares:
    """Cut layers at `layers`; each stage has members with these cuts of groups and of FFN tiles."""
    spans = [Span(start, end) for start, end in itertools.pairwise(layers)]
    return [
        [
            StageShare(layers=span, groups=Span(*groups), ffn=Span(*ffn))
            for groups, ffn in zip(
                zip(cuts[0], cuts[0][1:], strict=False), zip(cuts[1], cuts[1][1:], strict=False), strict=True
            )
        ]
        for span, cuts in zip(spans, members, strict=True)
    ]


KERNELS = Kernels(
    packs_bfloat16=can_pack_bfloat16(),
    views_bfloat16=can_view_packed(),
    packs_int8=True,
    packs_int4=True,
    int4_few_rows=4,
)


QUANTISED = (WeightFormat.INT8, WeightFormat.INT4)


class NoFiles:
    """For shares that stay in memory."""

    page_cache = PageCache.OFF

    def name_of(self, op: int) -> bytes:
        return bytes((op,))

    def path_of(self, op: int, num_bytes: int, fill: Callable[[memoryview], None]) -> Path:
        raise AssertionError("nothing should be streamed")


class FolderFiles:
    """Blocks in a folder, made once."""

    def __init__(self, folder: Path, page_cache: PageCache = PageCache.USE) -> None:
        self.folder = folder
        self.page_cache = page_cache
        self.num_made = 0

    def name_of(self, op: int) -> bytes:
        return bytes((op,))

    def path_of(self, op: int, num_bytes: int, fill: Callable[[memoryview], None]) -> Path:
        path = self.folder / f"block-{op}"
        if not path.exists():
            buffer = bytearray(num_bytes)
            fill(memoryview(buffer))
            path.write_bytes(buffer)
            self.num_made += 1
        return path


def load(
    spec: ModelSpec,
    source: Callable[[TileId], memoryview],
    share: StageShare = NO_SHARE,
    *,
    is_head: bool = False,
    kernels: Kernels = KERNELS,
    left_bytes: int = 2**40,
    files: BlockFiles | None = None,
    kv_positions: int = 2048,
    shelf: BlockShelf | None = None,
) -> LoadedPart:
    """Load one worker's part."""
    return load_part(
        BlockOrder(spec=spec, share=share, is_head=is_head, kernels=kernels, device=CPU),
        source,
        lambda tile, offset, length: bytes(source(tile)[offset : offset + length]),
        files or NoFiles(),
        left_bytes=left_bytes,
        kv_positions=kv_positions,
        shelf=shelf,
    )


def load_head(spec: ModelSpec, source: Callable[[TileId], memoryview]) -> Head:
    """Load a head without layers."""
    head = load(spec, source, is_head=True).head
    assert head is not None
    return head


class Crew:
    """Stages in sequence, each of one thread a member, joined by a sum behind a barrier; `parts` all of their loads."""

    def __init__(self, spec: ModelSpec, model: Any, plan: Shares, **how: Any) -> None:
        source = quantised_source(spec, model) if spec.weights in QUANTISED else source_of(spec, model)
        self.spec = spec
        self.parts = [[load(spec, source, share, **how) for share in members] for members in plan]
        self.head_part = load(spec, source, is_head=True, **how)
        assert self.head_part.head is not None
        self.head = self.head_part.head
        self.stages: list[list[StageModel]] = []
        for members in self.parts:
            self.stages.append([part.stage for part in members if part.stage is not None])

    def logits(self, ids: Sequence[int], rows: tuple[SessionRows, ...]) -> Tensor:
        """Pass the ids of a ragged batch through all stages."""
        hidden = self.head.embed(ids)
        for members in self.stages:
            hidden = run_stage(self.spec, members, hidden, rows)
        return self.head.logits(hidden, rows)

    def generate(
        self, prompt: Sequence[int], count: int, *, session: int = 1, chunks: Sequence[int] = (), at: int = 0
    ) -> tuple[list[int], list[Tensor]]:
        """Return the new tokens, greedily chosen, and the logits each was chosen from."""
        ids, capacity, start = list(prompt), len(prompt) + count, 0
        tokens: list[int] = []
        seen: list[Tensor] = []
        ends = [*chunks, len(prompt)]
        while len(tokens) < count:
            end = ends.pop(0) if ends else len(ids)
            row = SessionRows(
                session=SessionId(session), start=start, count=end - start, capacity=capacity, sample=not ends, at=at
            )
            logits = self.logits(ids[start:end], (row,))
            start = end
            if row.sample:
                seen.append(logits[0])
                tokens.append(sampler.choose(logits[0], GREEDY, history=ids, position=len(ids)).token)
                ids.append(tokens[-1])
        return tokens, seen


def run_stage(spec: ModelSpec, members: Sequence[StageModel], hidden: Tensor, rows: tuple[SessionRows, ...]) -> Tensor:
    """Run all members of one stage on the same input and check that they end bit-identical."""
    if len(members) == 1:
        return members[0].forward(hidden, rows, lambda op, part: sum_partials([part], spec.activations))
    barrier = threading.Barrier(len(members), timeout=30)
    parts: list[Tensor | None] = [None] * len(members)
    results: list[Any] = [None] * len(members)

    def reducer(rank: int) -> Reduce:
        def reduce(op: int, part: Tensor | None) -> Tensor:
            parts[rank] = part
            barrier.wait()
            total = sum_partials(list(parts), spec.activations).clone()  # a single part would be its own sum
            barrier.wait()  # nobody may overwrite its part before all have added
            return total

        return reduce

    def run(rank: int) -> None:
        try:
            place = torch.empty_like(hidden) if rank % 2 else None  # with and without a place for its parts
            results[rank] = members[rank].forward(hidden, rows, reducer(rank), part_TD=place)
        except BaseException as error:
            barrier.abort()
            results[rank] = error
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    if not all(isinstance(result, Tensor) and torch.equal(result, results[0]) for result in results):
        raise AssertionError(f"members differ: {results}")
    return results[0]
