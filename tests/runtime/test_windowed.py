"""The same bits whatever part of the weights is pinned; quantised formats against the floats they came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiles_of import KERNELS, Crew, FolderFiles, load, make_model, quantised_source, shares, spec_of, whole

from protocol.batches import SessionRows
from protocol.errors import BudgetTooSmall, StorageFailed
from protocol.ids import SessionId
from protocol.specs import ActivationFormat, ModelSpec, Span, WeightFormat
from runtime.fused import block_bytes
from runtime.kernels import Kernels
from runtime.page_cache import PageCache
from runtime.reduce import sum_partials
from runtime.shares import used_ops

FORMATS = {
    "float32": (WeightFormat.FLOAT32, ActivationFormat.FLOAT32),
    "bfloat16": (WeightFormat.BFLOAT16, ActivationFormat.BFLOAT16),
    "int8": (WeightFormat.INT8, ActivationFormat.FLOAT32),
    "int4": (WeightFormat.INT4, ActivationFormat.FLOAT32),
    "int8 in bfloat16": (WeightFormat.INT8, ActivationFormat.BFLOAT16),
    "int4 in bfloat16": (WeightFormat.INT4, ActivationFormat.BFLOAT16),
}
# Shapes that int4 can group: every input a multiple of 32.
SIZES = {
    "hidden_size": 64,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 192,
}
MODEL = make_model("llama3-gqa", **SIZES, num_hidden_layers=3)
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]


def spec_in(name: str) -> ModelSpec:
    weights, activations = FORMATS[name]
    return dataclasses.replace(spec_of(MODEL), weights=weights, activations=activations)


@pytest.fixture
def crews() -> Iterator[list[Crew]]:
    made: list[Crew] = []
    yield made
    for crew in made:
        for part in [*(part for members in crew.parts for part in members), crew.head_part]:
            part.blocks.close()


def logits_of(crew: Crew) -> torch.Tensor:
    return torch.stack(crew.generate(PROMPT, 6)[1])


@pytest.mark.parametrize("page_cache", [PageCache.USE, PageCache.FILL])
@pytest.mark.parametrize("name", FORMATS)
def test_any_window_gives_the_same_bits(name: str, page_cache: PageCache, tmp_path: Path, crews: list[Crew]) -> None:
    spec = spec_in(name)
    crews.append(Crew(spec, MODEL, whole(spec)))
    wanted = logits_of(crews[0])
    share = whole(spec)[0][0]
    sizes = [block_bytes(spec, share, op) for op in used_ops(spec, share, is_head=False)]
    for number, left in enumerate((2 * max(sizes), 3 * max(sizes), sum(sizes) * 3 // 4, sum(sizes))):
        folder = tmp_path / str(number)
        folder.mkdir()
        crews.append(Crew(spec, MODEL, whole(spec), left_bytes=left, files=FolderFiles(folder, page_cache)))
        part = crews[-1].parts[0][0]
        assert part.blocks.num_bytes <= left + 4096 * 3
        assert bool(part.window.streamed) == (left < sum(sizes))
        assert torch.equal(logits_of(crews[-1]), wanted)
        assert (part.blocks.counts().read_bytes > 0) == bool(part.window.streamed)


def test_members_and_the_head_stream_too(tmp_path: Path, crews: list[Crew]) -> None:
    spec = spec_in("float32")
    plan = shares(spec, (0, 1, 3), [((0, 1, 2), (0, 2, spec.ffn_tiles)), ((0, 2), (0, spec.ffn_tiles))])
    crews.append(Crew(spec, MODEL, plan))
    wanted = logits_of(crews[0])
    tight = Crew(spec, MODEL, [])
    crews.append(tight)
    source = quantised_source(spec, MODEL)
    tight.parts = []
    for number, members in enumerate(plan):
        tight.parts.append([])
        for rank, share in enumerate(members):
            folder = tmp_path / f"{number}-{rank}"
            folder.mkdir()
            largest = max(block_bytes(spec, share, op) for op in used_ops(spec, share, is_head=False))
            tight.parts[-1].append(load(spec, source, share, left_bytes=2 * largest, files=FolderFiles(folder)))
    tight.stages = [[part.stage for part in members if part.stage is not None] for members in tight.parts]
    assert torch.equal(logits_of(tight), wanted)


def test_blocks_on_disk_are_made_once(tmp_path: Path, crews: list[Crew]) -> None:
    spec = spec_in("int8")
    files = FolderFiles(tmp_path)
    share = whole(spec)[0][0]
    left = 2 * max(block_bytes(spec, share, op) for op in used_ops(spec, share, is_head=False))
    source = quantised_source(spec, MODEL)
    for _ in range(2):
        load(spec, source, share, left_bytes=left, files=files).blocks.close()
    assert files.num_made == 6


def test_less_than_two_slots_is_refused(tmp_path: Path) -> None:
    spec = spec_in("float32")
    with pytest.raises(BudgetTooSmall, match="two slots"):
        load(spec, quantised_source(spec, MODEL), whole(spec)[0][0], left_bytes=1000, files=FolderFiles(tmp_path))


def test_a_block_that_vanishes_is_told(tmp_path: Path) -> None:
    spec, share = spec_in("float32"), whole(spec_in("float32"))[0][0]
    left = 2 * max(block_bytes(spec, share, op) for op in used_ops(spec, share, is_head=False))
    part = load(spec, quantised_source(spec, MODEL), share, left_bytes=left, files=FolderFiles(tmp_path))
    try:
        streamed = [used_ops(spec, share, is_head=False)[number] for number in part.window.streamed]
        (tmp_path / f"block-{streamed[-1]}").write_bytes(b"")
        with pytest.raises(StorageFailed):
            for _ in range(3):
                for op in streamed:
                    part.blocks.acquire(op)
                    part.blocks.release(op)
    finally:
        part.blocks.close()


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.08), ("int4", 0.45)])
def test_quantised_models_stay_near_their_floats(name: str, bound: float, crews: list[Crew]) -> None:
    exact, rounded = (Crew(spec_in(one), MODEL, whole(spec_in(one))) for one in ("float32", name))
    crews += [exact, rounded]
    wanted, found = logits_of(exact)[0], logits_of(rounded)[0]
    assert float((found - wanted).norm() / wanted.norm()) < bound


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_packed_kernels_agree_with_the_plain_way(name: str, crews: list[Crew]) -> None:
    spec = spec_in(name)
    for kernels in (KERNELS, Kernels()):
        crews.append(Crew(spec, MODEL, whole(spec), kernels=kernels))
    packed, plain = (logits_of(crew)[0] for crew in crews)
    if name == "int8":
        assert torch.equal(packed, plain)
    else:
        torch.testing.assert_close(packed, plain, rtol=0.05, atol=0.05 * float(plain.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
def test_cuts_do_not_change_the_weights(name: str, crews: list[Crew]) -> None:
    """Members of a stage hold the numbers that one worker holds: their sum differs by the order of adding alone."""
    spec = spec_in(name)
    plan = shares(spec, (0, 3), [((0, 1, 2), (0, 2, spec.ffn_tiles))])
    crews += [Crew(spec, MODEL, whole(spec)), Crew(spec, MODEL, plan)]
    one, two = (logits_of(crew)[0] for crew in crews)
    tolerance = 1e-4 if FORMATS[name] == FORMATS["float32"] else 0.06
    torch.testing.assert_close(one, two, rtol=0, atol=tolerance * float(one.abs().max()))


def test_some_layers_alone_write_the_rows_of_all_and_stream_no_less_right(tmp_path: Path, crews: list[Crew]) -> None:
    """The ring passes over the blocks of the other layers, time and again."""
    spec = spec_in("float32")
    share, rows = whole(spec)[0][0], [_rows(0, 5), _rows(5, 4), _rows(9, 2)]
    largest = max(block_bytes(spec, share, op) for op in used_ops(spec, share, is_head=False))
    crews.append(Crew(spec, MODEL, whole(spec), left_bytes=2 * largest, files=FolderFiles(tmp_path)))
    stage = crews[0].stages[0][0]
    assert crews[0].parts[0][0].window.streamed

    def run(hidden: torch.Tensor, part: SessionRows, layers: Span | None) -> torch.Tensor:
        return stage.forward(hidden, (part,), lambda op, own: sum_partials([own], spec.activations), layers)

    inputs, ends = [], []
    for part in rows:
        embedded = crews[0].head.embed(PROMPT[part.start : part.start + part.count])
        inputs.append(run(embedded, part, Span(0, 1)))
        ends.append(run(inputs[-1], part, Span(1, 3)))
    wanted = [stage.kv.keys_LGPd.clone(), stage.kv.values_LGPd.clone()]
    stage.kv.keys_LGPd[1, :, :11] = stage.kv.values_LGPd[1, :, :11] = 7.0
    for part, hidden in zip(rows, inputs, strict=True):
        run(hidden, part, Span(1, 2))
    assert all(map(torch.equal, wanted, (stage.kv.keys_LGPd, stage.kv.values_LGPd)))
    assert torch.equal(run(inputs[-1], rows[-1], Span(1, 3)), ends[-1])


def _rows(start: int, count: int) -> SessionRows:
    return SessionRows(session=SessionId(1), start=start, count=count, capacity=20)
