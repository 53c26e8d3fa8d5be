"""One running server whose model has a small context, a short patience, and someone who meddles before it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from managed_agents.core import limits
from managed_agents.model.client import Deadlines
from tests.integration.harness.failing import Bugs, FailingHarness
from tests.integration.harness.tiny import TinyHarness
from tests.support.meddling import Meddler
from tests.support.stack import Stack, Variant, stack

CONTEXT_TOKENS = 16_000
STALL_SECONDS = 2.0  # generous: the machine may be loaded


@pytest.fixture(scope="package")
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return ("asyncio", {"use_uvloop": True})


@pytest.fixture(scope="package")
def impatient() -> Iterator[None]:
    """Retries come soon."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MODEL_BACKOFF_FIRST_SECONDS", 0.05)
        patch.setattr(limits, "CRASH_DELAY_FIRST_SECONDS", 0.01)
        patch.setattr(limits, "POLL_SECONDS", 0.1)
        yield


@pytest.fixture(scope="package")
def meddler() -> Meddler:
    return Meddler()


@pytest.fixture(scope="package")
def bugs() -> Bugs:
    return Bugs()


@pytest.fixture(scope="package")
async def server(
    anyio_backend: object, impatient: None, meddler: Meddler, bugs: Bugs, postgres_url: str, template: str
) -> AsyncIterator[Stack]:
    variant = Variant(
        context_tokens=CONTEXT_TOKENS,
        before_model=meddler.between,
        deadlines=Deadlines(connect_seconds=5.0, stall_seconds=STALL_SECONDS),
        harnesses={"tiny": TinyHarness(), "failing": FailingHarness(bugs)},
    )
    async with stack(postgres_url, template, variant=variant) as running:
        yield running
        wrong: Exception | None = None
        try:
            await running.check_logs()
        except (AssertionError, TimeoutError) as error:
            wrong = error
    # Only now: an error thrown into the running server would keep it from stopping in order.
    if wrong is not None:
        raise wrong
