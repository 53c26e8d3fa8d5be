"""The agents in `examples/`, run as their README says, with the scripted model that it offers to those without a key."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from managed_agents.scripted_model import load_script
from tests.support.stack import Stack

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = ("code_reviewer", "data_analyst", "release_notes")
PROGRAM_SECONDS_MAX = 60
LINES_MAX = 100


@pytest.fixture
def offline(server: Stack) -> Iterator[Stack]:
    """A server whose model knows the examples."""
    server.replies.otherwise = load_script(EXAMPLES / "offline.yaml").reply
    yield server
    server.replies.otherwise = None


async def run(server: Stack, directory: Path, name: str, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
    """Run one example in a bare environment."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "BASE_URL": server.base_url,
        "API_KEY": server.caller.secret,
    }
    with anyio.fail_after(PROGRAM_SECONDS_MAX):
        command = [sys.executable, "-m", f"examples.{name}", *arguments]
        return await anyio.run_process(command, cwd=directory, env=environment, check=False)


async def test_the_code_reviewer_finds_and_approves(offline: Stack, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "good.py").write_text("def add(a, b):\n    return a + b\n")
    done = await run(offline, tmp_path, "code_reviewer", str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().startswith("Verdict: approve")

    (tmp_path / "package" / "bad.py").write_text("try:\n    import missing\nexcept:\n    pass\n")
    done = await run(offline, tmp_path, "code_reviewer", str(tmp_path))
    assert done.returncode == 1, done.stderr.decode()
    assert done.stdout.decode().startswith("Verdict: request changes")
    assert "package/bad.py:3" in done.stdout.decode()
    assert b"[bash]" in done.stderr
    # Applying the same declaration again made neither another agent nor another version.
    agents = [agent async for agent in offline.client.beta.agents.list() if agent.name == "code-reviewer"]
    assert [agent.version for agent in agents] == [1]


async def test_the_data_analyst_reports_and_leaves_its_program(offline: Stack, tmp_path: Path) -> None:
    done = await run(offline, tmp_path, "data_analyst")
    assert done.returncode == 0, done.stderr.decode()
    assert "The region north earns most" in done.stdout.decode()
    assert "1 of 9 rows have no revenue" in done.stdout.decode()
    again = await anyio.run_process([sys.executable, tmp_path / "sales-analysis.py", EXAMPLES / "data_analyst" / "sales.csv"])
    assert again.stdout.decode() == (tmp_path / "sales-report.md").read_text()


async def test_release_notes_come_from_commits(offline: Stack, tmp_path: Path) -> None:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.invalid"]
    for words in (["init", "-q"], *(["commit", "-q", "--allow-empty", "-m", said] for said in ("Sort lists", "Fix a crash"))):
        await anyio.run_process(["git", "-C", tmp_path, *identity, *words])
    done = await run(offline, tmp_path, "release_notes", str(tmp_path))
    assert done.returncode == 0, done.stderr.decode()
    notes = done.stdout.decode()
    assert notes.index("## Added") < notes.index("- Sort lists (") < notes.index("## Fixed") < notes.index("- Fix a crash (")
    nothing = await run(offline, tmp_path, "release_notes", str(tmp_path), "HEAD..HEAD")
    assert nothing.returncode == 1
    assert b"no commits in HEAD..HEAD" in nothing.stderr


def test_examples_stay_small_and_are_listed() -> None:
    page = (EXAMPLES / "README.md").read_text()
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/agent.yaml")) == sorted(NAMES)
    for name in NAMES:
        assert f"examples.{name}" in page
        lines = [line for path in (EXAMPLES / name).glob("*.*") for line in path.read_text().splitlines()]
        assert len(lines) < LINES_MAX, name
