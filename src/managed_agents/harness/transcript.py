"""The conversation as the model gets it, folded from the log. Pure.

The assistant's turns are the raw response blocks kept in the private part, unaltered (thinking is signed); the user's turns
are built from events. Tool results are put in the order of their tool uses, whatever order they finished in, so the same log
always gives the same bytes and a prefix cache keeps hitting.

Thinking is bound to the model and to the conversation that produced it: it is left out where another model is asked now, and
a compaction leaves no assistant turn at all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import orjson

from managed_agents.eventlog.events import QueuedEvent, StoredEvent, repaired
from managed_agents.harness import compaction, prompt
from managed_agents.harness.prompt import Brief

Json = dict[str, Any]

THINKING = ("thinking", "redacted_thinking")
CUT_OFF = ("max_tokens", "model_context_window_exceeded", "pause_turn")
CONTINUE = "Your last answer was cut off. Go on exactly where it stopped."
COUNTED = ("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "output_tokens")
COUNT_MAX = 1_000_000_000
REMOVED = "(removed: the request that carried this was refused)"


@dataclass(slots=True)
class Transcript:
    """The conversation so far, extended event by event."""

    messages: list[Json] = field(default_factory=list[Json])
    # Beside `messages`: which model was asked for an assistant's turn.
    _asked: list[str | None] = field(default_factory=list[str | None])
    # tool use event id → its position and provider id, of the newest assistant turn
    _calls: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    _results: dict[int, Json] = field(default_factory=dict[int, Json])
    _user: list[Json] = field(default_factory=list[Json])
    # What a compaction keeps word for word: what the user said since the last answer, and all system messages.
    _unanswered: list[Json] = field(default_factory=list[Json])
    _system: list[Json] = field(default_factory=list[Json])
    _summary: str | None = None
    _cut_off: bool = False
    # Requests in a row that the endpoint rejected.
    _rejections: int = 0
    # What the model counted at its last answer, and our estimate of what came since.
    _counted: int | None = None
    _since: int = 0

    def apply(self, event: StoredEvent) -> None:
        """Add one event; those the model does not see change nothing."""
        if not event.for_model:
            return
        if event.type == "user.message":
            self._said([user_block(block) for block in event.json()["content"]])
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
            self._instructed(event.json()["content"])
        elif event.type == "span.model_request_end":
            private = event.private_json()
            if (response := private.get("response")) is not None:
                self._answer(response, private["tool_use_ids"])
            elif private.get("rejected"):
                self._rejected()
        elif event.type == "agent.thread_context_compacted":
            self._compact(event.private_json())

    # Folding

    def _said(self, blocks: Sequence[Json]) -> None:
        self._user += blocks
        self._unanswered += blocks
        self._since += compaction.tokens_of(list(blocks))

    def _result(self, tool_use_id: str, content: Sequence[Mapping[str, Any]], *, is_error: bool) -> None:
        call = self._calls.pop(tool_use_id, None)
        if call is None:
            return  # a repeated answer
        position, provider_id = call
        block = {"type": "tool_result", "tool_use_id": provider_id, "content": content, "is_error": is_error}
        self._results[position] = block
        self._since += compaction.tokens_of(block)

    def _instructed(self, blocks: Sequence[Json]) -> None:
        """Everything before a system message is closed: what the user says next comes behind it."""
        self._close_user()
        self._system += blocks
        self._append("system", list(blocks))
        self._since += compaction.tokens_of(list(blocks))

    def _answer(self, response: Json, tool_use_ids: Mapping[str, str]) -> None:
        self._rejections = 0
        if response["stop_reason"] == "refusal":
            return self._refused()
        blocks = [block for block in response["content"] if _sendable(block)]
        if all(block["type"] in THINKING for block in blocks):
            # The model said nothing: the API refuses an empty turn, and the user's next words join the last ones.
            return None
        self._close_user()
        self._append("assistant", blocks, response.get("asked"))
        self._unanswered = []
        order = [block["id"] for block in blocks if block["type"] == "tool_use"]
        self._calls = {event_id: (order.index(provider_id), provider_id) for event_id, provider_id in tool_use_ids.items()}
        self._cut_off = response["stop_reason"] in CUT_OFF and not blocks[-1]["type"].startswith(("server_", "mcp_", "web_"))
        if counted := _counted(response.get("usage")):
            self._counted, self._since = counted, 0
        else:
            self._since += compaction.tokens_of(blocks)
        return None

    def _refused(self) -> None:
        """Take out what was refused: the API refuses every later request that still carries it."""
        self._change_new(_removed)
        self._user, self._unanswered = [], []

    def _rejected(self) -> None:
        """Take out what the endpoint may have rejected: it would reject every later request that still carries it.

        That is, first, whatever is new and no text. Where all is text, it may be something that the endpoint fetches for each
        request, and that is gone by now. And if nothing of that helped, everything that is new.
        """
        self._rejections += 1
        new = [*self._user, *self._results.values()]
        new += [block for turn in self._new_turns() for block in self.messages[turn]["content"]]
        if any(_text_only(block) != block for block in new):
            self._change_new(_text_only)
            spared = sum(compaction.tokens_of(block) - compaction.tokens_of(_text_only(block)) for block in new)
            self._since = max(0, self._since - spared)
        elif not self._take_out_fetched() and self._rejections > 1:
            self._refused()

    def _take_out_fetched(self) -> bool:
        """Take out what stands in the conversation by its address only; says whether there was anything."""
        found = False
        for index, message in enumerate(self.messages):
            if message["role"] == "user":
                content = [_unfetched(block) for block in message["content"]]
                found = found or content != message["content"]
                self.messages[index] = {**message, "content": content}
            elif found:
                # Bound to what came before it, which is not the same any more.
                self.messages[index] = _without_thinking(message)
        return found

    def _change_new(self, change: Callable[[Json], Json]) -> None:
        """Change every block that the user's side has said since the last answer."""
        self._user = [change(block) for block in self._user]
        self._unanswered = [change(block) for block in self._unanswered]
        self._results = {position: change(result) for position, result in self._results.items()}
        for turn in self._new_turns():
            message = self.messages[turn]
            self.messages[turn] = {**message, "content": [change(block) for block in message["content"]]}

    def _new_turns(self) -> list[int]:
        """Where in `messages` the user's turns since the last answer are: those that a system message has closed."""
        answers = [index for index, message in enumerate(self.messages) if message["role"] == "assistant"]
        first = answers[-1] + 1 if answers else 0
        return [index for index in range(first, len(self.messages)) if self.messages[index]["role"] == "user"]

    def _compact(self, checkpoint: Json) -> None:
        self.messages, self._asked = [], []
        self._calls, self._results = {}, {}
        self._summary, self._user = checkpoint["summary"], list(checkpoint["kept"])
        self._unanswered = list(self._user)
        self._cut_off, self._rejections = False, 0
        self._counted, self._since = None, compaction.tokens_of([self._summary, *self._user])
        instructions, self._system = list(checkpoint["system"]), []
        if instructions:
            self._instructed(instructions)

    def _append(self, role: str, content: list[Json], asked: str | None = None) -> None:
        self.messages.append({"role": role, "content": content})
        self._asked.append(asked)

    def _close_user(self) -> None:
        if (content := self._open_user()) is not None:
            self._append("user", content)
        self._results, self._user, self._summary = {}, [], None

    def _open_user(self) -> list[Json] | None:
        content = [self._results[position] for position in sorted(self._results)]
        if self._summary is not None:
            content.append(compaction.opening(self._summary, followed=bool(self._user)))
        content += self._user
        if not content and self._cut_off:
            content = [{"type": "text", "text": CONTINUE}]
        return content or None

    # Requests

    def for_request(self, model: str | None = None) -> list[Json]:
        """The messages of the next request, to `model` where that matters."""
        messages = [
            _without_thinking(message) if model is not None and asked not in (None, model) else message
            for message, asked in zip(self.messages, self._asked, strict=True)
        ]
        messages = [message for message in messages if message["content"]]
        if (content := self._open_user()) is not None:
            messages.append({"role": "user", "content": content})
        return messages

    def request(self, brief: Brief) -> Json:
        """The body of the next request."""
        return prompt.body(brief, self.for_request(brief.agent["model"]["id"]))

    def is_full(self, brief: Brief, waiting: Sequence[QueuedEvent] = ()) -> bool:
        """Whether history should be compacted before the next request, which takes up `waiting`."""
        if all(message["role"] != "assistant" for message in self.messages):
            return False  # nothing to win: what is left is the newest summary and what is kept in any case
        counted = self._counted
        if counted is None:
            counted = compaction.tokens_of([prompt.system_prompt(brief.agent, brief.uploads), *prompt.tools_of(brief.agent)])
        new = sum(compaction.tokens_of(orjson.loads(event.payload).get("content")) for event in waiting)
        return counted + self._since + new >= brief.model.full_tokens

    def compaction(self, brief: Brief, *, briefly: bool) -> Json:
        """The body of the request for a summary; `briefly` when the conversation itself did not fit or did not do."""
        tokens = compaction.SUMMARY_TOKENS_MAX
        messages = self.for_request(brief.agent["model"]["id"])
        if not briefly:
            return prompt.body(brief, compaction.asking(messages), said_tokens_max=tokens)
        told = compaction.asking_briefly(messages, chars_max=brief.model.full_tokens)
        return prompt.body(brief, told, said_tokens_max=tokens, with_tools=False)

    def checkpoint(self, brief: Brief, content: Sequence[Json]) -> Json | None:
        """What a compaction keeps, from the response that summarises; None when that is of no use."""
        summary = compaction.summary_of(content)
        if summary is None:
            return None
        kept = compaction.kept_of(self._unanswered, tokens_max=brief.model.context_tokens // 4)
        return {"summary": summary, "kept": kept, "system": self._system}


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


def _sendable(block: Json) -> bool:
    """Whether the API takes the block back: no blank text, no thinking that was cut off before it was signed."""
    if block["type"] == "text":
        return bool(block["text"].strip())
    return block["type"] != "thinking" or bool(block.get("signature"))


def _removed(block: Json) -> Json:
    """A user's block without what it said; a result still answers its call, and a summary is ours."""
    if block["type"] == "tool_result":
        return {**block, "content": [{"type": "text", "text": REMOVED}]}
    if block["type"] == "text" and block["text"].startswith(compaction.HEAD):
        return block
    return {"type": "text", "text": REMOVED}


def _text_only(block: Json) -> Json:
    """A user's block without what is no text."""
    if block["type"] == "tool_result":
        return {**block, "content": [_text_only(inner) for inner in block["content"]]}
    return block if block["type"] == "text" else {"type": "text", "text": REMOVED}


def _unfetched(block: Json) -> Json:
    """A user's block without what the endpoint has to fetch from somewhere."""
    if block["type"] == "tool_result":
        return {**block, "content": [_unfetched(inner) for inner in block["content"]]}
    return {"type": "text", "text": REMOVED} if block.get("source", {}).get("type") == "url" else block


def _without_thinking(message: Json) -> Json:
    return {**message, "content": [block for block in message["content"] if block["type"] not in THINKING]}


def _counted(usage: Any) -> int:
    """What the model counted; zero when that is nothing to go by. Old logs hold whatever an endpoint has said."""
    told: Json = cast(Json, usage) if isinstance(usage, dict) else {}
    counts = [told.get(name) for name in COUNTED]
    return sum(count for count in counts if type(count) is int and 0 <= count <= COUNT_MAX)
