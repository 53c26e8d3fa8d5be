"""Which URLs a conversation has shown the model, by where they came from: what `url_sources` limits `web_fetch` to. Pure."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from managed_agents.eventlog.events import StoredEvent

Json = dict[str, Any]

TYPES = (
    "user.message",
    "user.custom_tool_result",
    "agent.custom_tool_use",
    "agent.tool_use",
    "agent.tool_result",
)
"""Events that `seen` has to be given."""
SERVER_TOOLS = frozenset({"web_search", "web_fetch"})
_URL = re.compile(r"https?://[^\s<>\"'`\\\x00-\x20]+", re.IGNORECASE)
_TRAILING = ".,;:!?*_"
_PAIRS = {")": "(", "]": "[", "}": "{"}


def normalised(url: str) -> str | None:
    """The form in which URLs are compared: no fragment, host in lower case, a path. None for what is no URL."""
    try:
        parsed = httpx.URL(url).copy_with(fragment=None)
        return str(parsed.copy_with(path="/")) if parsed.path in ("", "/") and not parsed.query else str(parsed)
    except (httpx.InvalidURL, UnicodeError):
        return None


def urls_in(text: str) -> Iterator[str]:
    """URLs written in `text`, without the punctuation of the sentence around them."""
    for match in _URL.finditer(text):
        url = match[0]
        while url and (url[-1] in _TRAILING or (url[-1] in _PAIRS and url.count(url[-1]) > url.count(_PAIRS[url[-1]]))):
            url = url[:-1]
        yield url


def _texts(content: Iterable[Json]) -> Iterator[str]:
    for block in content:
        if block["type"] == "text":
            yield block["text"]
        elif block["type"] == "search_result":
            yield block["source"]
            yield from _texts(block["content"])


def _takes(wanted: Json | None, name: str) -> bool:
    """Whether a source filter (null means all) takes what tool `name` returned."""
    if wanted is None or wanted["type"] == "all":
        return True
    if wanted["type"] == "none":
        return False
    listed = any(tool["name"] == name for tool in wanted["tools"])
    return listed if wanted["type"] == "only" else not listed


def seen(events: Iterable[StoredEvent], sources: Json) -> set[str]:
    """URLs, normalised, that the sources of a `web_fetch` configuration contribute. `events` are in log order."""
    names: dict[str, str] = {}
    found: set[str] = set()
    for event in events:
        body = event.json()
        wanted = False
        match event.type:
            case "agent.tool_use" | "agent.custom_tool_use":
                names[event.id] = body["name"]
            case "user.message":
                wanted = _takes(sources.get("user_input"), "")
            case "user.custom_tool_result":
                wanted = _takes(sources.get("client_tool_results"), names.get(body["custom_tool_use_id"], ""))
            case "agent.tool_result":
                name = names.get(body["tool_use_id"], "")
                wanted = name in SERVER_TOOLS and not body["is_error"] and _takes(sources.get("server_tool_results"), name)
            case _:
                pass
        if wanted:
            found |= {
                normal for text in _texts(body.get("content") or ()) for url in urls_in(text) if (normal := normalised(url))
            }
    return found
