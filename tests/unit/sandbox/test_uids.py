"""Uids of sandboxes: never shared, free again with the sandbox's directory, and those of older releases left to them."""

import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from managed_agents.sandbox import uids
from managed_agents.sandbox.backend import SandboxError


def home(data_dir: Path, name: str) -> Path:
    made = data_dir / "sandboxes" / f"{name}.1"
    made.mkdir(parents=True)
    return made


def alike(count: int) -> list[str]:
    """Ids that had the same uid when it was computed from them."""
    found: dict[int, list[str]] = {}
    for number in range(100_000):
        same = found.setdefault(zlib.crc32(f"sbx_{number}".encode()) % uids.COUNT, [])
        same.append(f"sbx_{number}")
        if len(same) == count:
            return same
    raise AssertionError


def test_no_two_sandboxes_share_a_uid(tmp_path: Path) -> None:
    homes = [home(tmp_path, name) for name in alike(5)]
    with ThreadPoolExecutor(5) as threads:
        taken = list(threads.map(lambda each: uids.take(tmp_path, each), homes))
    assert len(set(taken)) == 5
    shutil.rmtree(homes[2])
    assert uids.take(tmp_path, home(tmp_path, "sbx_another")) not in {*taken} - {taken[2]}


def test_a_sandbox_of_an_older_release_keeps_its_uid(tmp_path: Path) -> None:
    older, newer = alike(2)
    home(tmp_path, older)
    assert uids.take(tmp_path, home(tmp_path, newer)) != zlib.crc32(older.encode()) % uids.COUNT


def test_uids_may_run_out_and_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uids, "COUNT", 2)
    first, second, third = (home(tmp_path, name) for name in ("a", "b", "c"))
    # Two that have none yet count as of an older release, so they are made one after the other, as backends do.
    shutil.rmtree(second)
    shutil.rmtree(third)
    assert uids.take(tmp_path, first) in (0, 1)
    second = home(tmp_path, "b")
    assert {uids.take(tmp_path, second)} <= {0, 1}
    third = home(tmp_path, "c")
    with pytest.raises(SandboxError, match="all 2 uids"):
        uids.take(tmp_path, third)
    shutil.rmtree(first)
    assert uids.take(tmp_path, third) in (0, 1)
