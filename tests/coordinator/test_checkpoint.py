"""The safetensors reader: against the safetensors library, and every way a file can lie."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_folders import FAMILIES, edit_json, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from coordinator.checkpoint import Checkpoint, expected_shapes
from coordinator.hf_config import read_hf_config
from coordinator.number_formats import FloatName, float32_to_bfloat16
from coordinator.safetensors_header import header_length, parse_header
from protocol.errors import CheckpointInvalid, ModelUnsupported
from protocol.specs import Span

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def as_numpy(tensor: torch.Tensor, dtype: str) -> Any:
    if dtype == "bfloat16":
        return tensor.to(torch.bfloat16).view(torch.uint16).numpy()
    return tensor.to(torch.float32).numpy()


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_rows_and_columns_as_torch_does(
    tmp_path: Path, stored: torch.dtype, dtype: FloatName, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, vector = torch.randn(37, 23).to(stored), torch.randn(11).to(stored)
    save_file({"matrix": matrix, "vector": vector, "empty": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("coordinator.checkpoint.GATHER_BYTES", 300)  # several gathers a read
    with Checkpoint.open(tmp_path) as checkpoint:
        assert sorted(checkpoint.names()) == ["empty", "matrix", "vector"]
        assert checkpoint.shape("matrix") == (37, 23)
        spans = [None, Span(0, 37), Span(5, 30), Span(36, 37), Span(9, 9)]
        for rows in spans:
            for cols in [None, Span(0, 23), Span(3, 4), Span(20, 23)]:
                row, col = Span(0, 37) if rows is None else rows, Span(0, 23) if cols is None else cols
                expected = as_numpy(matrix[row.start : row.end, col.start : col.end], dtype)
                np.testing.assert_array_equal(checkpoint.read("matrix", rows, cols, dtype), expected)
        np.testing.assert_array_equal(checkpoint.read("vector", Span(2, 9), dtype=dtype), as_numpy(vector[2:9], dtype))
        assert checkpoint.read("empty").shape == (0, 4)


def test_rounds_float32_to_bfloat16_as_torch_does_and_keeps_nan() -> None:
    edges = [0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF, 0x00000001, 0x3F808000, 0x3F818000]
    bits = np.concatenate(
        [np.array(edges, "<u4"), np.random.default_rng(3).integers(0, 2**32, 200_000, dtype=np.uint32)]
    )
    values = bits.view("<f4")
    ours = float32_to_bfloat16(values)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.uint16).numpy()
    number = ~np.isnan(values)
    np.testing.assert_array_equal(ours[number], theirs[number])
    assert (((ours[~number] & 0x7F80) == 0x7F80) & ((ours[~number] & 0x7F) != 0)).all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shard", ["", "20KB"])
def test_reads_what_transformers_saved(tmp_path: Path, family: str, shard: str) -> None:
    model = save_model(tmp_path, family, torch.bfloat16, shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == bool(shard)
    spec = read_hf_config(tmp_path).spec
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.verify(spec)
        state = model.state_dict()
        for name, shape in expected_shapes(spec).items():
            assert tuple(state[name].shape) == shape
            np.testing.assert_array_equal(
                checkpoint.read(name, dtype="bfloat16"), state[name].view(torch.uint16).numpy()
            )


def test_accepts_names_without_the_model_prefix(tmp_path: Path) -> None:
    save_model(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(path).items()}, path)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.verify(read_hf_config(tmp_path).spec)
        assert checkpoint.shape("model.norm.weight") == (32,)


@pytest.mark.parametrize("stored", [True, False])
def test_tied_models_need_no_lm_head_and_ignore_one(tmp_path: Path, stored: bool) -> None:
    save_model(tmp_path, "qwen2")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    assert "lm_head.weight" not in tensors
    if stored:
        save_file({**tensors, "lm_head.weight": torch.zeros(3, 3)}, path)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.verify(read_hf_config(tmp_path).spec)


def _rewrite(path: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, path)


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("changes", "kind", "named"),
    [
        ({DOWN: None}, CheckpointInvalid, [DOWN]),
        ({"lm_head.weight": None}, CheckpointInvalid, ["lm_head.weight"]),
        ({DOWN: torch.zeros(160, 32)}, CheckpointInvalid, [DOWN, "(160, 32)", "(32, 160)", "model.safetensors"]),
        ({"model.norm.weight": torch.zeros(1, 32)}, CheckpointInvalid, ["model.norm.weight", "(1, 32)", "(32,)"]),
        ({DOWN: torch.zeros(32, 160, dtype=torch.int8)}, ModelUnsupported, [DOWN, "I8"]),
    ],
)
def test_verify_names_the_tensor(tmp_path: Path, changes: Any, kind: type[Exception], named: list[str]) -> None:
    save_model(tmp_path)
    _rewrite(tmp_path / "model.safetensors", **changes)
    with Checkpoint.open(tmp_path) as checkpoint, pytest.raises(kind) as caught:
        checkpoint.verify(read_hf_config(tmp_path).spec)
    assert all(part in str(caught.value) for part in named)


def test_reads_outside_a_tensor_are_refused(tmp_path: Path) -> None:
    save_file({"matrix": torch.zeros(3, 4), "cube": torch.zeros(1, 1, 1)}, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, rows, cols in [
            ("matrix", Span(0, 4), None),
            ("matrix", None, Span(0, 5)),
            ("cube", None, None),
            ("absent", None, None),
        ]:
            with pytest.raises(CheckpointInvalid, match=name):
                checkpoint.read(name, rows, cols)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("model-0000*"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointInvalid, match=rf"{shard.name}.*truncated"):
        Checkpoint.open(tmp_path)


def test_a_file_altered_while_served_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"matrix": torch.zeros(3, 4)}, path)
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.read("matrix")
        os.utime(path, ns=(1, 1))
        with pytest.raises(CheckpointInvalid, match="altered"):
            checkpoint.read("matrix")
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointInvalid, match=r"model\.safetensors"):
            checkpoint.read("matrix")


@pytest.mark.parametrize(
    "weight_map", [None, {}, [], {"a": 1}, {"a": "../model.safetensors"}, {"a": "x.bin"}, {"a": "absent.safetensors"}]
)
def test_a_bad_index_is_refused(tmp_path: Path, weight_map: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointInvalid):
        Checkpoint.open(tmp_path)


def test_an_index_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, shard="20KB")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "more": next(iter(weight_map.values()))})
    with pytest.raises(CheckpointInvalid, match="more"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointInvalid, match="neither"):
        Checkpoint.open(tmp_path)


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}


GOOD = {"a": entry(), "b": entry(shape=[], data_offsets=[24, 28]), "__metadata__": {"format": "pt"}}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(shape=[2, 4])},
        {"a": entry(shape=[2, -3])},
        {"a": entry(shape=[2, True, 3])},
        {"a": entry(shape="6")},
        {"a": entry(dtype="F31")},
        {"a": entry(dtype=["F32"])},
        {"a": entry(data_offsets=[24, 0])},
        {"a": entry(data_offsets=[0])},
        {"a": entry(data_offsets=[4, 28])},
        {"a": entry(data_offsets=[0, 2**70])},
        {"a": entry(), "b": entry()},
        {"a": entry(more=1)},
        {"a": [1]},
        {"a": entry(), "__metadata__": {"x": 1}},
        {},
    ],
)
def test_a_lying_header_is_refused(header: dict[str, Any]) -> None:
    data = json.dumps(header).encode()
    with pytest.raises(CheckpointInvalid):
        parse_header(data, 8 + len(data) + 24, "file")


def test_a_true_header_is_read() -> None:
    data = json.dumps(GOOD).encode()
    tensors = parse_header(data, 8 + len(data) + 28, "file")
    assert [(t.shape, t.offset - 8 - len(data), t.num_bytes) for t in tensors.values()] == [
        ((2, 3), 0, 24),
        ((), 24, 4),
    ]
    twice = data.replace(b'"b"', b'"a"')
    with pytest.raises(CheckpointInvalid, match="twice"):
        parse_header(twice, 8 + len(data) + 28, "file")


@pytest.mark.parametrize(("prefix", "size"), [(b"", 0), (b"\x05\0\0", 3), (bytes(8), 100), (b"\xff" * 8, 100)])
def test_header_lengths_out_of_bounds(prefix: bytes, size: int) -> None:
    with pytest.raises(CheckpointInvalid):
        header_length(prefix, size, "file")


def test_every_altered_header_byte_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(5)}, path)
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for position in range(header_end):
        for flip in (0x01, 0x80):
            altered = bytearray(whole)
            altered[position] ^= flip
            path.write_bytes(altered)
            try:
                with Checkpoint.open(tmp_path) as checkpoint:
                    assert all(tensor.num_bytes in (24, 20) for _, tensor in checkpoint._tensors.values())
            except CheckpointInvalid as error:
                assert "model.safetensors" in str(error)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_hostile_headers_end_in_a_named_error(data: bytes, size: int) -> None:
    try:
        parse_header(data, size, "the file")
    except CheckpointInvalid as error:
        assert "the file" in str(error)
