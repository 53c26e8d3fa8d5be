"""Nothing in the repository speaks of the machine it was written on, or sends a reader to one registry."""

import re
import subprocess

from tests.docs.pages import ROOT

# Written so that this file does not contain what it looks for.
_FORBIDDEN = re.compile(
    "|".join(
        (
            r"(?<![\w.~}-])/wo" r"rk(?![\w-])",
            r"shared" r"/(?:spec|style)",
            r"\bspec \d\d\b",
            r"py" r"pi\.org",
            r"python" r"hosted\.",
            r"npm" r"js\.(?:org|com)",
            r"(?:proxy|sum)\.gol" r"ang\.org",
            r"(?:deb|security)\.deb" r"ian\.org",
            r"index-" r"url\s*=?\s*\S*://",
        )
    )
)
_TEXT = {".md", ".py", ".toml", ".ini", ".lock", ".yaml", ".yml", ".json", ".sh", ".mako", ""}


def test_no_page_and_no_source_names_our_machine_or_a_registry() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found: list[str] = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.suffix not in _TEXT or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if match := _FORBIDDEN.search(line):
                found.append(f"{name}:{number}: {match[0]}")
    assert found == []
