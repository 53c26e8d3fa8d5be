"""Descriptors are what connections cost: processes take all that the system gives, and sandboxes get half of it."""

import subprocess
import sys

import pytest

from managed_agents.egress.gateway import Bounds

_LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))\n"

_RAISED = """
import resource
from managed_agents.processes.lifetime import raise_open_files
print(raise_open_files(), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""

# A sandbox asks for more tunnels than there are descriptors; then the process opens one more file.
_CROWDED = """
import resource, anyio
from managed_agents.egress.gateway import Bounds
from tests.support.egress import server, way_out

async def main():
    bounds = Bounds().within(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    opened, refused = [], 0
    async with way_out(bounds=bounds) as way, server(echo=True) as site:
        way.names["site.test"] = [["127.0.0.1"]]
        with anyio.fail_after(60):
            for _ in range(100):
                stream = await way.connect()
                await stream.send(f"CONNECT {site.authority} HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n".encode())
                answer = await stream.receive()
                if answer.startswith(b"HTTP/1.1 200"):
                    opened.append(stream)
                else:
                    assert answer.startswith(b"HTTP/1.1 503"), answer
                    refused += 1
                    await stream.aclose()
        open("/dev/null").close()
        for stream in opened:
            await stream.aclose()
    print(len(opened), refused)

anyio.run(main)
"""


def run(program: str, *, soft: int, hard: int) -> str:
    command = [sys.executable, "-c", _LIMITED.format(soft=soft, hard=hard) + program]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def test_a_process_takes_the_descriptors_that_the_system_allows() -> None:
    assert run(_RAISED, soft=128, hard=700) == "700 700 700"
    assert run(_RAISED, soft=700, hard=700) == "700 700 700"


@pytest.mark.requirement("ENV-050")
def test_tunnels_leave_a_process_descriptors_for_the_rest() -> None:
    opened, refused = run(_CROWDED, soft=400, hard=400).split()
    assert (int(opened), int(refused)) == (24, 76)  # three quarters of what half of 400 has room for


def test_bounds_follow_the_descriptors() -> None:
    assert Bounds().within(1_048_576) == Bounds()
    assert Bounds().within(1024).connections_at_most == 85
    assert Bounds().within(1024).connections_in_all == 63
    assert Bounds().within(1).connections_at_most == 1
