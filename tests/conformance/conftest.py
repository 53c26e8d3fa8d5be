"""One running server for all modules, driven by the official SDK with strict validation; each test makes its own agent."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.stack import Gate, Stack, gate, stack


@pytest.fixture(scope="package")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(scope="package")
async def server(anyio_backend: object, postgres_url: str, template: str) -> AsyncIterator[Stack]:
    async with stack(postgres_url, template) as running:
        yield running
        wrong: Exception | None = None
        try:
            await running.check_logs()
        except (AssertionError, TimeoutError) as error:
            wrong = error
    # Only now: an error thrown into the running server would keep it from stopping in order.
    if wrong is not None:
        raise wrong


@pytest.fixture
def held() -> Iterator[Gate]:
    with gate() as made:
        yield made
