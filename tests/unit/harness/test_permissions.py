"""The question to the judge, and what its answers mean."""

from typing import Any

import orjson
import pytest

from managed_agents.eventlog.events import SpanUsage
from managed_agents.harness import compaction, permissions
from managed_agents.harness.transcript import CONTINUE, REMOVED
from managed_agents.scripted_model.request import JUDGING

USED = SpanUsage(input_tokens=3, cost=None)


@pytest.mark.parametrize(
    ("answer", "permission", "reason"),
    [
        ("ALLOW", "allow", None),
        ("allow.", "allow", None),
        ("It lists files.\n\n**ALLOW**\n", "allow", None),
        ("DENY", "deny", "high_risk"),
        ("UNSURE", "ask", "indeterminate"),
        ("", "ask", "indeterminate"),
        ("ALLOW DENY", "ask", "indeterminate"),
        ("I would ALLOW this", "ask", "indeterminate"),
        ("ALLOW\nbut only if it is what the user wants", "ask", "indeterminate"),
    ],
)
def test_answers(answer: str, permission: str, reason: str | None) -> None:
    judgement = permissions.judgement_of(answer, USED)
    assert (judgement.permission, judgement.reason_code, judgement.usage) == (permission, reason, USED)


def question(messages: list[dict[str, Any]], call: dict[str, Any] | None = None, **agent: Any) -> dict[str, Any]:
    made = {"model": {"id": "m", "effort": {"type": "high"}, "speed": "standard", **agent.pop("model", {})}, "system": None}
    call = call or {"type": "tool_use", "name": "bash", "input": {"command": "ls"}}
    body = permissions.judging_request({**made, **agent}, messages, call, max_tokens=64_000, takes_effort=True)
    return {**body, "asked": orjson.loads(body["messages"][0]["content"])}


def test_the_question_holds_instructions_conversation_and_call() -> None:
    conversation: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "clean up"}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "ok"}],
        },
        {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "text", "text": "a b"}]}]},
        {"role": "system", "content": [{"type": "text", "text": "be careful"}]},
    ]
    body = question(conversation, system="You tidy.")
    assert body["asked"] == {
        "instructions": "You tidy.",
        "conversation": [
            {"from": "user", "text": "clean up"},
            {"from": "agent", "text": "ok"},
            {"from": "tool", "text": "a b"},
            {"from": "instructions", "text": "be careful"},
        ],
        "call": {"tool": "bash", "input": {"command": "ls"}},
    }
    assert body["max_tokens"] == permissions.OUTPUT_TOKENS_MAX
    assert body["output_config"] == {"effort": "low"}


@pytest.mark.requirement("EVT-091")
def test_what_the_harness_put_in_the_users_place_is_no_wish_of_the_users() -> None:
    """Behind a compaction, the summary: the model wrote it, from what tools returned too."""
    summary = compaction.opening("The user wants everything deleted. " * 5_000, followed=True)
    words = [summary, *({"type": "text", "text": text} for text in (REMOVED, CONTINUE, "list the files"))]
    conversation = question([{"role": "user", "content": words}])["asked"]["conversation"]
    assert [entry["from"] for entry in conversation] == ["summary", "user"]
    assert conversation[1]["text"] == "list the files"
    assert len(conversation[0]["text"]) < permissions.TEXT_CHARS_MAX + 100
    # Unlike a wish, it goes where there is no room.
    noise = {"role": "user", "content": [{"type": "tool_result", "content": "x" * 10_000}] * 200}
    kept = question([{"role": "user", "content": words}, noise])["asked"]["conversation"]
    assert [entry["from"] for entry in kept if entry["from"] != "tool"] == ["user"]


def test_the_region_of_the_agent_holds_for_the_judge() -> None:
    assert "inference_geo" not in question([])
    assert question([], model={"inference_geo": "us"})["inference_geo"] == "us"


def test_the_question_is_bounded_and_keeps_what_the_user_wanted() -> None:
    wish = {"role": "user", "content": [{"type": "text", "text": "only ever list files"}]}
    noise = {"role": "user", "content": [{"type": "tool_result", "content": "x" * 10_000}] * 20}
    work = {"role": "assistant", "content": [{"type": "tool_use", "name": "bash", "input": {"command": "y" * 50_000}}]}
    body = question([wish, *[work, noise] * 30], {"name": "bash", "input": {"command": "z" * 100_000}})
    assert body["asked"]["conversation"][0] == {"from": "user", "text": "only ever list files"}
    assert len(body["messages"][0]["content"]) < permissions.CONVERSATION_CHARS_MAX + permissions.INPUT_CHARS_MAX + 10_000


def test_the_scripted_model_knows_the_question() -> None:
    assert permissions.QUESTION.startswith(JUDGING)
