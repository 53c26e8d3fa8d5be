"""The Messages API's own `web_search` server tool as a provider: a small request beside the turn, for one search.

Beside, and not as a tool of the turn's own request, so that permission policies, domain rules and events are the same for every
provider. What the request uses is accounted with the call's result.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import anyio

from managed_agents.eventlog.events import SpanUsage
from managed_agents.harness.response import usage_of
from managed_agents.harness.tools.web_fetch import WebError
from managed_agents.harness.tools.web_search import Answer, Found
from managed_agents.model import errors
from managed_agents.model.client import ModelClient
from managed_agents.model.events import MessageFinished, ModelRequest
from managed_agents.model.prices import response_cost

Json = dict[str, Any]

TOOL = "web_search_20250305"
OUTPUT_TOKENS_MAX = 4096
SECONDS_MAX = 120.0
INSTRUCTIONS = (
    "Search the web once for the query you are given, with exactly these words. Then quote, with citations, the passages of "
    "each result that answer the query best. Add nothing of your own."
)
_CODES = frozenset({"invalid_tool_input", "max_uses_exceeded", "too_many_requests", "query_too_long", "request_too_large"})


@dataclass(frozen=True, slots=True)
class ModelSearch:
    """Searches with the model's endpoint."""

    asks_model: ClassVar[bool] = True
    client: ModelClient

    async def search(self, query: str, config: Json, agent: Mapping[str, Any]) -> Answer:
        model = agent["model"]
        tool: Json = {"type": TOOL, "name": "web_search", "max_uses": 1}
        tool |= {
            name: config[name] for name in ("allowed_domains", "blocked_domains", "user_location") if config.get(name) is not None
        }
        body: Json = {
            "model": model["id"],
            "max_tokens": OUTPUT_TOKENS_MAX,
            "system": INSTRUCTIONS,
            "messages": [{"role": "user", "content": query}],
            "tools": [tool],
        }
        if (geo := model.get("inference_geo")) is not None:
            body["inference_geo"] = geo
        try:
            with anyio.fail_after(SECONDS_MAX):
                finished = await self._finished(body)
        except errors.RateLimited as error:
            raise WebError("too_many_requests", "the model's endpoint takes no more requests now") from error
        except (errors.ModelError, TimeoutError) as error:
            raise WebError("unavailable", f"the search failed ({str(error) or type(error).__name__})") from error
        cost = response_cost(finished.model, finished.usage, inference_geo=model.get("inference_geo"))
        used = usage_of(finished.usage, cost)
        return Answer(_results(finished.content, used), used)

    async def _finished(self, body: Json) -> MessageFinished:
        async with self.client.stream(ModelRequest(body)) as events:
            async for event in events:
                if isinstance(event, MessageFinished):
                    return event
        raise AssertionError("a response that ends without its last event is an error of the client")


def _results(content: list[Json], used: SpanUsage) -> list[Found]:
    """The results of the search, each with the passages that were quoted from it; what has no address is left out.

    Endpoints behind which other models stand are not strict about these blocks. Raises WebError, with what was `used`: the
    response has to be paid all the same.
    """
    quoted: dict[str, list[str]] = {}
    found: dict[str, Json] = {}
    for block in content:
        if block.get("type") == "web_search_tool_result":
            results = block.get("content")
            if isinstance(results, dict):
                code = str(cast(Json, results).get("error_code"))
                raise WebError(code if code in _CODES else "unavailable", "the provider's search failed", used)
            found |= {url: result for result in _objects(results) if (url := _text(result, "url"))}
        for citation in _objects(block.get("citations")):
            passages = quoted.setdefault(_text(citation, "url"), [])
            if (passage := _text(citation, "cited_text")) and passage not in passages:
                passages.append(passage)
    return [
        Found(url, _text(result, "title"), "\n".join(quoted.get(url, ())) or _text(result, "page_age"))
        for url, result in found.items()
    ]


def _objects(value: object) -> list[Json]:
    listed = cast("list[object]", value) if isinstance(value, list) else []
    return [cast(Json, item) for item in listed if isinstance(item, dict)]


def _text(fields: Json, name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""
