"""A listing comes from where commands run: what is odd in it goes no further."""

from typing import Any

import orjson
import pytest

from managed_agents.sandbox import listing
from managed_agents.sandbox.backend import FileEntry, SandboxError

GOOD: dict[str, Any] = {"path": "a/b", "size": 3, "mtime": 1.5, "sha256": "0" * 64, "signature": "3.1", "unchanged_seconds": 2.0}


def test_what_a_runner_says_is_read() -> None:
    older = {name: GOOD[name] for name in ("path", "size", "mtime", "sha256")}
    newer = {**GOOD, "sha256": "", "mtime": 1, "more": "of a later release"}
    assert listing.read(orjson.dumps([GOOD, older, newer])) == [
        FileEntry("a/b", 3, 1.5, "0" * 64, "3.1", 2.0),
        FileEntry("a/b", 3, 1.5, "0" * 64),
        FileEntry("a/b", 3, 1.0, "", "3.1", 2.0),
    ]


NOT_BELOW: list[Any] = ["", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b", 7, None, ["a"], "x" * 70_000]
NO_LISTING = [b"", b"{", b"{}", b"null", b"[1]", b"[[]]", b'[{"path": "\\ud800"}]', b'[{"mtime": 1e999}]', b"[" * 5000]


@pytest.mark.parametrize(
    "odd",
    [{"path": path} for path in NOT_BELOW]
    + [{"size": size} for size in (-1, 1.5, True, "3", None, 2**63)]
    + [{"mtime": None}, {"mtime": "now"}, {"unchanged_seconds": "long"}, {"unchanged_seconds": False}]
    + [{"sha256": digest} for digest in (None, "0" * 63, "G" * 64, 5, "0" * 64 + "\n")]
    + [{"signature": 5}, {"signature": "s" * 1000}],
    ids=str,
)
def test_what_is_odd_is_refused(odd: dict[str, Any]) -> None:
    with pytest.raises(SandboxError):
        listing.read(orjson.dumps([GOOD, {**GOOD, **odd}]))


@pytest.mark.parametrize("body", [*NO_LISTING, orjson.dumps([GOOD] * 10_001)], ids=lambda body: body[:20])
def test_what_is_no_listing_is_refused(body: bytes) -> None:
    with pytest.raises(SandboxError):
        listing.read(body)
