"""Paths that this server does not serve are as good as unknown. What becomes served leaves this file and docs/requirements."""

import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.anyio


async def missing(server: Stack, call: str) -> None:
    """The path, filled with ids that exist, is unknown with a good key and without any."""
    method, path = call.format(environment=server.environment_id).split()
    assert await server.refused(method, path, status=404) == "not found"
    assert await server.refused(method, path, status=404, headers={}) == "not found"


@pytest.mark.requirement("ENV-951")
@pytest.mark.parametrize(
    "call",
    [
        "GET /v1/environments/{environment}/work",
        "POST /v1/environments/{environment}/work/poll",
    ],
)
async def test_the_work_of_an_environment(server: Stack, call: str) -> None:
    await missing(server, call)


@pytest.mark.requirement("CNV-951")
@pytest.mark.parametrize("noun", ["skills", "vaults", "memory_stores", "deployments", "webhooks", "user_profiles"])
async def test_other_nouns(server: Stack, noun: str) -> None:
    await missing(server, f"GET /v1/{noun}")


@pytest.mark.requirement("CNV-952")
@pytest.mark.parametrize("call", ["POST /v1/messages", "GET /v1/models"])
async def test_the_model_api(server: Stack, call: str) -> None:
    await missing(server, call)
