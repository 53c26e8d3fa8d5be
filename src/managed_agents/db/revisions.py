"""Which schema this release has: the revisions of its migrations, read from their files.

Without Alembic, which only the process that migrates should pay for. A revision that we do not know belongs to a newer
release.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

_REVISION = re.compile(r'^(revision|down_revision)\b[^=\n]*= *(?:"(\w+)"|None)', re.MULTILINE)


@dataclass(frozen=True)
class Revisions:
    """All revisions of this release, and the newest."""

    known: frozenset[str]
    head: str


def migrations_directory() -> Path:
    """Where the migrations are: inside the package in a wheel, at the top level of a checkout."""
    installed = Path(__file__).with_name("migrations")
    return installed if installed.is_dir() else Path(__file__).parents[3] / "migrations"


@functools.cache
def revisions() -> Revisions:
    """Read the revisions of this release. They form one line, so exactly one is nobody's predecessor."""
    before: dict[str, str] = {}
    for path in (migrations_directory() / "versions").glob("*.py"):
        found: dict[str, str] = dict(_REVISION.findall(path.read_text()))
        before[found["revision"]] = found["down_revision"]
    (head,) = before.keys() - set(before.values())
    return Revisions(frozenset(before), head)
