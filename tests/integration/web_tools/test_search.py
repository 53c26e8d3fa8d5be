"""The search providers over real HTTP: what each is asked, what becomes of its answer, and of its trouble."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest
from pydantic import SecretStr
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from managed_agents.eventlog.events import SpanUsage
from managed_agents.harness.tools import web_search
from managed_agents.harness.tools.guarded_http import GuardedClient
from managed_agents.harness.tools.model_search import INSTRUCTIONS, TOOL, ModelSearch
from managed_agents.harness.tools.web import WebTools
from managed_agents.harness.tools.web_fetch import WebError, WebFetch
from managed_agents.harness.tools.web_search import Brave, SearchProvider, Searxng
from managed_agents.harness.turn import ToolCall
from managed_agents.model.client import AnthropicModelClient
from managed_agents.model.endpoint import Endpoint
from tests.support.server import listening
from tests.support.websites import FOUND, website

pytestmark = pytest.mark.anyio

AGENT: dict[str, Any] = {"model": {"id": "claude-opus-4-8", "inference_geo": "us"}}
NOWHERE: dict[str, Any] = {"allowed_domains": None, "blocked_domains": None, "user_location": None}
BONN = {"type": "approximate", "city": "Bonn", "region": "NRW", "country": "DE", "timezone": "Europe/Berlin"}


class SearchingModel:
    """A Messages endpoint with a search tool of its own: answers every request with `blocks`, or with `status`."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.status = 200
        self.bodies: list[dict[str, Any]] = []

    async def answer(self, request: Request) -> Response:
        self.bodies.append(orjson.loads(await request.body()))
        if self.status != 200:
            error = {"type": "error", "error": {"type": "api_error", "message": "not now"}}
            return Response(orjson.dumps(error), status_code=self.status, media_type="application/json")
        message = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-opus-4-8", "content": []}
        usage = {"input_tokens": 100, "output_tokens": 1}
        events: list[dict[str, Any]] = [{"type": "message_start", "message": {**message, "usage": usage}}]
        for index, block in enumerate(self.blocks):
            quotes: list[dict[str, Any]] = block.get("citations") or []
            started = {**block, "citations": []} if quotes else block
            events.append({"type": "content_block_start", "index": index, "content_block": started})
            events += [
                {"type": "content_block_delta", "index": index, "delta": {"type": "citations_delta", "citation": quote}}
                for quote in quotes
            ]
            events.append({"type": "content_block_stop", "index": index})
        used = {"input_tokens": 2000, "output_tokens": 50, "server_tool_use": {"web_search_requests": 1}}
        events.append({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": used})
        events.append({"type": "message_stop"})
        body = b"".join(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)) for event in events)
        return Response(body, media_type="text/event-stream")


@asynccontextmanager
async def searching(model: SearchingModel) -> AsyncIterator[ModelSearch]:
    """The provider on a listening endpoint."""
    async with listening(Starlette(routes=[Route("/v1/messages", model.answer, methods=["POST"])])) as url:
        client = AnthropicModelClient(Endpoint(url, SecretStr("key"), is_real_api=False, is_loopback=True))
        try:
            yield ModelSearch(client)
        finally:
            await client.aclose()


@pytest.fixture
async def site() -> AsyncIterator[str]:
    async with website() as url:
        yield url


async def search(provider: SearchProvider, query: str = "what is it", **config: Any) -> tuple[list[dict[str, Any]], SpanUsage]:
    return await web_search.run(provider, {"query": query}, {**NOWHERE, **config}, AGENT)


async def refused(provider: SearchProvider, query: str = "what is it", **config: Any) -> str:
    """The code that the model is told."""
    with pytest.raises(WebError) as caught:
        await search(provider, query, **config)
    return str(caught.value).partition(":")[0]


# Brave


async def test_brave_is_asked_with_its_key_near_the_user_and_within_the_domains(site: str) -> None:
    brave = Brave(SecretStr("brave-key"), site)
    blocks, usage = await search(brave, user_location=BONN, blocked_domains=["ads.example.net"])
    assert [block["source"] for block in blocks] == list(FOUND[:2])
    asked = blocks[0]["content"][0]["text"]
    assert asked.startswith("what is it -site:ads.example.net DE ")
    assert "('x-loc-city', 'Bonn')" in asked
    assert "('x-loc-timezone', 'Europe/Berlin')" in asked
    assert usage.web_searches == 1
    assert usage.cost is not None
    assert usage.cost > 0


async def test_brave_s_trouble_has_a_code(site: str) -> None:
    assert await refused(Brave(SecretStr("wrong"), site)) == "unavailable"
    assert await refused(Brave(SecretStr("brave-key"), f"{site}/status/429?")) == "too_many_requests"
    assert await refused(Brave(SecretStr("brave-key"), "http://127.0.0.1:9")) == "unavailable"
    assert await refused(Brave(SecretStr("brave-key"), f"{site}/endless?")) == "unavailable"


