"""Asks the model whether calls under policy `auto` may run. Never raises for the model's sake: no answer is no judgement.

Nothing is logged before all calls of a response are judged, so a crash here costs the response, never a call.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import anyio

from managed_agents.harness import permissions
from managed_agents.harness.decide import backoff_seconds
from managed_agents.harness.permissions import Judgement
from managed_agents.harness.response import usage_of
from managed_agents.model import errors
from managed_agents.model.client import ModelClient
from managed_agents.model.events import MessageFinished, ModelRequest
from managed_agents.model.models import Models
from managed_agents.model.prices import list_cost

Json = dict[str, Any]

JUDGING_SECONDS_MAX = 120.0
TRIES_MAX = 3
AT_ONCE = 4  # judging requests of one response


@dataclass(frozen=True, slots=True)
class Judge:
    """The model in its second role."""

    client: ModelClient
    models: Models
    jitter: Callable[[], float]

    async def judge(
        self,
        agent: Mapping[str, Any],
        messages: Sequence[Json],
        calls: Mapping[int, Json],
        judgements: dict[int, Judgement],
        dollars_left: Decimal | None = None,
    ) -> None:
        """One judgement for each of `calls` (tool use blocks) into `judgements`, within a bound.

        Each is there as soon as it is made: what it used counts also when the others are cancelled. Where a budget leaves
        `dollars_left`, they are made one after the other, and none is begun when nothing is left.
        """
        judgements |= dict.fromkeys(calls, permissions.none_reached())
        if not calls:
            return
        known = await self.models.retrieve(agent["model"]["id"])
        takes_effort = bool(known.capabilities.get("effort", {}).get("supported"))
        limiter = anyio.CapacityLimiter(AT_ONCE if dollars_left is None else 1)

        async def judge_one(index: int, call: Json) -> None:
            body = permissions.judging_request(agent, messages, call, max_tokens=known.max_tokens, takes_effort=takes_effort)
            async with limiter:
                if dollars_left is not None and not _within(dollars_left, judgements.values()):
                    judgements[index] = permissions.none_reached(out_of_credits=True)
                    return
                judgements[index] = await self._ask(body, agent["model"].get("inference_geo"))

        with anyio.move_on_after(JUDGING_SECONDS_MAX):
            async with anyio.create_task_group() as group:
                for index, call in calls.items():
                    group.start_soon(judge_one, index, call)

    async def _ask(self, body: Json, inference_geo: str | None) -> Judgement:
        for failures in range(1, TRIES_MAX + 1):
            try:
                return await self._answer(body, inference_geo)
            except errors.Billing:
                return permissions.none_reached(out_of_credits=True)
            except errors.ModelError as error:
                if not error.retryable:
                    break
                if failures < TRIES_MAX:
                    await anyio.sleep(backoff_seconds(failures, self.jitter(), None))
        return permissions.none_reached()

    async def _answer(self, body: Json, inference_geo: str | None) -> Judgement:
        async with self.client.stream(ModelRequest(body)) as events:
            async for event in events:
                if isinstance(event, MessageFinished):
                    cost = list_cost(event.model, event.usage, speed="standard", inference_geo=inference_geo)
                    text = "\n".join(block["text"] for block in event.content if block["type"] == "text")
                    return permissions.judgement_of(text, usage_of(event.usage, cost))
        raise AssertionError("a response that ends without its last event is an error of the client")


def _within(dollars: Decimal, judgements: Iterable[Judgement]) -> bool:
    """Whether less than `dollars` was spent on `judgements`. A cost that nobody knows is over any budget."""
    spent = Decimal(0)
    for judgement in judgements:
        if judgement.usage.cost is None:
            return False
        spent += judgement.usage.cost
    return spent < dollars
