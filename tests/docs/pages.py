"""The pages of the documentation and the examples in them.

A fenced block marked `bash` or `python` is an example and is run; other marks (`console`, `text`, `json` …) are for reading.
A comment before the fence says what an example answers when that is an error:

    <!-- expect: 404 -->
"""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
API = ROOT / "docs" / "api"
EVENTS_PAGE = API / "events-and-streaming.md"
ERRORS_PAGE = API / "errors-and-conventions.md"
RUNNING_PAGE = ROOT / "docs" / "operations" / "running.md"
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
SOURCE = ROOT / "src" / "managed_agents"

# Pages whose examples are run, in the order in which they are meant to be read.
EXAMPLE_PAGES = (
    README,
    API / "agents.md",
    API / "environments.md",
    API / "sessions.md",
    API / "session-resources.md",
    API / "threads.md",
    EVENTS_PAGE,
    API / "permissions.md",
    API / "web-tools.md",
    API / "files.md",
    API / "organization.md",
    ERRORS_PAGE,
)

_BLOCK = re.compile(r"(?:^<!-- expect: (\d{3}) -->\n)?^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """One block: `expected` is the HTTP status of its last request where that is an error."""

    line: int
    language: str
    code: str
    expected: int | None


def examples(page: Path) -> list[Example]:
    """The examples of a page, in order."""
    text = page.read_text()
    return [
        Example(text.count("\n", 0, match.start()) + 1, match[2], match[3], int(match[1]) if match[1] else None)
        for match in _BLOCK.finditer(text)
    ]


def markdown_pages() -> list[Path]:
    """Every page of the repository."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
