"""What the host's full disk must not break: the runner's journal, and the copy of its code that sandboxes begin with."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from managed_agents.sandbox import layout
from managed_agents.sandbox.runner.journal import INTERRUPTED, SPARES, Journal, error_outcome
from tests.support.small_disk import fill, small_disk


@pytest.fixture
def disk() -> Iterator[Path]:
    with small_disk(2) as directory:
        yield directory


def test_calls_begin_and_end_on_a_full_disk(disk: Path) -> None:
    state = str(disk / "state")
    journal = Journal(state)
    fill(disk)
    for epoch in range(3):
        journal.raise_epoch(epoch)
        for number in range(SPARES):
            journal.begin(f"call {number}")
        with pytest.raises(OSError, match="No space left"):
            journal.begin("one too many")
        for number in range(SPARES - 1):
            journal.finish(f"call {number}", error_outcome("ended"))
            assert b"ended" in journal.outcome(f"call {number}").content
            journal.forget(f"call {number}")
        if epoch < 2:
            journal.forget(f"call {SPARES - 1}")
    # Another runner finds what there is, and has the same room.
    again = Journal(state)
    assert again.epoch == 2
    assert list(again.load()) == [f"call {SPARES - 1}"]
    assert INTERRUPTED.encode() in again.outcome(f"call {SPARES - 1}").content
    for number in range(SPARES - 1):
        again.begin(f"another {number}")
    assert not list(disk.glob("state/*.part"))


def test_a_journal_of_an_older_release_goes_on(tmp_path: Path) -> None:
    (tmp_path / "epoch").write_text("7")
    assert Journal(str(tmp_path)).epoch == 7
    assert Journal(str(tmp_path)).epoch == 7


def test_a_copy_of_the_runner_that_found_no_room_is_not_in_the_way_of_the_next(disk: Path) -> None:
    filler = fill(disk)
    os.truncate(filler, filler.stat().st_size - 32768)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left") as refused:
            layout.install_runner(disk)
        assert refused.value.errno == errno.ENOSPC
    filler.unlink()
    code = layout.install_runner(disk)
    assert (code / "runner" / "main.py").exists()
    assert [path.name for path in (disk / "runner").iterdir()] == [code.name]
