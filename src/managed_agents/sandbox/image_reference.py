"""What a cloud sandbox has, held against an image in a sandbox as sessions get it.

The commands run through the runner: unprivileged, on a read-only root, without network, with the environment that sessions have.
Each row makes what it needs in a directory of its own, so rows do not depend on each other.
"""

import re
import shutil
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import anyio
from pydantic import BaseModel, ConfigDict, Field

from managed_agents.sandbox.backend import Call, Limits, Sandbox, SandboxKey, SandboxSpec
from managed_agents.sandbox.distribution import Progress
from managed_agents.sandbox.docker import DockerBackend

Column = Literal["registry", "distribution", "slim"]
COLUMNS: tuple[Column, ...] = ("registry", "distribution", "slim")
ROW_SECONDS = 120.0
OUTPUT_CHARS_TOLD = 300
GIB = 1024**3


class Entry(BaseModel):
    """How one kind of image stands to a row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: str | None = None
    """What installs it."""
    differs: Annotated[str | None, Field(alias="is")] = None
    """What it is instead of what is wanted."""
    shows: str | None = None
    lacks: str | None = None


class Row(BaseModel):
    """A thing of the reference and how to see it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    property: str
    name: str
    wanted: str
    run: str
    shows: str
    registry: Entry | None = None
    distribution: Entry | None = None
    slim: Entry | None = None

    def entry(self, column: Column) -> Entry | None:
        """Return how a kind of image stands to this row, None when it is not meant to have it."""
        return {"registry": self.registry, "distribution": self.distribution, "slim": self.slim}[column]

    def pattern(self, column: Column) -> str | None:
        """Return what the command must show, None where the thing is not in that kind of image."""
        entry = self.entry(column)
        return None if entry is None or entry.lacks is not None else entry.shows or self.shows

    def cell(self, column: Column) -> str:
        """What the documentation says."""
        entry = self.entry(column)
        if entry is None:
            return "no"
        return f"no: {entry.lacks}" if entry.lacks is not None else entry.differs or self.wanted


def load(path: Path) -> list[Row]:
    """Read the reference."""
    return [Row.model_validate(row) for row in tomllib.loads(path.read_text())["row"]]


CLEAN_UP_SECONDS_MAX = 60.0


async def failures(image: str, rows: Sequence[Row], column: Column, *, progress: Progress) -> list[str]:
    """Run every row's command in a sandbox of `image` and say what is not as it should be. Raises: SandboxError."""
    directory = Path(tempfile.mkdtemp(prefix="ma-image-", dir="/tmp"))
    directory.chmod(0o755)  # commands run as another uid
    backend = DockerBackend(installation=directory.name, data_dir=directory / "data", run_dir=directory / "run")
    try:
        limits = Limits(memory_bytes=4 * GIB, disk_bytes=2 * GIB)
        sandbox = await backend.provision(SandboxSpec("sbx_check", 1, image, limits))
        return await _shown(sandbox, rows, column, progress)
    finally:
        # Also when the check's bound struck, and cancelled what was under way.
        with anyio.move_on_after(CLEAN_UP_SECONDS_MAX, shield=True):
            await backend.collect_orphans(_nothing_known)
            await backend.aclose()
        shutil.rmtree(directory, ignore_errors=True)


async def _shown(sandbox: Sandbox, rows: Sequence[Row], column: Column, progress: Progress) -> list[str]:
    failed: list[str] = []
    try:
        for number, row in enumerate(rows):
            pattern = row.pattern(column)
            if pattern is None:
                continue
            # In a shell of its own: what a row sets is not the next one's.
            call = Call(f"row{number}", 1, "bash", {"command": f"(\n{row.run}\n)"}, ROW_SECONDS)
            outcome = await sandbox.execute(call)
            await sandbox.ack(call.tool_use_id)
            said = "\n".join(str(block.get("text", "")) for block in outcome.content)
            good = re.search(pattern, said) is not None
            progress(f"{row.property}: {row.name}: {'as it should be' if good else 'NOT as it should be'}")
            if not good:
                failed.append(f"{row.property}: {row.name}: not /{pattern}/ but: {said[:OUTPUT_CHARS_TOLD].strip()}")
    finally:
        with anyio.move_on_after(CLEAN_UP_SECONDS_MAX, shield=True):
            await sandbox.destroy()
    return failed


async def _nothing_known() -> set[SandboxKey]:
    return set()


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a table for the documentation."""
    lines = ["| | | Cloud sandbox | Full, by a registry | Full, by Debian 12 | Slim |", "|---|---|---|---|---|---|"]
    before = ""
    for row in rows:
        cells = " | ".join(row.cell(column) for column in COLUMNS)
        lines.append(f"| {row.property if row.property != before else ''} | {row.name} | {row.wanted} | {cells} |")
        before = row.property
    return "\n".join(lines)
