"""docs/testing-your-agents.md: its examples run as they stand, but for the port; its tables name what
exists."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from managed_agents import scripted_model
from managed_agents.scripted_model import yaml_script

PAGE = Path(__file__).parents[3] / "docs" / "testing-your-agents.md"
TEXT = PAGE.read_text()
BLOCKS = re.findall(r"^```\w+ (script|with)=(\S+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SCRIPTS = {name: code for kind, name, code in BLOCKS if kind == "script"}
EXAMPLES = [(name, code) for kind, name, code in BLOCKS if kind == "with"]
COMMAND = "from managed_agents.scripted_model import scripted_model_command as command; command()"


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, tmp_path: Path) -> None:
    name, code = EXAMPLES[number]
    arguments = ["--port", "0", "--log-requests", str(tmp_path / "requests.jsonl")]
    if name != "none":
        (tmp_path / name).write_text(SCRIPTS[name])
        arguments += ["--script", str(tmp_path / name)]
    command = [sys.executable, "-c", COMMAND, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        port = process.stdout.readline().rpartition(":")[2].strip()
        example = code.replace("127.0.0.1:8485", f"127.0.0.1:{port}")
        ran = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=60)
        process.terminate()
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "requests.jsonl").read_text().count("\n") >= 1
    assert "anything" not in (tmp_path / "requests.jsonl").read_text()


def test_there_is_an_example_of_everything() -> None:
    assert {name for name, _ in EXAMPLES} == {"none", *SCRIPTS}
    assert len(EXAMPLES) >= 4


def test_every_option_part_and_condition_is_documented() -> None:
    options = [option for each in scripted_model.scripted_model_command.params for option in each.opts]
    parts = [
        "text",
        "thinking",
        "tool_use",
        "broken_tool_use",
        "fail",
        "stall",
        "pace",
        "cut",
        "refuse",
        "stop_reason",
    ]
    assert set(parts) < set(scripted_model.__all__)
    missing = [each for each in (*options, *parts, *yaml_script.CONDITIONS) if f"`{each}" not in TEXT]
    assert missing == []
