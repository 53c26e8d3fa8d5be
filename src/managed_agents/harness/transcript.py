"""The Messages request as a function of the agent and the log. Pure.

The assistant's turns are the raw response blocks kept in the private part, unaltered (thinking is signed); the user's turns
are built from events. Tool results are put in the order of their tool uses, whatever order they finished in, so the same log
always gives the same bytes and a prefix cache keeps hitting.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from managed_agents.eventlog.events import StoredEvent, repaired
from managed_agents.harness.tools import definitions, policies

Json = dict[str, Any]

OUTPUTS_NOTE = (
    "You work in an isolated Linux container without network access. The working directory is /workspace. "
    "Files you leave in /mnt/session/outputs/ are handed to the user."
)


@dataclass(slots=True)
class Transcript:
    """The conversation so far, extended event by event."""

    messages: list[Json] = field(default_factory=list[Json])
    # tool use event id → its position and provider id, of the newest assistant turn
    _calls: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    _results: dict[int, Json] = field(default_factory=dict[int, Json])
    _user: list[Json] = field(default_factory=list[Json])

    def apply(self, event: StoredEvent) -> None:
        """Add one event; those the model does not see change nothing."""
        if not event.for_model:
            return
        if event.type == "user.message":
            self._user += [user_block(block) for block in event.json()["content"]]
        elif event.type == "agent.tool_result":
            body = event.json()
            self._result(body["tool_use_id"], [_result_block(block) for block in body["content"]], is_error=body["is_error"])
        elif event.type == "user.custom_tool_result":
            body = event.json()
            is_error = bool(body.get("is_error"))
            given: list[Json] = body.get("content") or []
            content = repaired([user_block(block) for block in given], is_error=is_error)
            self._result(body["custom_tool_use_id"], content, is_error=is_error)
        elif event.type == "system.message":
            # Everything before it is closed: what the user says next comes behind it.
            self._close_user()
            self.messages.append({"role": "system", "content": event.json()["content"]})
        elif event.type == "span.model_request_end":
            private = event.private_json()
            if (response := private.get("response")) is not None:
                self._assistant(response["content"], private["tool_use_ids"])

    def _result(self, tool_use_id: str, content: Sequence[Mapping[str, Any]], *, is_error: bool) -> None:
        position, provider_id = self._calls[tool_use_id]
        self._results[position] = {
            "type": "tool_result",
            "tool_use_id": provider_id,
            "content": content,
            "is_error": is_error,
        }

    def _assistant(self, content: Sequence[Json], tool_use_ids: Mapping[str, str]) -> None:
        blocks = [block for block in content if block["type"] != "text" or block["text"].strip()]
        if not blocks:
            # The model said nothing: the API refuses an empty turn, and the user's next words join the last ones.
            return
        self._close_user()
        self.messages.append({"role": "assistant", "content": blocks})
        order = [block["id"] for block in blocks if block["type"] == "tool_use"]
        self._calls = {event_id: (order.index(provider_id), provider_id) for event_id, provider_id in tool_use_ids.items()}

    def _close_user(self) -> None:
        if (content := self._open_user()) is not None:
            self.messages.append({"role": "user", "content": content})
        self._results = {}
        self._user = []

    def _open_user(self) -> list[Json] | None:
        content = [self._results[position] for position in sorted(self._results)] + self._user
        return content or None

    def for_request(self) -> list[Json]:
        """The messages of the next request."""
        open_user = self._open_user()
        return [*self.messages, *([{"role": "user", "content": open_user}] if open_user else [])]


def _result_block(block: Json) -> Json:
    """A block of a built-in tool's result as the model gets it.

    Search results become text: the API refuses requests that mix results with and without citations, and those of the client's
    own tools may have them.
    """
    if block["type"] != "search_result":
        return block
    lines = [block["title"], block["source"], *(inner["text"] for inner in block["content"])]
    return {"type": "text", "text": "\n".join(dict.fromkeys(lines))}


def user_block(block: Json) -> Json:
    """A client's content block as the Messages API takes it: null fields dropped, else unchanged."""
    return {key: value for key, value in block.items() if value is not None}


def system_prompt(agent: Mapping[str, Any], uploads: Sequence[str]) -> str:
    """The agent's own prompt, then the facts of its environment."""
    parts = [agent["system"]] if agent["system"] else []
    if definitions.offers_sandbox(agent["tools"]):
        parts.append(OUTPUTS_NOTE)
        if uploads:
            parts.append("Files the user attached (read-only):\n" + "\n".join(f"- {path}" for path in uploads))
    return "\n\n".join(parts)


def build_request(
    agent: Mapping[str, Any], transcript: Transcript, *, max_tokens: int, takes_effort: bool, uploads: Sequence[str]
) -> Json:
    """The body of the next Messages request. Equal logs give equal bytes.

    `takes_effort`: the model accepts `output_config.effort`; the others refuse the field, so they do not get it.
    """
    model = agent["model"]
    body: Json = {
        "model": model["id"],
        "max_tokens": max_tokens,
        "messages": transcript.for_request(),
        "cache_control": {"type": "ephemeral"},
    }
    if system := system_prompt(agent, uploads):
        body["system"] = system
    tools = [definitions.as_json(name) for name in definitions.offered(agent["tools"])]
    if tools := tools + policies.custom_tools(agent["tools"]):
        body["tools"] = tools
    if takes_effort:
        body["output_config"] = {"effort": model["effort"]["type"]}
    if model["speed"] != "standard":
        body["speed"] = model["speed"]
    if (geo := model.get("inference_geo")) is not None:
        body["inference_geo"] = geo
    return body
