"""The command: quick to help, flags that mirror the settings, messages that name what is wrong."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from managed_agents.cli import main as command_line
from managed_agents.cli.serve import up
from managed_agents.core.settings import Settings

COMMAND = [sys.executable, "-m", "managed_agents.cli.main"]


def test_help_does_not_wait_for_the_servers_libraries() -> None:
    code = (
        "import sys; from managed_agents.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('pydantic', 'fastapi', 'sqlalchemy', 'anthropic', 'anyio') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.stdout.rstrip().endswith("[]"), done.stdout + done.stderr


@pytest.mark.parametrize("name", list(command_line.COMMANDS))
def test_every_command_explains_itself(name: str) -> None:
    done = CliRunner().invoke(command_line.main, [name, "--help"])
    assert done.exit_code == 0, done.output
    assert len(done.output.splitlines()) > 4


def test_every_setting_but_the_tests_own_is_a_flag_of_up() -> None:
    flags = {parameter.name for parameter in up.params if isinstance(parameter, click.Option)}
    assert set(Settings.model_fields) - {"faults"} == flags


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["api"], "MANAGED_AGENTS_DATABASE_URL"),
        (["up", "--port", "high"], "--port (MANAGED_AGENTS_PORT)"),
        (["worker", "--database-url", "postgresql://x", "--sandbox", "chroot"], "--sandbox (MANAGED_AGENTS_SANDBOX)"),
        (["up", "--colour"], "No such option"),
    ],
)
def test_a_mistake_is_named(arguments: list[str], message: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MANAGED_AGENTS_")}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 2
    assert message in done.stderr


def test_version() -> None:
    assert re.search(r"\d+\.\d+\.\d+", CliRunner().invoke(command_line.main, ["--version"]).output)


def test_the_settings_page_is_what_the_settings_say() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, root / "scripts/generate_docs.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_is_quick() -> None:
    def seconds() -> float:
        started = time.monotonic()
        subprocess.run([*COMMAND, "--help"], capture_output=True, check=True, timeout=30)
        return time.monotonic() - started

    bare = min(_bare_seconds() for _ in range(5))
    assert min(seconds() for _ in range(5)) < bare + 0.3


def _bare_seconds() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import click"], check=True, timeout=30)
    return time.monotonic() - started
