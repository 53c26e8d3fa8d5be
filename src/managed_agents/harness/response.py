"""From one finished model response to the events of its single append. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from managed_agents.eventlog.events import CUSTOM_TOOL_RESULT, TOOL_CONFIRMATION, NewEvent, SpanUsage, new_event, span_end
from managed_agents.harness.permissions import Judgement
from managed_agents.harness.tools import definitions, policies
from managed_agents.model.events import CUT_OFF

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Response:
    """A complete model response: lossless blocks, usage as the API sent it, the price of it where there is a list price."""

    content: Sequence[Json]
    usage: Mapping[str, Any]
    model: str
    stop_reason: str | None
    stop_details: Mapping[str, Any] | None
    cost: Decimal | None
    # Tool calls whose input was not JSON: block index → the raw text.
    broken_inputs: Mapping[int, str]
    # The model that was asked, where `model` is the one that served.
    asked: str | None = None
    # At which it was served, where fast mode was asked for.
    speed: str | None = None


def judged_calls(response: Response, tools: Sequence[Mapping[str, Any]]) -> dict[int, Json]:
    """The calls of a response that policy `auto` has to judge, by the index of their block."""
    return {
        index: block
        for index, block in enumerate(response.content)
        if block["type"] == "tool_use"
        and response.stop_reason != "refusal"
        and index not in response.broken_inputs
        and definitions.refusal(block["name"], tools) is None
        and policies.policy_of(block["name"], tools) == "auto"
    }


def events_of(
    response: Response,
    thread_id: str,
    start_id: str,
    tools: Sequence[Mapping[str, Any]],
    judgements: Mapping[int, Judgement] = MappingProxyType({}),
    *,
    event_ids: Mapping[int, str] = MappingProxyType({}),
) -> list[NewEvent]:
    """Thinking, messages and tool uses in the order of the response, then the span's end with everything private.

    Neighbouring text blocks are one message. A call that may not run carries its reason in its private part; a refused
    response makes no calls at all. `judgements` answer `judged_calls`; what they used is part of the span's usage, so that
    the spans add up to the session's. `event_ids` are the ids that previews have already told: index of an event's first
    block → id.
    """
    events: list[NewEvent] = []
    text: dict[int, Json] = {}
    tool_use_ids: dict[str, str] = {}

    def flush() -> None:
        if text:
            event_id = event_ids.get(next(iter(text)))
            events.append(new_event("agent.message", thread_id, {"content": list(text.values())}, event_id=event_id))
            text.clear()

    for index, block in enumerate(response.content):
        kind = block["type"]
        if kind == "text":
            if block["text"].strip():
                text[index] = {"type": "text", "text": block["text"]}
            continue
        flush()
        if kind in ("thinking", "redacted_thinking"):
            events.append(new_event("agent.thinking", thread_id, event_id=event_ids.get(index)))
        elif kind == "tool_use" and response.stop_reason != "refusal":
            event = _tool_use(block, thread_id, _broken(response, index), tools, judgements.get(index))
            tool_use_ids[event.id] = block["id"]
            events.append(event)
    flush()
    private = {
        "response": {
            "content": list(response.content),
            "usage": dict(response.usage),
            "model": response.model,
            "asked": response.asked,
            "stop_reason": response.stop_reason,
            "stop_details": None if response.stop_details is None else dict(response.stop_details),
        },
        # tool use event id → provider's id, for the results of the next request
        "tool_use_ids": tool_use_ids,
    }
    usage = usage_of(response.usage, response.cost)
    for judgement in judgements.values():
        usage = usage.plus(judgement.usage)
    events.append(span_end(thread_id, start_id, usage, is_error=False, private=private, speed=response.speed))
    return events


def compacted(response: Response, thread_id: str, start_id: str, checkpoint: Json | None) -> list[NewEvent]:
    """The events of a summarising response: the compaction with its `checkpoint` (null when it is of no use), and its span's end.

    What was spent on a useless one counts all the same, so its span is no error.
    """
    events = [] if checkpoint is None else [new_event("agent.thread_context_compacted", thread_id, private=checkpoint)]
    private = {"compaction": {"useful": checkpoint is not None, "model": response.model, "usage": dict(response.usage)}}
    usage = usage_of(response.usage, response.cost)
    return [*events, span_end(thread_id, start_id, usage, is_error=False, private=private, speed=response.speed)]


def _broken(response: Response, index: int) -> str | None:
    """Why the call in block `index` has no usable input, or None."""
    if (raw := response.broken_inputs.get(index)) is None:
        return None
    if response.stop_reason in CUT_OFF:
        return "The input of this call was cut off: the response reached its output limit. Make smaller calls."
    return f"The input of this call is not valid JSON: {raw[:500]}"


def _tool_use(
    block: Json, thread_id: str, broken: str | None, tools: Sequence[Mapping[str, Any]], judgement: Judgement | None
) -> NewEvent:
    name = block["name"]
    fields: Json = {"name": name, "input": block["input"]}
    if policies.is_custom(name, tools) and broken is None:
        fields["session_thread_id"] = None
        return new_event("agent.custom_tool_use", thread_id, fields, awaits=CUSTOM_TOOL_RESULT)
    permission, evaluation, refused = _permission(name, broken, tools, judgement)
    fields["evaluated_permission"] = permission
    if evaluation is not None:
        fields["evaluation"] = evaluation
    fields["session_thread_id"] = None
    return new_event(
        "agent.tool_use",
        thread_id,
        fields,
        private=None if refused is None else {"refused": refused},
        awaits=TOOL_CONFIRMATION if permission == "ask" else None,
    )


def _permission(
    name: str, broken: str | None, tools: Sequence[Mapping[str, Any]], judgement: Judgement | None
) -> tuple[str, Json | None, str | None]:
    """`evaluated_permission`, `evaluation`, and why the call may not run."""
    if broken is not None:
        # Nobody has to be asked about what cannot run; a client must not run it either, so it is never a custom tool use.
        return "deny", None, broken
    if (refused := definitions.refusal(name, tools)) is not None:
        # Refused before any policy applied: no `evaluation`. spec: beta_managed_agents_agent_tool_use_event.py
        return "deny", None, refused
    policy = policies.policy_of(name, tools)
    if policy == "always_allow":
        return "allow", {"type": policy}, None
    if policy == "always_ask":
        return "ask", {"type": policy}, None
    assert judgement is not None, "the policy is auto"
    refused = f"Permission to use {name} has been denied." if judgement.permission == "deny" else None  # observed
    return judgement.permission, {"type": policy, "evaluated_permission": judgement.as_json()}, refused


def usage_of(usage: Mapping[str, Any], cost: Decimal | None) -> SpanUsage:
    """The Messages API's usage object as ours. Cache writes without a split count as 5 minute ones."""
    creation: Mapping[str, Any] = usage.get("cache_creation") or {}
    total = _count(usage, "cache_creation_input_tokens")
    one_hour = min(total, _count(creation, "ephemeral_1h_input_tokens"))
    return SpanUsage(
        input_tokens=_count(usage, "input_tokens"),
        output_tokens=_count(usage, "output_tokens"),
        cache_read_input_tokens=_count(usage, "cache_read_input_tokens"),
        cache_5m_input_tokens=total - one_hour,
        cache_1h_input_tokens=one_hour,
        web_searches=_count(usage.get("server_tool_use") or {}, "web_search_requests"),
        cost=cost,
    )


def _count(usage: Mapping[str, Any], name: str) -> int:
    """A figure of the endpoint's; endpoints that only resemble the real one leave some out."""
    value = usage.get(name)
    return value if isinstance(value, int) and value > 0 else 0
