"""The commands of an operations page, as an operator runs them: a block in a shell that stops at the first failure."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "operations" / "backup-and-upgrade.md"
SECONDS_MAX = 90.0
_BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(heading: str) -> list[str]:
    """The `bash` blocks of one section of the page."""
    _, found, rest = PAGE.read_text().partition(f"\n## {heading}\n")
    assert found, f"{PAGE.name} has no section {heading}"
    return _BLOCK.findall(rest.partition("\n## ")[0])


def run(script: str, environment: Mapping[str, str], *tools: Path) -> None:
    """Run a block with this checkout's command, and the programs in `tools` (Postgres's), first on the path."""
    path = ":".join(map(str, (Path(sys.executable).parent, *tools, "/usr/local/bin", "/usr/bin", "/bin")))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        env={**environment, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