# SearXNG


async def test_searxng_is_asked_for_json_and_odd_results_are_left_out(site: str) -> None:
    blocks, usage = await search(Searxng(site), allowed_domains=["example.org"])
    assert [block["source"] for block in blocks] == [FOUND[1]]
    assert usage.web_searches == 1
    assert (await search(Searxng(site), "nothing"))[0] == [{"type": "text", "text": "No results found."}]
    assert await refused(Searxng(site), "busy") == "too_many_requests"
    assert await refused(Searxng(site), "broken") == "unavailable"
    assert await refused(Searxng(site), user_location=BONN) == "unavailable"


# The Messages API


def found(url: str, title: str | None) -> dict[str, Any]:
    return {"type": "web_search_result", "url": url, "title": title, "encrypted_content": "x", "page_age": "May 2026"}


def quoting(url: str, *passages: str) -> dict[str, Any]:
    quotes = [
        {"type": "web_search_result_location", "url": url, "title": "t", "encrypted_index": "i", "cited_text": passage}
        for passage in passages
    ]
    return {"type": "text", "text": "said", "citations": quotes}


@pytest.mark.requirement("WEB-902")
async def test_the_model_s_endpoint_searches_once_and_what_it_quotes_are_the_excerpts() -> None:
    model = SearchingModel()
    model.blocks = [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
        {
            "type": "web_search_tool_result",
            "tool_use_id": "srvtoolu_1",
            "content": [found(FOUND[0], "A"), found(FOUND[1], None), found(FOUND[2], "Ads")],
        },
        quoting(FOUND[0], "one", "two", "one"),
    ]
    async with searching(model) as provider:
        blocks, usage = await search(provider, blocked_domains=["ads.example.net"], user_location=BONN)
    (body,) = model.bodies
    tool = {"type": TOOL, "name": "web_search", "max_uses": 1, "blocked_domains": ["ads.example.net"], "user_location": BONN}
    assert (body["tools"], body["system"], body["inference_geo"]) == ([tool], INSTRUCTIONS, "us")
    assert body["messages"] == [{"role": "user", "content": "what is it"}]
    assert [(block["source"], block["title"]) for block in blocks] == [(FOUND[0], "A"), (FOUND[1], FOUND[1])]
    assert [block["content"][0]["text"] for block in blocks] == ["one\ntwo", "May 2026"]
    # Its tokens count with the call, and so does the search.
    assert (usage.input_tokens, usage.output_tokens, usage.web_searches) == (2000, 50, 1)
    assert usage.cost is not None
    assert web_search.ONE_SEARCH.cost is not None
    assert usage.cost > web_search.ONE_SEARCH.cost


@pytest.mark.requirement("WEB-113")
async def test_odd_blocks_of_an_endpoint_are_left_out() -> None:
    model = SearchingModel()
    odd = [{"type": "web_search_result", "title": "no url"}, {"url": None}, {"url": 5}, "text", None]
    model.blocks = [
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1"},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": None},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [*odd, {"url": FOUND[0], "title": 7}]},
        {"type": "text", "text": "said", "citations": [None, {"url": None, "cited_text": 1}, {"url": FOUND[0]}, "x"]},
    ]
    async with searching(model) as provider:
        blocks, _ = await search(provider)
    assert [(block["source"], block["title"]) for block in blocks] == [(FOUND[0], FOUND[0])]


@pytest.mark.parametrize(
    ("told", "code"),
    [("max_uses_exceeded", "max_uses_exceeded"), ("query_too_long", "query_too_long"), ("something new", "unavailable")],
)
async def test_trouble_of_the_endpoint_s_search_has_a_code(told: str, code: str) -> None:
    model = SearchingModel()
    error = {"type": "web_search_tool_result_error", "error_code": told}
    model.blocks = [{"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": error}]
    async with searching(model) as provider:
        assert await refused(provider) == code
        # What it has used all the same is part of the call's result.
        call = ToolCall("sevt_1", "web_search", {"query": "what is it"})
        outcome, usage = await WebTools(WebFetch(GuardedClient()), provider).run(call, NOWHERE, AGENT, nothing_seen, below_cap)
    assert outcome.is_error
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.web_searches) == (2000, 50, 1)


async def below_cap() -> bool:
    return False


async def nothing_seen(_sources: object) -> set[str]:
    return set()


@pytest.mark.parametrize(("status", "code"), [(429, "too_many_requests"), (529, "unavailable"), (400, "unavailable")])
async def test_an_endpoint_that_refuses_is_told_to_the_model(status: int, code: str) -> None:
    model = SearchingModel()
    model.status = status
    async with searching(model) as provider:
        assert await refused(provider) == code
    assert len(model.bodies) == 1, "it is the model's to try again"
