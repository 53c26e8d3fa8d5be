"""The scripted model as its users run it, a process of its own, and a model client connected to it."""

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from managed_agents.model.client import AnthropicModelClient
from managed_agents.model.endpoint import Endpoint

COMMAND = "from managed_agents.scripted_model import scripted_model_command as command; command()"
KEY = "sk-secret-key"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def base_url() -> Iterator[str]:
    arguments = ["--port", "0", "--script", str(Path(__file__).with_name("script.py"))]
    with subprocess.Popen([sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found is not None, line
        yield found[0]
        process.terminate()
        assert process.wait(10) in (0, -15)


@pytest.fixture
def endpoint(base_url: str) -> Endpoint:
    assert httpx.post(f"{base_url}/_scripted/reset").status_code == 200
    return Endpoint(base_url, SecretStr(KEY), is_real_api=False, is_loopback=True)


@pytest.fixture
async def client(endpoint: Endpoint) -> AsyncIterator[AnthropicModelClient]:
    client = AnthropicModelClient(endpoint)
    yield client
    await client.aclose()
