"""What a script sees of a request."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import orjson

from managed_agents.scripted_model.checks import JsonObject
from managed_agents.scripted_model.signing import blocks_of


def text_of(content: object) -> str:
    """Return the text of a message's or a tool result's content, blocks joined by line breaks."""
    return "\n".join(cast("str", block["text"]) for block in blocks_of(content) if block.get("type") == "text")


@dataclass(frozen=True, slots=True)
class ToolResult:
    """One answered tool call."""

    tool_use_id: str
    name: str
    input: JsonObject
    text: str
    is_error: bool
    content: list[JsonObject]


# How a server begins the system prompt with which it lets the model judge a call (permission policy `auto`).
JUDGING = "You decide whether a tool call of an AI agent may run"


@dataclass(frozen=True, slots=True)
class JudgedCall:
    """The call that a judging request asks about."""

    tool: str
    input: JsonObject


@dataclass(frozen=True)
class Request:
    """One request, already found valid, with what scripts usually ask of it."""

    body: JsonObject
    headers: dict[str, str]
    attempt: int
    """How often exactly this request was seen, itself included: 1 unless it is a retry."""
    count: Callable[[str], int] = field(repr=False)
    """`count(key)` adds one to a counter that lives as long as the scripted model and returns it."""

    @property
    def model(self) -> str:
        """The model asked for."""
        return cast("str", self.body["model"])

    @property
    def messages(self) -> list[JsonObject]:
        """The conversation as it was sent."""
        return cast("list[JsonObject]", self.body["messages"])

    @cached_property
    def system(self) -> str:
        """The system prompt's text."""
        return text_of(self.body.get("system"))

    @cached_property
    def judging(self) -> JudgedCall | None:
        """The call to judge, when this request is not the agent's own but asks whether one of its calls may run."""
        if not self.system.startswith(JUDGING):
            return None
        call = orjson.loads(self.last_user_text)["call"]
        return JudgedCall(call["tool"], call["input"])

    @cached_property
    def tools(self) -> list[str]:
        """Names of the tools offered."""
        return [cast("str", tool["name"]) for tool in cast("list[JsonObject]", self.body.get("tools") or [])]

    @cached_property
    def user_texts(self) -> list[str]:
        """The texts of the user's messages, oldest first; messages that only carry tool results are none."""
        texts = [text_of(message["content"]) for message in self.messages if message["role"] == "user"]
        return [each for each in texts if each]

    @property
    def last_user_text(self) -> str:
        """What the user said last."""
        return self.user_texts[-1] if self.user_texts else ""

    @property
    def turn(self) -> int:
        """Which of the user's messages this answers: 1 for the first."""
        return len(self.user_texts)

    @cached_property
    def round(self) -> int:
        """How often the model has answered since the user spoke last: 0 for the first request of a turn."""
        rounds = 0
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                rounds += 1
            elif message["role"] == "user" and text_of(message["content"]):
                break
        return rounds

    @cached_property
    def all_tool_results(self) -> list[ToolResult]:
        """Every answered tool call of the conversation, oldest first."""
        asked: dict[object, JsonObject] = {}
        results: list[ToolResult] = []
        for message in self.messages:
            results.extend(_results(message, asked))
            asked.update((b["id"], b) for b in blocks_of(message["content"]) if b["type"] == "tool_use")
        return results

    @cached_property
    def tool_results(self) -> list[ToolResult]:
        """The answers to the calls of the model's last message; empty when it made none."""
        answered: list[str] = []
        for message in reversed(self.messages):
            if message["role"] == "assistant":
                break
            answered += [cast("str", b["tool_use_id"]) for b in blocks_of(message["content"]) if b["type"] == "tool_result"]
        return [result for result in self.all_tool_results if result.tool_use_id in answered]

    def tool_result(self, name: str) -> ToolResult | None:
        """Return the newest result of the tool `name` in the whole conversation."""
        return next((result for result in reversed(self.all_tool_results) if result.name == name), None)


def _results(message: JsonObject, asked: dict[object, JsonObject]) -> list[ToolResult]:
    results: list[ToolResult] = []
    for block in blocks_of(message["content"]):
        if block["type"] != "tool_result":
            continue
        use = asked[block["tool_use_id"]]
        results.append(
            ToolResult(
                tool_use_id=cast("str", block["tool_use_id"]),
                name=cast("str", use["name"]),
                input=cast("JsonObject", use["input"]),
                text=text_of(block.get("content")),
                is_error=bool(block.get("is_error")),
                content=blocks_of(block.get("content")),
            )
        )
    return results
