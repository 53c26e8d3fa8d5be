"""The web tools of a worker: what `web_fetch` and `web_search` calls become. Trouble is an error outcome, told to the model."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from managed_agents.eventlog.events import SpanUsage
from managed_agents.harness.tools import web_search
from managed_agents.harness.tools.web_fetch import SeenUrls, WebError, WebFetch
from managed_agents.harness.tools.web_search import SearchProvider
from managed_agents.harness.turn import ToolCall
from managed_agents.sandbox.backend import Outcome

logger = logging.getLogger(__name__)
Json = dict[str, Any]

NO_PROVIDER = "web_search is not available: this server has no search provider (MANAGED_AGENTS_WEB_SEARCH)."


AtCap = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class WebTools:
    """What every session of a worker shares."""

    fetch: WebFetch
    search: SearchProvider | None
    # `allowed_hosts` of a limited environment bounds them, as it bounds the sandbox.
    follow_networking: bool = True

    @property
    def missing(self) -> Mapping[str, str]:
        """Tools that cannot be run here, and why."""
        return {} if self.search is not None else {"web_search": NO_PROVIDER}

    @property
    def asks_model(self) -> bool:
        """Whether a search is a model request, with its cost."""
        return self.search is not None and self.search.asks_model

    async def run(
        self, call: ToolCall, config: Json, agent: Mapping[str, Any], seen: SeenUrls, at_cap: AtCap
    ) -> tuple[Outcome, SpanUsage | None]:
        """Run `call` under its tool's settings; also what it cost. Repeating it is harmless.

        `at_cap` says whether the session may ask a model no more.
        """
        try:
            if call.name == "web_fetch":
                return Outcome(await self.fetch.run(call.input, config, seen), is_error=False), None
            assert self.search is not None, "a tool that is missing is refused before"
            if self.search.asks_model and await at_cap():
                raise WebError("unavailable", "the session's budget is used up")
            content, usage = await web_search.run(self.search, call.input, config, agent)
            return Outcome(content, is_error=False), usage
        except WebError as error:
            return _refused(error), error.usage
        except (SQLAlchemyError, ConnectionError):
            raise  # of the database, while reading what the conversation has shown: the session is taken up again
        except Exception:
            # Supervisor: pages and search engines are written by strangers, and one that meets a bug of ours must not end the
            # turn, again and again. spec: errors of tools are results
            logger.exception("%s failed", call.name)
            return _refused(WebError("unavailable", f"{call.name} failed for a reason of its own")), None


def _refused(error: WebError) -> Outcome:
    return Outcome([{"type": "text", "text": str(error)}], is_error=True)
