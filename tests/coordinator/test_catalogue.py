"""Tiles cut and hashed by the catalogue: their bytes against transformers' state dict, the cache, and altered files."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_folders import FAMILIES, save_model

from coordinator.catalogue import Catalogue
from coordinator.checkpoint import Checkpoint
from coordinator.hf_config import read_hf_config
from protocol.errors import CheckpointInvalid, FrameMalformed, StorageFull, TileUnavailable
from protocol.specs import ActivationFormat, ModelSpec, WeightFormat
from protocol.tiles import TileId, TileKind, all_tiles, tile_parts, tile_slices

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build(folder: Path, **changes: Any) -> Catalogue:
    spec = replace(read_hf_config(folder).spec, **changes)
    return Catalogue.build(folder, spec, folder / "cache")


def read_whole(catalogue: Catalogue, tile: TileId, chunk: int = 1000) -> bytes:
    entry = catalogue.entries[tile]
    starts = range(0, entry.num_bytes, chunk)
    return b"".join(catalogue.read(entry.digest, at, min(chunk, entry.num_bytes - at)) for at in starts)


def part_of(spec: ModelSpec, tile: TileId, data: bytes, name: str) -> torch.Tensor:
    part = next(part for part in tile_parts(spec, tile) if part.name == name)
    values = torch.frombuffer(bytearray(data[part.offset : part.offset + part.num_bytes]), dtype=TORCH[part.dtype])
    return values.reshape(part.rows, part.cols) if part.cols else values


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weights", "activations"), [("float32", "float32"), ("bfloat16", "float32")])
def test_every_tile_holds_its_slices_of_the_model(
    tmp_path: Path, family: str, stored: torch.dtype, weights: str, activations: str
) -> None:
    state = save_model(tmp_path, family, stored, "20KB").state_dict()
    changes = {"weights": WeightFormat(weights), "activations": ActivationFormat(activations)}
    with build(tmp_path, **changes) as catalogue:
        spec = catalogue.spec
        assert list(catalogue.entries) == all_tiles(spec)
        for tile, entry in catalogue.entries.items():
            data = read_whole(catalogue, tile)
            assert hashlib.sha256(data).digest() == entry.digest
            used = set()
            for piece in tile_slices(spec, tile):
                expected = state[piece.tensor]
                expected = expected if piece.rows is None else expected[piece.rows.start : piece.rows.end]
                expected = expected if piece.cols is None else expected[:, piece.cols.start : piece.cols.end]
                part = next(part for part in tile_parts(spec, tile) if part.name == piece.part)
                assert torch.equal(part_of(spec, tile, data, piece.part), expected.to(TORCH[part.dtype]))
                used.update(range(part.offset, part.offset + part.num_bytes))
            assert not any(byte for at, byte in enumerate(data) if at not in used)


def test_tiles_of_a_layer_put_together_are_its_matrices(tmp_path: Path) -> None:
    state = save_model(tmp_path, "qwen3").state_dict()
    with build(tmp_path) as catalogue:
        spec = catalogue.spec
        for kind, count, name, axis, tensor in [
            (TileKind.ATTENTION, spec.kv_heads, "q", 0, "self_attn.q_proj"),
            (TileKind.ATTENTION, spec.kv_heads, "o", 1, "self_attn.o_proj"),
            (TileKind.FFN, spec.ffn_tiles, "up", 0, "mlp.up_proj"),
            (TileKind.FFN, spec.ffn_tiles, "down", 1, "mlp.down_proj"),
        ]:
            tiles = [TileId(1, kind, index) for index in range(count)]
            parts = [part_of(spec, tile, read_whole(catalogue, tile), name) for tile in tiles]
            assert torch.equal(torch.cat(parts, axis), state[f"model.layers.1.{tensor}.weight"])


def test_hashing_reads_every_byte_once_and_a_second_start_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    values_read: Counter[str] = Counter()
    plain_read = Checkpoint.read

    def counting_read(self: Checkpoint, name: str, *args: Any) -> Any:
        array = plain_read(self, name, *args)
        values_read[name] += array.size
        return array

    monkeypatch.setattr(Checkpoint, "read", counting_read)
    spec = read_hf_config(tmp_path).spec
    steps: list[tuple[int, int]] = []
    with Catalogue.build(tmp_path, spec, tmp_path / "cache", lambda *step: steps.append(step)) as catalogue:
        first = catalogue.entries
        with Checkpoint.open(tmp_path) as checkpoint:
            assert values_read == {name: np.prod(checkpoint.shape(name)) for name in checkpoint.names()}
        assert steps == sorted(steps) and steps[-1] == (catalogue.total_bytes, catalogue.total_bytes)
    values_read.clear()
    with build(tmp_path) as catalogue:
        assert catalogue.entries == first and not values_read
    os.utime(tmp_path / "model.safetensors", ns=(5, 5))
    with build(tmp_path) as catalogue:
        assert catalogue.entries == first and values_read


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "foreign", "folder"])
def test_a_damaged_manifest_is_logged_and_built_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_model(tmp_path)
    with build(tmp_path) as catalogue:
        first = catalogue.entries
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"empty": b"", "cut": whole[:-9], "flipped": flipped, "foreign": b"x" * 500}[damage])
    with caplog.at_level(logging.WARNING), build(tmp_path) as catalogue:
        assert catalogue.entries == first
    assert "manifest" in caplog.text
    if damage != "folder":
        assert path.read_bytes() == whole
    assert len(list((tmp_path / "cache").iterdir())) == 1  # no temporary file is left


def test_another_spec_has_another_manifest(tmp_path: Path) -> None:
    save_model(tmp_path)
    with build(tmp_path) as one, build(tmp_path, ffn_tiles=2) as other:
        assert len(one.entries) != len(other.entries)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_ranges_and_digests_are_checked(tmp_path: Path) -> None:
    save_model(tmp_path)
    with build(tmp_path) as catalogue:
        entry = next(iter(catalogue.entries.values()))
        assert catalogue.tile_of(entry.digest) == entry.tile
        assert catalogue.read(entry.digest, entry.num_bytes, 0) == b""
        for offset, length in [(-1, 1), (0, -1), (0, entry.num_bytes + 1), (entry.num_bytes, 1), (2**60, 2**60)]:
            with pytest.raises(FrameMalformed):
                catalogue.read(entry.digest, offset, length)
        for unknown in (bytes(32), b""):
            with pytest.raises(TileUnavailable):
                catalogue.read(unknown, 0, 1)
            with pytest.raises(TileUnavailable):
                catalogue.tile_of(unknown)


def test_tiles_of_equal_bytes_share_a_digest(tmp_path: Path) -> None:
    model = save_model(tmp_path)
    torch.nn.init.ones_(model.model.layers[0].input_layernorm.weight)
    for layer in model.model.layers:
        torch.nn.init.ones_(layer.input_layernorm.weight)
        torch.nn.init.ones_(layer.post_attention_layernorm.weight)
    model.save_pretrained(tmp_path)
    with build(tmp_path) as catalogue:
        norms = [TileId(layer, TileKind.NORMS, 0) for layer in range(2)]
        digests = {catalogue.entries[tile].digest for tile in norms}
        assert len(digests) == 1
        assert catalogue.tile_of(digests.pop()) == norms[0]


def test_a_cut_tile_is_kept_and_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path)
    spec = read_hf_config(tmp_path).spec
    cuts: list[TileId] = []

    def counting_cut(spec: ModelSpec, tile: TileId, source: Any) -> bytearray:
        cuts.append(tile)
        return plain_cut(spec, tile, source)

    one, two = TileId(0, TileKind.FFN, 0), TileId(0, TileKind.FFN, 1)
    room = 1
    with Catalogue.build(tmp_path, spec, tmp_path / "cache", cache_bytes=room) as catalogue:
        from coordinator import catalogue as module

        plain_cut = module.cut_tile
        monkeypatch.setattr(module, "cut_tile", counting_cut)
        for tile in (one, one, two, one):
            read_whole(catalogue, tile)
    assert cuts == [one, two, one]
    cuts.clear()
    with Catalogue.build(tmp_path, spec, tmp_path / "cache") as catalogue, ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda tile: read_whole(catalogue, tile), [one, two] * 8))
    assert len(set(results)) == 2 and sorted(cuts) == [one, two]


def test_bytes_that_differ_from_the_manifest_are_not_served(tmp_path: Path) -> None:
    save_model(tmp_path)
    build(tmp_path).close()
    path = tmp_path / "model.safetensors"
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-20_000:] = bytes(20_000)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a careless restore would leave it
    with build(tmp_path) as catalogue:
        refused = 0
        for entry in catalogue.entries.values():
            try:
                assert hashlib.sha256(catalogue.read(entry.digest, 0, entry.num_bytes)).digest() == entry.digest
            except CheckpointInvalid as error:
                refused += 1
                assert str(entry.tile) in str(error)
        assert refused


def test_a_checkpoint_altered_while_served_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    with build(tmp_path) as catalogue:
        os.utime(tmp_path / "model.safetensors", ns=(5, 5))
        entry = next(iter(catalogue.entries.values()))
        with pytest.raises(CheckpointInvalid, match="altered"):
            catalogue.read(entry.digest, 0, 1)


def test_an_unwritable_cache_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model(tmp_path)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING), build(tmp_path) as catalogue:
        assert catalogue.total_bytes
    assert "manifest" in caplog.text


# ---------------------------------------------------------------- quantised


def dequantised(spec: ModelSpec, data: bytes, tile: TileId, name: str) -> np.ndarray:
    """A matrix of a quantised tile as floats."""
    parts = {part.name: np.frombuffer(data, np.uint8, part.num_bytes, part.offset) for part in tile_parts(spec, tile)}
    shapes = {part.name: (part.rows, part.cols) for part in tile_parts(spec, tile)}

    def widen(key: str) -> np.ndarray:
        return (parts[key].view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shapes[key])

    if f"{name}.zero" not in parts:
        scale = parts[f"{name}.scale"].view(np.float32)
        return parts[name].view(np.int8).reshape(shapes[name]) * scale[:, None]
    packed = parts[name].reshape(shapes[name])
    nibble = np.stack((packed & 15, packed >> 4), axis=-1).reshape(packed.shape[0], -1, 32).astype(np.float32)
    return ((nibble - 8) * widen(f"{name}.scale")[..., None] + widen(f"{name}.zero")[..., None]).reshape(
        packed.shape[0], -1
    )


@pytest.mark.parametrize(("weights", "bound"), [(WeightFormat.INT8, 0.012), (WeightFormat.INT4, 0.09)])
def test_quantised_tiles_are_made_once_and_near_the_checkpoint(
    weights: WeightFormat, bound: float, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4}
    state = save_model(folder, "llama", torch.float32, **sizes, num_key_value_heads=2).state_dict()
    spec = read_hf_config(folder, weights=weights).spec
    steps: list[tuple[int, int]] = []
    with Catalogue.build(folder, spec, tmp_path / "cache", lambda done, total: steps.append((done, total))) as one:
        assert steps[-1][0] == steps[-1][1] == one.total_bytes
        for tile, entry in one.entries.items():
            data = one.read(entry.digest, 0, entry.num_bytes)
            assert hashlib.sha256(data).digest() == entry.digest
            for piece in tile_slices(spec, tile):
                if f"{piece.part}.scale" not in {part.name for part in tile_parts(spec, tile)}:
                    continue
                wanted = state[piece.tensor].float().numpy()
                wanted = wanted[slice(piece.rows.start, piece.rows.end)] if piece.rows else wanted
                wanted = wanted[:, slice(piece.cols.start, piece.cols.end)] if piece.cols else wanted
                found = dequantised(spec, data, tile, piece.part)
                assert np.linalg.norm(found - wanted) <= bound * np.linalg.norm(wanted), (tile, piece.part)
        entries = one.entries
    steps.clear()
    with Catalogue.build(folder, spec, tmp_path / "cache", lambda done, total: steps.append((done, total))) as again:
        assert again.entries == entries and not steps
    (kept,) = (tmp_path / "cache").glob("*.tiles")
    kept.write_bytes(kept.read_bytes()[:-1])
    with Catalogue.build(folder, spec, tmp_path / "cache") as mended:
        assert mended.entries == entries


def test_a_quantised_tile_altered_on_disk_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4}
    save_model(folder, "llama", torch.float32, **sizes, num_key_value_heads=2)
    spec = read_hf_config(folder, weights=WeightFormat.INT8).spec
    with Catalogue.build(folder, spec, tmp_path / "cache") as catalogue:
        (kept,) = (tmp_path / "cache").glob("*.tiles")
        data = bytearray(kept.read_bytes())
        data[5] ^= 1
        kept.write_bytes(data)
        first = next(iter(catalogue.entries.values()))
        with pytest.raises(CheckpointInvalid, match="altered"):
            catalogue.read(first.digest, 0, 1)


def test_a_disk_that_is_full_of_quantised_tiles_is_told_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_attention_heads": 4}
    save_model(folder, "llama", torch.float32, **sizes, num_key_value_heads=2)
    spec = read_hf_config(folder, weights=WeightFormat.INT8).spec

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="No space left") as caught:
        Catalogue.build(folder, spec, tmp_path / "cache")
    assert str(tmp_path / "cache") in caught.value.message
    assert not list((tmp_path / "cache").iterdir())
