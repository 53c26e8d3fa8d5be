"""Listing sessions: filters, order, cursors in both directions."""

from typing import Any

import pytest

from tests.support.stack import Stack

pytestmark = pytest.mark.anyio

PATH = "/v1/sessions"


async def several(server: Stack, number: int) -> tuple[Any, list[Any]]:
    agent = await server.agent()
    create = server.client.beta.sessions.create
    return agent, [await create(agent=agent.id, environment_id=server.environment_id) for _ in range(number)]


async def page(server: Stack, agent: Any, query: str = "") -> dict[str, Any]:
    answer = await server.raw("GET", f"{PATH}?agent_id={agent.id}&{query}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids(body: dict[str, Any]) -> list[str]:
    return [session["id"] for session in body["data"]]


@pytest.mark.requirement("CNV-039", "OBS-035", "SES-056")
async def test_newest_first_or_oldest_first(server: Stack) -> None:
    agent, made = await several(server, 3)
    list_ = server.client.beta.sessions.list
    assert [s.id async for s in list_(agent_id=agent.id)] == [s.id for s in reversed(made)]
    assert [s.id async for s in list_(agent_id=agent.id, order="asc")] == [s.id for s in made]
    assert [s.id async for s in list_(agent_id=agent.id, limit=1)] == [s.id for s in reversed(made)]
    whole = await page(server, agent)
    assert (whole["next_page"], whole["prev_page"]) == (None, None)
    assert set(whole) == {"data", "next_page", "prev_page"}


@pytest.mark.requirement("CNV-039")
@pytest.mark.parametrize("order", ["desc", "asc"])
async def test_forth_and_back(server: Stack, order: str) -> None:
    agent, made = await several(server, 5)
    expected = [s.id for s in (made if order == "asc" else reversed(made))]
    first = await page(server, agent, f"limit=2&order={order}")
    second = await page(server, agent, f"limit=2&order={order}&page={first['next_page']}")
    third = await page(server, agent, f"limit=2&order={order}&page={second['next_page']}")
    assert [ids(first), ids(second), ids(third)] == [expected[:2], expected[2:4], expected[4:]]
    assert first["prev_page"] is None
    assert third["next_page"] is None
    back = await page(server, agent, f"limit=2&order={order}&page={third['prev_page']}")
    assert ids(back) == expected[2:4]
    start = await page(server, agent, f"limit=2&order={order}&page={back['prev_page']}")
    assert ids(start) == expected[:2]
    assert start["prev_page"] is None
    assert ids(await page(server, agent, f"limit=2&order={order}&page={start['next_page']}")) == expected[2:4]


@pytest.mark.requirement("CNV-039")
@pytest.mark.parametrize("order", ["desc", "asc"])
async def test_an_empty_page_leads_back_to_where_one_came_from(server: Stack, order: str) -> None:
    """What a cursor leads to may be archived meanwhile; the client then has nothing but that page's cursors."""
    agent, made = await several(server, 3)
    first, second, third = (s.id for s in (made if order == "asc" else reversed(made)))
    query = f"limit=1&order={order}"
    start = await page(server, agent, query)
    middle = await page(server, agent, f"{query}&page={start['next_page']}")
    assert (ids(start), ids(middle)) == ([first], [second])
    for gone in (first, third):
        await server.client.beta.sessions.archive(gone)
    before = await page(server, agent, f"{query}&page={middle['prev_page']}")
    assert (ids(before), before["prev_page"]) == ([], None)
    again = await page(server, agent, f"{query}&page={before['next_page']}")
    assert ids(again) == [second]
    # Forwards the same: the page behind the last row leads back to it.
    behind = await page(server, agent, f"{query}&page={middle['next_page']}")
    assert (ids(behind), behind["next_page"]) == ([], None)
    back = await page(server, agent, f"{query}&page={behind['prev_page']}")
    assert (ids(back), back["prev_page"]) == ([second], None)
    assert ids(await page(server, agent, f"{query}&include_archived=true&page={back['next_page']}")) == [third]


@pytest.mark.requirement("CNV-082")
async def test_pages_are_stable_while_sessions_are_made(server: Stack) -> None:
    agent, made = await several(server, 4)
    first = await page(server, agent, "limit=2")
    new = await server.client.beta.sessions.create(agent=agent.id, environment_id=server.environment_id)
    second = await page(server, agent, f"limit=2&page={first['next_page']}")
    assert ids(first) + ids(second) == [s.id for s in reversed(made)]
    # The new one is where it belongs: before the first page, reached backwards.
    assert ids(await page(server, agent, f"limit=2&page={second['prev_page']}")) == ids(first)
    newest = await page(server, agent, "limit=1")
    assert ids(newest) == [new.id]


@pytest.mark.requirement("CNV-044", "SES-057", "SES-902")
async def test_filters(server: Stack) -> None:
    agent, (first, second, third) = await several(server, 3)
    list_ = server.client.beta.sessions.list
    await server.client.beta.sessions.archive(second.id)
    assert [s.id async for s in list_(agent_id=agent.id)] == [third.id, first.id]
    assert [s.id async for s in list_(agent_id=agent.id, include_archived=True)] == [third.id, second.id, first.id]
    assert [s.id async for s in list_(agent_id=agent.id, statuses=["terminated"], include_archived=True)] == [second.id]
    assert [s.id async for s in list_(agent_id=agent.id, statuses=["idle", "running"])] == [third.id, first.id]
    assert [s.id async for s in list_(agent_id=agent.id, statuses=["rescheduling"])] == []
    assert [s.id async for s in list_(agent_id=agent.id, agent_version=1)] == [third.id, first.id]
    assert [s.id async for s in list_(agent_id=agent.id, agent_version=2)] == []
    assert [s.id async for s in list_(agent_id="agent_01unknown")] == []
    # Nothing here was made by a deployment or has a memory store.
    assert [s.id async for s in list_(agent_id=agent.id, deployment_id="depl_01x")] == []
    assert [s.id async for s in list_(agent_id=agent.id, memory_store_id="memstore_01x")] == []
    at = first.created_at
    assert first.id in [s.id async for s in list_(agent_id=agent.id, created_at_lte=at)]
    assert first.id in [s.id async for s in list_(agent_id=agent.id, created_at_gte=at)]
    assert first.id not in [s.id async for s in list_(agent_id=agent.id, created_at_gt=at)]
    assert first.id not in [s.id async for s in list_(agent_id=agent.id, created_at_lt=at)]


@pytest.mark.requirement("CNV-040", "CNV-041", "CNV-042", "OBS-031")
async def test_a_cursor_knows_its_order_and_its_list(server: Stack) -> None:
    agent, made = await several(server, 2)
    cursor = (await page(server, agent, "limit=1"))["next_page"]
    query = f"{PATH}?agent_id={agent.id}&limit=1&page={cursor}"
    assert await server.refused("GET", f"{query}&order=asc") == "page token order does not match request"
    assert "created_at" in await server.refused("GET", f"{query}&created_at[lt]=2020-01-01T00:00:00Z")
    for bad in ("", "x", "page_", "page_!!!", "page_" + "A" * 2000, cursor[:-3], cursor + "AAAA"):
        assert await server.refused("GET", f"{PATH}?page={bad}") == "invalid page cursor", bad
    at = (await server.raw("GET", f"{PATH}/{made[1].id}")).json()["created_at"]
    for bounds, excluded in (
        ({"gt": at}, "gt"),
        ({"lt": at}, "lt"),
        ({"gte": "2020-01-01T00:00:00Z", "gt": at}, "gt"),
        ({"lte": at, "lt": at}, "lt"),
        ({"gte": "2100-01-01T00:00:00Z"}, "gte"),
        ({"lte": "2020-01-01T00:00:00Z"}, "lte"),
        ({"gte": at, "lte": at}, None),
        ({"gt": "2020-01-01T00:00:00Z", "lt": "2100-01-01T00:00:00Z"}, None),
    ):
        asked = "&".join([query, *(f"created_at[{name}]={bound}" for name, bound in bounds.items())])
        if excluded is None:
            assert (await server.raw("GET", asked)).status_code == 200, bounds
        else:
            assert await server.refused("GET", asked) == f"page: cursor position is excluded by created_at[{excluded}]"
    # Another list's cursor.
    assert await server.refused("GET", f"/v1/agents?page={cursor}") == "invalid page cursor"
    assert len(ids(await page(server, agent, f"limit=5&page={cursor}"))) == 1


@pytest.mark.requirement("SES-057")
@pytest.mark.parametrize("path", [PATH, "/v1/agents"])
async def test_the_furthest_instants_are_taken(server: Stack, path: str) -> None:
    await several(server, 1)
    for last in ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999Z"):
        assert (await server.raw("GET", f"{path}?created_at[gte]={last}")).json()["data"] == []
        assert (await server.raw("GET", f"{path}?created_at[lte]={last}")).json()["data"] != []
    assert (await server.raw("GET", f"{path}?created_at[lte]=0001-01-01T00:00:00Z")).json()["data"] == []
    assert (await server.raw("GET", f"{path}?created_at[gte]=0001-01-01T00:00:00Z")).json()["data"] != []


@pytest.mark.requirement("CNV-023", "CNV-038")
@pytest.mark.parametrize(
    ("query", "named"),
    [
        ("limit=0", "limit"),
        ("limit=-1", "limit"),
        ("limit=101", "limit"),
        ("limit=ten", "limit"),
        ("limit=99999999999999999999999", "limit"),
        ("limit=1&limit=2", "limit"),
        ("order=newest", "order"),
        ("statuses[]=busy", "statuses.0"),
        ("include_archived=maybe", "include_archived"),
        ("created_at[gt]=yesterday", "created_at[gt]"),
        ("created_at[gt]=2026-01-01", "created_at[gt]"),
        ("created_at[ge]=2026-01-01T00:00:00Z", "created_at[ge]"),
        ("agent_version=0", "agent_version"),
        ("agent_version=874733777685301", "agent_version"),
        ("after_id=sesn_01x", "after_id"),
        ("agent_id=%00", "agent_id"),
        ("agent_id=%ff", "query"),
    ],
)
async def test_refused_queries_name_the_parameter(server: Stack, query: str, named: str) -> None:
    assert (await server.refused("GET", f"{PATH}?{query}")).startswith(named)


@pytest.mark.requirement("CNV-021")
async def test_limits_of_the_limit(server: Stack) -> None:
    agent, made = await several(server, 2)
    assert ids(await page(server, agent, "limit=100")) == [s.id for s in reversed(made)]
    # Brackets may be encoded or missing, and old clients append `beta`.
    assert len(ids(await page(server, agent, "beta=true&statuses%5B%5D=idle"))) == 2
    assert len(ids(await page(server, agent, "statuses=idle&statuses=running"))) == 2
