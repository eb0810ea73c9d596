"""Files that are there whole or not at all, whatever the disk says."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from protocol.durable_file import AS_UMASK_SAYS, Draft, write_whole
from protocol.errors import ManyhandsError, StorageFailed, StorageFull

FAILURES = [
    (errno.ENOSPC, StorageFull),
    (errno.EDQUOT, StorageFull),
    (errno.EFBIG, StorageFull),
    (errno.EIO, StorageFailed),
    (errno.EROFS, StorageFailed),
    (errno.EACCES, StorageFailed),
]
STEPS = ("mkdir", "open", "fsync", "replace")


def fail(monkeypatch: pytest.MonkeyPatch, step: str, number: int) -> None:
    """Have one step of every write end with this error number."""

    def failing(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path if step in ("mkdir", "replace") else os, step, failing)


def test_a_file_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "note"
    for content in (b"first", b"", b"second"):
        write_whole(path, content, is_synced=True)
        assert path.read_bytes() == content
        assert [file.name for file in path.parent.iterdir()] == ["note"]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_file_is_its_owners_alone_unless_told(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "own", b"x", is_synced=False)
        write_whole(tmp_path / "shared", b"x", is_synced=False, mode=AS_UMASK_SAYS)
    finally:
        os.umask(before)
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("number", "kind"), FAILURES)
def test_a_write_that_fails_names_the_folder_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, kind: type[ManyhandsError]
) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"before")
    with monkeypatch.context() as patch, pytest.raises(kind) as caught:
        fail(patch, step, number)
        write_whole(path, b"after", is_synced=True, phase="load")
    assert type(caught.value) is kind and caught.value.phase == "load"
    assert str(tmp_path) in caught.value.message and os.strerror(number) in caught.value.message
    assert path.read_bytes() == b"before"
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_only_what_must_outlive_a_loss_of_power_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "fsync", errno.EIO)
    write_whole(tmp_path / "note", b"x", is_synced=False)
    assert (tmp_path / "note").read_bytes() == b"x"


def test_a_draft_that_is_left_early_leaves_nothing(tmp_path: Path) -> None:
    with Draft(tmp_path / "large") as draft:
        draft.append(b"half of it")
        assert not (tmp_path / "large").exists()
    assert not list(tmp_path.iterdir())


def test_two_drafts_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "note"
    with Draft(path) as one, Draft(path) as other:
        one.append(b"one")
        other.append(b"other")
        one.finish()
        assert path.read_bytes() == b"one"
        other.finish()
    assert path.read_bytes() == b"other"
    assert [file.name for file in tmp_path.iterdir()] == ["note"]


def test_a_draft_is_written_only_while_it_is_open(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "note")
    with pytest.raises(ValueError, match="not being written"):
        draft.append(b"x")
