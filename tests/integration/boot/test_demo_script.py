"""The scripted model's part in the demo, played against real commands in a directory: it goes by what they print."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from managed_agents.cli import demo_pack, demo_script
from managed_agents.scripted_model import Request
from managed_agents.scripted_model.reply import ToolUse


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for folder in ("workspace", "session/uploads", "session/outputs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "session/uploads/project.tar.gz").write_bytes(demo_pack.project())
    return tmp_path


def moved(text: str, place: Path) -> str:
    return text.replace("/workspace", f"{place}/workspace").replace("/mnt/session", f"{place}/session")


def perform(call: ToolUse, place: Path) -> tuple[str, bool]:
    match call.name:
        case "bash":
            command = moved(str(call.input["command"]), place).replace("python3 -m venv", f"{sys.executable} -m venv")
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=100)
            return done.stdout + done.stderr, done.returncode != 0
        case "edit":
            path = Path(moved(str(call.input["file_path"]), place))
            old, new = str(call.input["old_string"]), str(call.input["new_string"])
            if path.read_text().count(old) != 1:
                return "old_string must occur exactly once", True
            path.write_text(path.read_text().replace(old, new))
        case _:
            Path(moved(str(call.input["file_path"]), place)).write_text(str(call.input["content"]))
    return "done", False


def play(place: Path) -> list[str]:
    """Run the conversation to its end; return what was said."""
    messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "audit"}]}]
    said: list[str] = []
    for _ in range(20):
        request = Request({"model": "m", "messages": messages}, {}, 1, lambda _key: 1)
        parts = demo_script.reply(request)
        said += [part.text for part in parts if hasattr(part, "text")]
        calls = [part for part in parts if isinstance(part, ToolUse)]
        if not calls:
            return said
        uses, results = [], []
        for number, call in enumerate(calls):
            use_id = f"toolu_{len(messages)}_{number}"
            uses.append({"type": "tool_use", "id": use_id, "name": call.name, "input": call.input})
            text, is_error = perform(call, place)
            content = [{"type": "text", "text": text}]
            results.append({"type": "tool_result", "tool_use_id": use_id, "content": content, "is_error": is_error})
        messages += [{"role": "assistant", "content": uses}, {"role": "user", "content": results}]
    raise AssertionError("the audit did not end")


def pins(place: Path) -> str:
    return (place / "workspace/readability/requirements.txt").read_text()


def repack(place: Path, name: str, old: str, new: str) -> None:
    """Change one file of the uploaded project."""
    archive = place / "session/uploads/project.tar.gz"
    changed = place / "changed"
    changed.mkdir()
    subprocess.run(["tar", "-xzf", archive, "-C", changed], check=True)
    path = changed / demo_pack.ROOT / name
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    subprocess.run(["tar", "-czf", archive, "-C", changed, demo_pack.ROOT], check=True)


def test_the_outdated_pin_is_bumped_and_reported(place: Path) -> None:
    play(place)
    report = (place / "session/outputs/report.md").read_text()
    assert "| textkit | 1.2.0 | 1.4.0 | bumped |" in report
    assert "Tests before: 7 tests, OK, skipped=1" in report
    assert "Tests after: 7 tests, OK\n" in report
    assert "textkit==1.4.0" in pins(place)


def test_a_bump_that_breaks_the_tests_is_taken_back(place: Path) -> None:
    repack(place, "tests/test_readability.py", '"/texts/cafe-ole"', '"/texts/caf-ol"')
    play(place)
    assert "left alone" in (place / "session/outputs/report.md").read_text()
    assert "textkit==1.2.0" in pins(place)


def test_tests_that_fail_beforehand_end_the_audit(place: Path) -> None:
    repack(place, "tests/test_readability.py", '"/texts/reading-time"', '"/texts/other"')
    said = play(place)
    assert any("fail before anything was changed" in each for each in said)
    assert "textkit==1.2.0" in pins(place)


def test_nothing_outdated_changes_nothing(place: Path) -> None:
    repack(place, "requirements.txt", "textkit==1.2.0", "textkit==1.4.0")
    play(place)
    assert "up to date" in (place / "session/outputs/report.md").read_text()


def test_the_archive_is_the_same_every_time() -> None:
    assert demo_pack.project() == demo_pack.project()
