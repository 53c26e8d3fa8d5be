"""Lists that are walked while others add to them: what was there at the start is seen once, nothing is seen twice."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from managed_agents.scripted_model import tool_use
from tests.support.stack import TOOLSET, Gate, Stack, message

pytestmark = pytest.mark.anyio


async def walked(server: Stack, path: str, between: Callable[[], Awaitable[Any]]) -> list[str]:
    """Every id of a list, page by page; `between` adds something before each further page."""
    seen: list[str] = []
    cursor = ""
    while True:
        answer = await server.raw("GET", path + cursor)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        seen += [each["id"] for each in body["data"]]
        if body.get("next_page") is None:
            return seen
        cursor = f"&page={body['next_page']}"
        async with anyio.create_task_group() as group:
            for _ in range(2):
                group.start_soon(between)


@pytest.mark.requirement("CNV-082")
async def test_newest_first(server: Stack) -> None:
    agents = [(await server.agent()).id for _ in range(5)]
    seen = await walked(server, "/v1/agents?limit=2", server.agent)
    assert len(set(seen)) == len(seen)
    assert [each for each in seen if each in agents] == agents[::-1]

    create = server.client.beta.environments.create
    names = iter(range(1000))

    async def environment() -> Any:
        return await create(name=f"walked {next(names)}")

    environments = [(await environment()).id for _ in range(5)]
    seen = await walked(server, "/v1/environments?limit=2", environment)
    assert len(set(seen)) == len(seen)
    assert [each for each in seen if each in environments] == environments[::-1]


@pytest.mark.requirement("CNV-082")
@pytest.mark.parametrize("order", ["desc", "asc"])
async def test_sessions(server: Stack, order: str) -> None:
    agent = await server.agent()

    async def session() -> Any:
        return await server.client.beta.sessions.create(agent=agent.id, environment_id=server.environment_id)

    made = [(await session()).id for _ in range(5)]
    more = 4

    async def sometimes() -> None:
        nonlocal more
        more -= 1
        if more >= 0:  # oldest first, the list would grow for ever
            await session()

    seen = await walked(server, f"/v1/sessions?limit=2&order={order}&agent_id={agent.id}", sometimes)
    assert len(set(seen)) == len(seen)
    assert [each for each in seen if each in made] == (made if order == "asc" else made[::-1])


@pytest.mark.requirement("CNV-082")
async def test_versions_newest_first(server: Stack) -> None:
    agent = await server.agent()
    numbers = iter(range(1000))

    async def change() -> None:
        await server.client.beta.agents.update(agent.id, description=str(next(numbers)))

    for _ in range(4):
        await change()
    path, cursor, seen = f"/v1/agents/{agent.id}/versions?limit=2", "", list[int]()
    while True:
        body = (await server.raw("GET", path + cursor)).json()
        seen += [each["version"] for each in body["data"]]
        if body.get("next_page") is None:
            break
        cursor = f"&page={body['next_page']}"
        await change()
    assert seen == [5, 4, 3, 2, 1]


@pytest.mark.requirement("CNV-082")
@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_what_waits_is_on_one_page_also_when_it_is_taken_up(server: Stack, held: Gate, order: str) -> None:
    session = await server.session([[tool_use("bash", command=held.command)], "done"], tools=TOOLSET)
    path = f"/v1/sessions/{session.id}/events?order={order}"
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        sent = await server.client.beta.sessions.events.send(session.id, events=[message(str(n)) for n in range(4)])
        waiting = [event.id for event in sent.data]
        before = [event["id"] for event in (await server.raw("GET", path)).json()["data"]]
        limit = 2 if order == "desc" else len(before) - 2  # a page that ends among those that wait
        first = (await server.raw("GET", f"{path}&limit={limit}")).json()
        held.open()
        await watch.idle()
    seen = [event["id"] for event in first["data"]]
    cursor = first["next_page"]
    assert len(set(waiting) - set(seen)) == 2
    while cursor is not None:
        body = (await server.raw("GET", f"{path}&limit=3&page={cursor}")).json()
        seen += [event["id"] for event in body["data"]]
        cursor = body["next_page"]
    assert len(set(seen)) == len(seen)
    assert set(before) <= set(seen)
    assert [event.id for event in await server.history(session)] == list(dict.fromkeys(e.id for e in watch.logged))
