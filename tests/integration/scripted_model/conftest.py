"""A scripted model on a loopback port, in this process, whose script each test chooses."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import anyio
import httpx
import pytest
from anthropic import AsyncAnthropic

from managed_agents.scripted_model import Request, Script, load_script, serve

ECHO = load_script(None).reply


@dataclass
class Scripted:
    base_url: str = ""
    reply: Callable[[Request], object] = ECHO
    seen: list[Request] = field(default_factory=list)

    def answer(self, request: Request) -> object:
        self.seen.append(request)
        return self.reply(request)

    async def records(self, count: int, state: str | None = None) -> list[dict]:
        """Wait until `count` requests reached `state`, then return all."""
        async with httpx.AsyncClient(base_url=self.base_url) as http:
            query = {"count": count, "seconds": 5, **({"state": state} if state else {})}
            waited = await http.get("/_scripted/wait", params=query)
            assert waited.status_code == 200, waited.text
            return (await http.get("/_scripted/requests")).json()["data"]


@pytest.fixture(scope="package")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package")
async def _server() -> AsyncIterator[Scripted]:
    scripted = Scripted()
    started = anyio.Event()

    async def on_started(port: int) -> None:
        scripted.base_url = f"http://127.0.0.1:{port}"
        started.set()

    async def run() -> None:
        await serve("127.0.0.1", 0, Script("test", scripted.answer), on_started=on_started)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        with anyio.fail_after(5):
            await started.wait()
        yield scripted
        tasks.cancel_scope.cancel()


@pytest.fixture
async def scripted(_server: Scripted) -> Scripted:
    async with httpx.AsyncClient(base_url=_server.base_url) as http:
        assert (await http.post("/_scripted/reset")).status_code == 200
    _server.reply = ECHO
    _server.seen.clear()
    return _server


@pytest.fixture
async def client(scripted: Scripted) -> AsyncIterator[AsyncAnthropic]:
    async with AsyncAnthropic(
        api_key="test", base_url=scripted.base_url, max_retries=0, _strict_response_validation=True
    ) as client:
        yield client
