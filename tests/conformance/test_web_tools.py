"""The web tools in sessions: their events, settings, costs, and what is kept of large pages."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import orjson
import pytest
from anthropic import BadRequestError
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from managed_agents.harness.tools.model_search import TOOL
from managed_agents.scripted_model import text, tool_use
from tests.integration.web_tools.test_search import SearchingModel
from tests.support.server import listening
from tests.support.stack import TOOLSET, Stack, Variant, stack
from tests.support.watch import Watch
from tests.support.websites import website

pytestmark = pytest.mark.anyio

REFERENCE = {"type": "tool_reference", "name": "x"}
SOURCES = ("user_input", "client_tool_results", "server_tool_results")
ADDRESS = 'allowed_domains.0: IP addresses are not supported; provide a plain hostname like "example.com"'


@pytest.fixture(scope="module")
async def site(server: Stack) -> AsyncIterator[str]:
    # After `server`, which lives longer: what is opened later has to be closed earlier.
    async with website() as url:
        yield url


@pytest.fixture(scope="module")
async def web(server: Stack, postgres_url: str, template: str, site: str) -> AsyncIterator[Stack]:
    variant = Variant(settings={"web_search": f"searxng+{site}", "web_allowed_networks": "127.0.0.0/8"})
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


def with_web(**settings: Any) -> list[dict[str, Any]]:
    return [{**TOOLSET[0], "configs": [settings]}]


def results(watch: Watch) -> list[Any]:
    return [event for event in watch.logged if event.type == "agent.tool_result"]


@pytest.mark.requirement("WEB-101")
async def test_a_page_is_fetched_and_read_by_the_model(web: Stack, site: str) -> None:
    replies = [[tool_use("web_fetch", url=f"{site}/page/html"), tool_use("web_fetch", url=f"{site}/page/pdf")], "read"]
    session = await web.session(replies, tools=TOOLSET)
    watch = await web.turn(session)
    uses = [event for event in watch.logged if event.type == "agent.tool_use"]
    assert [(use.name, use.evaluated_permission) for use in uses] == [("web_fetch", "allow")] * 2
    by_use = {result.tool_use_id: result for result in results(watch)}
    assert "# Heading" in by_use[uses[0].id].content[0].text
    assert by_use[uses[1].id].content[0].type == "document"
    assert not any(result.is_error for result in by_use.values())
    assert watch.logged[-1].stop_reason.type == "end_turn"
    usage = (await web.client.beta.sessions.retrieve(session.id)).usage
    assert usage.server_tool_use is not None
    assert (usage.server_tool_use.web_fetch_requests, usage.server_tool_use.web_search_requests) == (0, 0)
    assert {"web_fetch", "web_search"} <= set(web.requests(session)[0].tools)


@pytest.mark.requirement("SES-170")
async def test_a_search_with_the_model_is_not_made_beyond_the_budget(server: Stack, postgres_url: str, template: str) -> None:
    async with stack(postgres_url, template, variant=Variant(settings={"web_search": "messages-api"})) as searching:
        replies = [[text("word " * 2000), tool_use("web_search", query="what is it")], "never"]
        budget = {"type": "limit", "max_list_cost": {"amount": "5", "currency": "USD"}}
        session = await searching.session(replies, tools=TOOLSET, budget=budget)
        before = searching.recorder.total
        watch = await searching.turn(session)
        (result,) = results(watch)
        assert (result.is_error, result.content[0].text) == (True, "unavailable: the session's budget is used up")
        assert watch.logged[-1].stop_reason.type == "budget_reached"
        assert searching.recorder.total == before + 1


@asynccontextmanager
async def searching_before(base_url: str) -> AsyncIterator[str]:
    """The endpoint with a web search of its own: the scripted model has none."""
    search = SearchingModel()
    another = anyio.Event()
    begun = 0

    async def answer(request: HttpRequest) -> Response:
        nonlocal begun
        body = await request.body()
        if any(tool.get("type") == TOOL for tool in orjson.loads(body or b"{}").get("tools") or []):
            begun += 1
            if begun > 1:
                another.set()
            with anyio.move_on_after(0.5):  # for one that should not come
                await another.wait()
            return await search.answer(request)
        async with httpx.AsyncClient(base_url=base_url, timeout=30.0) as client:
            headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
            passed = await client.request(request.method, request.url.path, content=body, headers=headers)
        return Response(passed.content, passed.status_code, media_type=passed.headers["content-type"])

    async with listening(Starlette(routes=[Route("/{path:path}", answer, methods=["GET", "POST"])])) as url:
        yield url


@pytest.mark.requirement("SES-170")
async def test_searches_with_the_model_side_by_side_begin_only_on_what_those_before_left(
    server: Stack, postgres_url: str, template: str
) -> None:
    variant = Variant(settings={"web_search": "messages-api"}, before_model=searching_before)
    async with stack(postgres_url, template, variant=variant) as searching:
        replies = [[tool_use("web_search", query=query) for query in ("one", "two", "three")], "never"]
        budget = {"type": "limit", "max_list_cost": {"amount": "2", "currency": "USD"}}  # which is what a search costs
        session = await searching.session(replies, tools=TOOLSET, budget=budget)
        watch = await searching.turn(session)
        refused = "unavailable: the session's budget is used up"
        said = {result.tool_use_id: result.content for result in results(watch)}
        uses = [event.id for event in watch.logged if event.type == "agent.tool_use"]
        assert [said[use][0].type == "text" and said[use][0].text == refused for use in uses] == [False, True, True]
        assert watch.logged[-1].stop_reason.type == "budget_reached"


@pytest.mark.requirement("WEB-107")
async def test_a_search_gives_results_and_is_counted(web: Stack) -> None:
    toolset = with_web(name="web_search", blocked_domains=["ads.example.net"])
    session = await web.session([[tool_use("web_search", query="what is it")], "found"], tools=toolset)
    watch = await web.turn(session)
    (result,) = results(watch)
    assert [block.source for block in result.content] == ["https://docs.example.com/a", "https://example.org/b"]
    assert {block.type for block in result.content} == {"search_result"}
    assert result.content[0].content[0].text == "Excerpt of https://docs.example.com/a"
    session = await web.client.beta.sessions.retrieve(session.id)
    assert session.usage.server_tool_use.web_search_requests == 1
    assert int(session.usage.list_cost.amount) >= 1  # one search is one cent
    (thread,) = [thread async for thread in web.client.beta.sessions.threads.list(session.id)]
    assert thread.usage.server_tool_use.web_search_requests == 1
    shown = web.requests(session)[-1].tool_results[0]
    assert "https://example.org/b" in str(shown)


@pytest.mark.requirement("WEB-108")
async def test_a_large_page_is_a_preview_and_a_file(web: Stack, site: str) -> None:
    url = f"{site}/page/long"
    look = "cat /mnt/session/tool_outputs/web_fetch-*.txt | wc -c"
    replies = [[tool_use("web_fetch", url=url)], [tool_use("bash", command=look)], "seen"]
    session = await web.session(replies, tools=TOOLSET)
    watch = await web.turn(session)
    page, count = results(watch)
    assert len(page.content[0].text) < 70_000
    assert "/mnt/session/tool_outputs/web_fetch-" in page.content[0].text
    assert int(count.content[0].text) > 250_000


async def test_without_sandbox_tools_nothing_is_kept(web: Stack, site: str) -> None:
    toolset = [{**TOOLSET[0], "default_config": {"enabled": False}, "configs": [{"name": "web_fetch", "enabled": True}]}]
    session = await web.session([[tool_use("web_fetch", url=f"{site}/page/long")], "seen"], tools=toolset)
    watch = await web.turn(session)
    assert "could not be kept" in results(watch)[0].content[0].text
    assert list(web.requests(session)[0].tools) == ["web_fetch"]
    assert "container" not in web.requests(session)[0].system


@pytest.mark.requirement("WEB-109")
async def test_url_sources_limit_fetches_to_the_conversation(web: Stack, site: str) -> None:
    toolset = with_web(name="web_fetch", url_sources={"user_input": "all", "server_tool_results": "none"})
    replies = [
        [tool_use("web_fetch", url=f"{site}/page/text"), tool_use("web_fetch", url=f"{site}/page/html")],
        "one of two",
    ]
    session = await web.session(replies, tools=toolset)
    config = session.agent.tools[0].configs[0]
    assert config.to_dict()["url_sources"] == {
        "user_input": {"type": "all"},
        "client_tool_results": None,
        "server_tool_results": {"type": "none"},
    }
    watch = await web.turn(session, f"Please read {site}/page/text.")
    by_error = {result.is_error: result.content[0].text for result in results(watch)}
    assert "plain words" in by_error[False]
    assert by_error[True].startswith("url_not_in_prior_context")


async def test_trouble_is_an_error_result(web: Stack, site: str) -> None:
    toolset = with_web(name="web_fetch", allowed_domains=["example.com"])
    calls = [tool_use("web_fetch", url=f"{site}/page/text"), tool_use("web_search", query="busy"), tool_use("web_search")]
    session = await web.session([calls, "sorry"], tools=toolset)
    watch = await web.turn(session)
    said = sorted(result.content[0].text.partition(":")[0] for result in results(watch))
    assert said == ["invalid_tool_input", "too_many_requests", "url_not_allowed"]
    assert all(result.is_error for result in results(watch))
    usage = (await web.client.beta.sessions.retrieve(session.id)).usage
    assert usage.server_tool_use.web_search_requests == 0


async def test_a_search_may_have_to_be_confirmed(web: Stack) -> None:
    toolset = with_web(name="web_search", permission_policy={"type": "always_ask"})
    session = await web.session([[tool_use("web_search", query="may I")], "thanks"], tools=toolset)
    async with web.watching(session) as watch:
        await web.say(session, "go")
        idle = await watch.idle()
        (waiting,) = idle.stop_reason.event_ids
        confirmation = {"type": "user.tool_confirmation", "tool_use_id": waiting, "result": "allow"}
        await web.client.beta.sessions.events.send(session.id, events=[confirmation])
        await watch.idle(2)
    assert results(watch)[0].content[0].type == "search_result"


@pytest.mark.requirement("WEB-110", "WEB-901")
async def test_without_a_provider_search_is_refused(server: Stack) -> None:
    session = await server.session([[text("Searching"), tool_use("web_search", query="x")], "cannot"], tools=TOOLSET)
    watch = await server.turn(session)
    assert "web_search" not in server.requests(session)[0].tools
    (result,) = results(watch)
    assert result.is_error
    assert "MANAGED_AGENTS_WEB_SEARCH" in result.content[0].text
    body = {"name": "a", "model": "claude-opus-5", "tools": with_web(name="web_search")}
    assert "MANAGED_AGENTS_WEB_SEARCH" in await server.refused("POST", "/v1/agents", json=body)
    body["tools"] = with_web(name="web_search", enabled=False)
    assert (await server.raw("POST", "/v1/agents", json=body)).status_code == 200


async def test_inside_addresses_are_refused_by_default(server: Stack) -> None:
    session = await server.session([[tool_use("web_fetch", url=server.base_url)], "no"], tools=TOOLSET)
    watch = await server.turn(session)
    assert results(watch)[0].content[0].text.startswith("url_not_allowed")


@pytest.mark.requirement("WEB-106")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"allowed_domains": ["a.com"], "blocked_domains": ["b.com"]}, "Only one of allowed_domains or blocked_domains may be"),
        ({"allowed_domains": []}, "allowed_domains: Empty list of domains is ambiguous. Provide at least one domain or null."),
        ({"allowed_domains": ["1.2.3.4"]}, ADDRESS),
        ({"allowed_domains": ["0x7f.1"]}, "IP addresses"),
        ({"allowed_domains": ["[::1]"]}, "IP addresses"),
        ({"allowed_domains": ["com"]}, "registry suffix"),
        ({"allowed_domains": ["co.uk"]}, "registry suffix"),
        ({"allowed_domains": ["https://a.com"]}, "paths are not supported"),
        ({"allowed_domains": ["a.com:80"]}, "plain hostname"),
        ({"allowed_domains": ["*.a.com"]}, "plain hostname"),
        ({"allowed_domains": ["-a.com"]}, "plain hostname"),
        ({"allowed_domains": ["a.com/x"]}, "paths are not supported"),
        ({"allowed_domains": ["bücher.de"]}, "xn--"),
        ({"allowed_domains": ["host.internal"]}, "local names"),
        ({"allowed_domains": ["localhost"]}, "local names"),
        ({"allowed_domains": ["a.com", "A.com/"]}, "duplicate"),
        ({"allowed_domains": ["a.com"] * 65}, "at most 64"),
        ({"allowed_domains": [""]}, "characters"),
        ({"max_content_tokens": 0}, "max_content_tokens"),
        ({"url_sources": dict.fromkeys(SOURCES, "none")}, "at least one source"),
        ({"url_sources": {"server_tool_results": {"type": "only", "tools": []}}}, "tools"),
        ({"url_sources": {"client_tool_results": {"type": "only", "tools": [REFERENCE]}}}, "no such tool"),
        ({"user_location": {"type": "approximate"}}, "user_location"),
    ],
)  # fmt: skip
async def test_settings_are_checked(web: Stack, settings: dict[str, Any], said: str) -> None:
    body = {"name": "a", "model": "claude-opus-5", "tools": with_web(name="web_fetch", **settings)}
    message = await web.refused("POST", "/v1/agents", json=body)
    assert message.startswith("tools.0.configs.0")
    assert said in message


async def test_search_settings_are_checked_and_echoed(web: Stack) -> None:
    body: dict[str, Any] = {"name": "a", "model": "claude-opus-5"}
    for location, said in (
        ({"country": "XX"}, "user_location.country: not a country the search provider supports"),
        ({"country": "us"}, "user_location.country: not a country the search provider supports"),
        ({"timezone": "Mars/Base"}, "timezone"),
        ({"city": ""}, "city"),
    ):
        body["tools"] = with_web(name="web_search", user_location={"type": "approximate", **location})
        assert said in await web.refused("POST", "/v1/agents", json=body)
    location = {"type": "approximate", "city": "Bern", "region": None, "country": "CH", "timezone": "Europe/Zurich"}
    wanted = {"name": "web_search", "allowed_domains": ["example.com/docs"], "user_location": location}
    agent = await web.client.beta.agents.create(name="a", model="claude-opus-5", tools=with_web(**wanted))
    echoed = agent.tools[0].configs[0].to_dict()
    assert echoed["user_location"] == location
    assert echoed["allowed_domains"] == ["example.com/docs"]


def limited(*hosts: str) -> Any:
    return {"type": "cloud", "networking": {"type": "limited", "allowed_hosts": list(hosts)}}


@pytest.mark.requirement("WEB-111")
async def test_a_limited_environment_bounds_the_web_tools(web: Stack, site: str) -> None:
    hosts = ("docs.example.com", "*.example.net")
    environment = await web.client.beta.environments.create(name="bounded", config=limited(*hosts))
    calls = [tool_use("web_fetch", url=f"{site}/page/html"), tool_use("web_search", query="what is it")]
    agent = await web.agent([calls, "told"], tools=TOOLSET)
    session = await web.client.beta.sessions.create(agent=agent.id, environment_id=environment.id)
    # What it began with counts, whatever becomes of the environment.
    await web.client.beta.environments.update(environment.id, config={"type": "cloud", "networking": {"type": "unrestricted"}})
    watch = await web.turn(session)
    uses = {event.id: event.name for event in watch.logged if event.type == "agent.tool_use"}
    by_name = {uses[result.tool_use_id]: result for result in results(watch)}
    assert by_name["web_fetch"].is_error
    assert by_name["web_fetch"].content[0].text.startswith("url_not_allowed: ")
    assert [block.source for block in by_name["web_search"].content] == [
        "https://docs.example.com/a",
        "https://ads.example.net/c",
    ]


@pytest.mark.requirement("WEB-112")
async def test_domains_outside_a_limited_environment_are_refused(web: Stack) -> None:
    environment = await web.client.beta.environments.create(name="refusing", config=limited("docs.example.com", "*.example.net"))

    def tools(*domains: str) -> list[dict[str, Any]]:
        return with_web(name="web_fetch", allowed_domains=list(domains))

    async def create(*domains: str) -> Any:
        agent = await web.agent(["ok"], tools=tools(*domains))
        return await web.client.beta.sessions.create(agent=agent.id, environment_id=environment.id)

    # The host itself, what contains it, and what lies below a wildcard.
    session = await create("docs.example.com", "example.com", "a.example.net", "example.net")
    place = "agent.tools.0.configs.0.allowed_domains"
    with pytest.raises(BadRequestError, match=rf"{place}.1: example.org is outside allowed_hosts") as refused:
        await create("docs.example.com", "example.org")
    assert refused.value.status_code == 400
    with pytest.raises(BadRequestError, match=rf"{place}.0: www.example.com is outside allowed_hosts"):
        await web.client.beta.sessions.update(session.id, agent={"tools": tools("www.example.com")})
    kept = (await web.client.beta.sessions.retrieve(session.id)).agent.tools[0].configs[0].allowed_domains
    assert kept[0] == "docs.example.com"
