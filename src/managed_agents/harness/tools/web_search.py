"""`web_search`: the seam to search engines, and the two that answer by themselves.

Which one is used is the operator's setting; the model sees one tool. The Messages API's own search is the third provider
(`model_search.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import anyio
import httpx
import orjson
from pydantic import SecretStr

from managed_agents.eventlog.events import SpanUsage
from managed_agents.harness.tools import domains
from managed_agents.harness.tools.web_fetch import WebError
from managed_agents.model.prices import web_search_cost

Json = dict[str, Any]

QUERY_CHARS_MAX = 400
SEARCH_SECONDS_MAX = 30.0
ANSWER_BYTES_MAX = 4 * 1024 * 1024
RESULTS_MAX = 10
EXCERPT_CHARS_MAX = 2_000
TITLE_CHARS_MAX = 300
SITES_MAX = 8  # domains that are put into the query itself; all of them are checked in the results


@dataclass(frozen=True, slots=True)
class Found:
    """One result."""

    url: str
    title: str
    excerpt: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What a provider found, and what finding it cost."""

    results: Sequence[Found]
    usage: SpanUsage


class SearchProvider(Protocol):
    """Something that can search the web."""

    # Searching is a model request, which a session at its budget may not make.
    asks_model: ClassVar[bool]

    async def search(self, query: str, config: Json, agent: Mapping[str, Any]) -> Answer:
        """Search, within the domain lists and near the location of `config`. `agent` is who asks.

        Raises WebError.
        """
        ...


ONE_SEARCH = SpanUsage(web_searches=1, cost=web_search_cost(1))


async def run(provider: SearchProvider, arguments: Json, config: Json, agent: Mapping[str, Any]) -> tuple[list[Json], SpanUsage]:
    """Search; returns content blocks and what it cost.

    Raises WebError.
    """
    query = arguments.get("query")
    if not isinstance(query, str) or not query.strip():
        raise WebError("invalid_tool_input", "query is required and must be a string")
    query = " ".join(query.split())
    if len(query) > QUERY_CHARS_MAX:
        raise WebError("query_too_long", f"at most {QUERY_CHARS_MAX} characters")
    answer = await provider.search(query, config, agent)
    kept = [found for found in answer.results if domains.permitted(found.url, config)][:RESULTS_MAX]
    blocks = [_block(found) for found in kept]
    return blocks or [{"type": "text", "text": "No results found."}], answer.usage


def _block(found: Found) -> Json:
    # spec: beta_managed_agents_search_result_block.py, all four fields are required
    title = found.title.strip()[:TITLE_CHARS_MAX] or found.url
    excerpt = found.excerpt.strip()[:EXCERPT_CHARS_MAX] or title
    return {
        "type": "search_result",
        "source": found.url,
        "title": title,
        "content": [{"type": "text", "text": excerpt}],
        "citations": {"enabled": False},
    }


def _with_sites(query: str, config: Json) -> str:
    """`query` with the first domains of the lists, so that engines look there; the results are checked against all of them."""
    if allowed := config.get("allowed_domains"):
        return f"{query} ({' OR '.join(f'site:{domain}' for domain in allowed[:SITES_MAX])})"
    return " ".join([query, *(f"-site:{domain}" for domain in (config.get("blocked_domains") or ())[:SITES_MAX])])


async def _get(url: str, parameters: Mapping[str, str], headers: Mapping[str, str]) -> Json:
    """Ask a search engine that the operator has chosen; bounded. Raises WebError."""
    try:
        with anyio.fail_after(SEARCH_SECONDS_MAX):
            async with (
                httpx.AsyncClient(follow_redirects=False, timeout=SEARCH_SECONDS_MAX) as client,
                client.stream("GET", url, params=dict(parameters), headers=dict(headers)) as answer,
            ):
                body = bytearray()
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > ANSWER_BYTES_MAX:
                        raise WebError("unavailable", "the search engine's answer is too large")
    except (httpx.HTTPError, TimeoutError) as error:
        raise WebError("unavailable", "the search engine does not answer") from error
    if answer.status_code == 429:
        raise WebError("too_many_requests", "the search engine answered 429")
    if answer.status_code != 200:
        raise WebError("unavailable", f"the search engine answered {answer.status_code}")
    try:
        return _object(orjson.loads(body))
    except orjson.JSONDecodeError as error:
        raise WebError("unavailable", "the search engine answered something that is not JSON") from error


def _object(value: object) -> Json:
    return cast(Json, value) if isinstance(value, dict) else {}


def _results(items: object, excerpt: str) -> list[Found]:
    """Results as engines list them; what has no usable address is left out."""
    listed = cast("list[object]", items) if isinstance(items, list) else []
    fields = [{key: value for key, value in _object(item).items() if isinstance(value, str)} for item in listed]
    return [
        Found(found["url"], found.get("title", ""), found.get(excerpt, ""))
        for found in fields
        if found.get("url", "").startswith(("http://", "https://"))
    ]


@dataclass(frozen=True, slots=True)
class Searxng:
    """A SearXNG instance whose JSON format is switched on."""

    asks_model: ClassVar[bool] = False
    base_url: str

    async def search(self, query: str, config: Json, agent: Mapping[str, Any]) -> Answer:
        if config.get("user_location") is not None:
            raise WebError("unavailable", "user_location is set, and the search engine of this server knows no locations")
        parameters = {"q": _with_sites(query, config), "format": "json", "safesearch": "1"}
        answer = await _get(f"{self.base_url}/search", parameters, {"accept": "application/json"})
        return Answer(_results(answer.get("results"), "content"), ONE_SEARCH)


@dataclass(frozen=True, slots=True)
class Brave:
    """Brave's search API."""

    asks_model: ClassVar[bool] = False
    key: SecretStr
    base_url: str = "https://api.search.brave.com"

    async def search(self, query: str, config: Json, agent: Mapping[str, Any]) -> Answer:
        headers = {"accept": "application/json", "x-subscription-token": self.key.get_secret_value()}
        parameters = {"q": _with_sites(query, config), "count": "20", "text_decorations": "false"}
        location: Json = config.get("user_location") or {}
        if country := location.get("country"):
            parameters["country"] = country
        for field, header in (("city", "x-loc-city"), ("region", "x-loc-state-name"), ("country", "x-loc-country"),
                              ("timezone", "x-loc-timezone")):  # fmt: skip
            if value := location.get(field):
                headers[header] = value.encode("ascii", "replace").decode()
        answer = await _get(f"{self.base_url}/res/v1/web/search", parameters, headers)
        return Answer(_results(_object(answer.get("web")).get("results"), "description"), ONE_SEARCH)
