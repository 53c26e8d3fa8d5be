"""What fails in a web tool is a result for the model, whatever it was; only the database's trouble is the session's."""

import logging
from collections.abc import Mapping
from typing import Any

import pytest

from managed_agents.core import addresses
from managed_agents.harness.tools.guarded_http import GuardedClient
from managed_agents.harness.tools.web import WebTools
from managed_agents.harness.tools.web_fetch import WebFetch
from managed_agents.harness.tools.web_search import Answer
from managed_agents.harness.turn import ToolCall
from managed_agents.sandbox.backend import Outcome
from tests.support.websites import website

pytestmark = [pytest.mark.anyio, pytest.mark.requirement("WEB-113")]


class Failing:
    """A search provider with a bug."""

    asks_model = False

    async def search(self, query: str, config: dict[str, Any], agent: Mapping[str, Any]) -> Answer:
        del config, agent
        raise KeyError(query)


async def nothing_seen(_sources: dict[str, Any]) -> set[str]:
    return set()


async def below_cap() -> bool:
    return False


async def outcome(name: str, arguments: dict[str, Any], **config: Any) -> Outcome:
    tools = WebTools(WebFetch(GuardedClient(exceptions=addresses.networks("127.0.0.0/8,::1/128"))), Failing())
    found, usage = await tools.run(ToolCall("sevt_1", name, arguments), config, {}, nothing_seen, below_cap)
    assert usage is None
    return found


def told(found: Outcome) -> str:
    assert found.is_error
    (block,) = found.content
    return str(block["text"])


@pytest.mark.parametrize("charset", ["undefined", "idna", "punycode"])
async def test_what_a_server_says_of_its_text_is_no_error(charset: str) -> None:
    async with website() as site:
        found = await outcome("web_fetch", {"url": f"{site}/typed?hex=706c61696e&times=1&type=text/plain;charset={charset}"})
    assert not found.is_error
    assert "plain" in found.content[0]["text"]


@pytest.mark.parametrize("url", ["http://xn--/", "https://xn--0.xn--0/"])
async def test_names_that_are_none_are_refused_also_where_a_page_leads_to_them(url: str) -> None:
    assert told(await outcome("web_fetch", {"url": url})).startswith("url_not_allowed: ")
    assert told(await outcome("web_fetch", {"url": url}, allowed_domains=["example.com"])).startswith("url_not_allowed: ")
    async with website() as site:
        assert told(await outcome("web_fetch", {"url": f"{site}/redirect?to={url}"})).startswith("url_not_allowed: ")


async def test_a_bug_is_a_result_and_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert told(await outcome("web_search", {"query": "what"})).startswith("unavailable: ")
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[0] is KeyError


async def test_trouble_of_the_database_is_no_result() -> None:
    async def lost(_sources: dict[str, Any]) -> set[str]:
        raise ConnectionError("the database cannot be reached")

    tools = WebTools(WebFetch(GuardedClient()), None)
    config = {"url_sources": {"user_input": {"type": "all"}}}
    with pytest.raises(ConnectionError):  # the session is taken up again, and the call repeated
        await tools.run(ToolCall("sevt_1", "web_fetch", {"url": "http://example.com/"}), config, {}, lost, below_cap)
