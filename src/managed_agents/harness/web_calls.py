"""Calls of the web tools in one session: under its agent's settings and its environment's networking, with its conversation,
large outputs kept in its sandbox.
"""

from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import anyio

from managed_agents.db.engine import Database
from managed_agents.eventlog import read
from managed_agents.eventlog.events import SpanUsage
from managed_agents.harness import budget, large_output
from managed_agents.harness.hands import SessionHands
from managed_agents.harness.lease import Claim
from managed_agents.harness.tools import definitions, seen_urls
from managed_agents.harness.tools.web import WebTools
from managed_agents.harness.turn import ToolCall
from managed_agents.sandbox.backend import Outcome
from managed_agents.sandbox.layout import SPILL

Json = dict[str, Any]


class WebCalls:
    """One session's use of the worker's web tools."""

    def __init__(self, web: WebTools, db: Database, claim: Claim, agent: Mapping[str, Any], hands: SessionHands) -> None:
        self._web = web
        self._db = db
        self._claim = claim
        self._agent = agent
        self._hands = hands
        limited = web.follow_networking and claim.networking["type"] == "limited"
        self._spending = anyio.Lock()
        self._bounds: Json = {"allowed_hosts": claim.networking.get("allowed_hosts", [])} if limited else {}

    @asynccontextmanager
    async def spending(self, call: ToolCall) -> AsyncGenerator[None]:
        """For a call and the append of its result: under a budget what asks a model goes one at a time, each on what is left.

        Else calls that run side by side would all begin on the same last cent.
        """
        if call.name != "web_search" or not self._web.asks_model or await self._left() is None:
            yield
            return
        async with self._spending:
            yield

    async def run(self, call: ToolCall) -> tuple[Outcome, SpanUsage | None]:
        """Run `call`; also what it cost by itself."""
        config = {**definitions.settings_of(call.name, self._agent["tools"]), **self._bounds}
        outcome, usage = await self._web.run(call, config, self._agent, self._seen, self._at_cap)
        content = [await self._shortened(call, block) for block in outcome.content]
        return Outcome(content, outcome.is_error), usage

    async def _shortened(self, call: ToolCall, block: Json) -> Json:
        """The block itself, or its preview; the whole is kept where the session's own tools can read it."""
        if not large_output.is_large(block):
            return block
        path = f"{SPILL}/{call.name}-{call.event_id}.txt"
        kept = definitions.offers_sandbox(self._agent["tools"]) and await self._hands.keep(path, block["text"])
        return {**block, "text": large_output.preview(block["text"], path if kept else None)}

    async def _at_cap(self) -> bool:
        dollars = await self._left()
        return dollars is not None and dollars <= 0

    async def _left(self) -> Decimal | None:
        async with self._db.autocommit() as tx:
            return await budget.left(tx, self._claim.session_id)

    async def _seen(self, sources: Json) -> set[str]:
        """URLs that the conversation has shown the model, from the log: what was compacted away counts too."""
        async with self._db.autocommit() as tx:
            events = await read.of_types(tx, self._claim.session_id, self._claim.thread_id, seen_urls.TYPES)
        return seen_urls.seen(events, sources)
