"""One model request: sent with its previews, its calls judged, given up when an interrupt comes first."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import anyio
from anyio.abc import TaskGroup
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.core import faults
from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.eventlog import interest
from managed_agents.eventlog.events import SpanUsage, StoredEvent
from managed_agents.eventlog.previews import PreviewSender
from managed_agents.harness import budget
from managed_agents.harness.changes import Changes
from managed_agents.harness.judge import Judge
from managed_agents.harness.lease import Claim
from managed_agents.harness.permissions import Judgement
from managed_agents.harness.preview import Preview
from managed_agents.harness.request import Failed, Finished, ModelRequester
from managed_agents.harness.response import Response, judged_calls, usage_of

logger = logging.getLogger(__name__)

REQUEST_FIRST_SECONDS = 0.002  # what is asked beside a request must not make it leave later
BEFORE_JUDGING = faults.register("turn.before_judging", "response complete, policy auto not asked")
CALLS_JUDGED = faults.register("turn.calls_judged", "policy auto decided, response not in the log")


@dataclass(slots=True)
class Asked:
    """A model request under way."""

    start_id: str
    preview: Preview
    judgements: dict[int, Judgement] = field(default_factory=dict[int, Judgement])
    # Complete; its calls may still be judged.
    response: Response | None = None

    @property
    def used(self) -> SpanUsage:
        """What is known to be used, should it be cut off now."""
        used = SpanUsage() if self.response is None else usage_of(self.response.usage, self.response.cost)
        for judgement in self.judgements.values():
            used = used.plus(judgement.usage)
        return used


class Asking:
    """Sends the requests of one session. `background` owns what is asked beside them."""

    def __init__(
        self,
        db: Database,
        claim: Claim,
        requester: ModelRequester,
        previews: PreviewSender,
        jitter: Callable[[], float],
        changes: Changes,
        background: TaskGroup,
    ) -> None:
        self._db = db
        self._claim = claim
        self._requester = requester
        self._previews = previews
        self._jitter = jitter
        self._changes = changes
        self._background = background

    def begin(self, span: StoredEvent, *, shown: bool) -> Asked:
        """Begin with the request whose span is open in the log; `shown`: clients may see previews of it."""
        return Asked(span.id, self._preview(span.seq, shown=shown))

    async def ask(
        self, asked: Asked, request: ev.Json, agent: dict[str, Any], *, judge: bool, after_seconds: float = 0.0
    ) -> Finished | Failed | None:
        """Send it `after_seconds`, and judge the calls in the answer where `judge` says so; None when an interrupt came first."""

        async def send() -> Finished | Failed:
            if after_seconds:
                await anyio.sleep(after_seconds)
            outcome = await self._requester.send(request, agent["model"], watch=asked.preview.take)
            if isinstance(outcome, Finished):
                asked.response = outcome.response
                if judge:
                    await self._judge(asked, outcome.response, request["messages"], agent)
            return outcome

        return await self._changes.until_interrupted(send)

    async def _judge(self, asked: Asked, response: Response, messages: Sequence[dict[str, Any]], agent: dict[str, Any]) -> None:
        if not (calls := judged_calls(response, agent["tools"])):
            return
        faults.reach(BEFORE_JUDGING)
        judge = Judge(self._requester.client, self._requester.models, self._jitter)
        await judge.judge(agent, messages, calls, asked.judgements, await self._dollars_left(response))
        faults.reach(CALLS_JUDGED)

    async def _dollars_left(self, response: Response) -> Decimal | None:
        """What the session's budget leaves behind `response`, which is not in the log yet; null when there is no budget."""
        async with self._db.autocommit() as tx:
            dollars = await budget.left(tx, self._claim.session_id)
        if dollars is None:
            return None
        return Decimal(0) if response.cost is None else dollars - response.cost

    def _preview(self, span_seq: int, *, shown: bool) -> Preview:
        """Whether anyone wants them is asked beside the request."""
        preview = Preview(self._claim.session_id, self._claim.thread_id, span_seq, self._previews.push)
        if not shown:
            preview.decide(False)
            return preview
        self._background.start_soon(self._ask_interest, preview)
        return preview

    async def _ask_interest(self, preview: Preview) -> None:
        await anyio.sleep(REQUEST_FIRST_SECONDS)
        try:
            async with self._db.autocommit() as tx:
                preview.decide(await interest.wanted(tx, self._claim.session_id))
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            # No previews for this request: nothing depends on them.
            logger.warning("interest in previews of %s not known: %s", self._claim.session_id, type(error).__name__)
            preview.decide(False)
