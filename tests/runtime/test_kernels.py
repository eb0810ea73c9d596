"""The choice of kernels is proven, kept, and safe where a kernel is missing or lies."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from runtime import kernels
from runtime.kernels import Kernels, load_or_measure, measure
from runtime.quantised import Int8Dynamic

CPU = torch.device("cpu")


def test_a_choice_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "kernels.json"
    first = load_or_measure(CPU, path)
    monkeypatch.setattr(kernels, "measure", lambda device: pytest.fail("measured again"))
    assert load_or_measure(CPU, path) == first


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', json.dumps({"key": "x", "kernels": {}})])
def test_a_damaged_or_foreign_file_is_measured_again(
    tmp_path: Path, content: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "kernels.json"
    path.write_text(content)
    monkeypatch.setattr(kernels, "measure", lambda device: Kernels(int4_few_rows=3))
    assert load_or_measure(CPU, path) == Kernels(int4_few_rows=3)
    assert json.loads(path.read_text())["kernels"]["int4_few_rows"] == 3


def test_a_choice_that_cannot_be_kept_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    monkeypatch.setattr(kernels, "measure", lambda device: Kernels(int4_few_rows=3))
    with caplog.at_level(logging.WARNING):
        assert load_or_measure(CPU, tmp_path / "cache" / "kernels.json") == Kernels(int4_few_rows=3)
    assert "measures the kernels again" in caplog.text


def test_a_kernel_that_saturates_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Int8Dynamic.apply
    monkeypatch.setattr(Int8Dynamic, "apply", lambda self, x: right(self, x).clamp(-1, 1))
    assert not measure(CPU).packs_int8


def test_a_kernel_that_is_missing_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("not compiled in")

    monkeypatch.setattr(kernels, "pack_int4", missing)
    monkeypatch.setattr(kernels, "Int8Dynamic", missing)
    found = measure(CPU)
    assert not found.packs_int4 and not found.packs_int8 and found.int4_few_rows == 0


def test_other_devices_take_the_plain_way() -> None:
    assert measure(torch.device("cuda")) == Kernels()
