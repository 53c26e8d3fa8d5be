"""One server for the recordings, with a small context."""

from collections.abc import AsyncIterator

import pytest

from tests.support.stack import Stack, Variant, stack

CONTEXT_TOKENS = 5_000


@pytest.fixture(scope="package")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(scope="package")
async def server(anyio_backend: object, postgres_url: str, template: str) -> AsyncIterator[Stack]:
    async with stack(postgres_url, template, variant=Variant(context_tokens=CONTEXT_TOKENS)) as running:
        yield running
