"""Rules that need more than one field: the conversation, the model's own limits, cache marks, thinking.

Messages follow the real API's closely where clients may match on them.
"""

from collections import Counter
from typing import cast

from managed_agents.scripted_model import shapes
from managed_agents.scripted_model.catalog import Model, find_model
from managed_agents.scripted_model.checks import JsonObject, Refused, refuse
from managed_agents.scripted_model.signing import Signer, blocks_of, walk

CACHE_MARKS_MAX = 4
_EFFORTS = ("low", "medium", "high", "xhigh", "max")


def check_create(body: object, signer: Signer) -> Model:
    """Refuse what `POST /v1/messages` refuses; return the model asked for."""
    shapes.create_request(body, "")
    request = cast("JsonObject", body)
    model = find_model(cast("str", request["model"]))
    max_tokens = cast("int", request["max_tokens"])
    if max_tokens > model.output_tokens_max:
        raise refuse(
            "max_tokens",
            f"{max_tokens} > {model.output_tokens_max}, which is the maximum allowed number of output tokens for {model.id}",
        )
    _check_common(request, model, signer)
    _check_thinking(request, model)
    _check_sampling(request, model)
    return model


def check_count_tokens(body: object, signer: Signer) -> Model:
    """Refuse what `POST /v1/messages/count_tokens` refuses; return the model asked for."""
    shapes.count_tokens_request(body, "")
    request = cast("JsonObject", body)
    model = find_model(cast("str", request["model"]))
    _check_common(request, model, signer)
    _check_thinking(request, model)
    return model


def _check_common(request: JsonObject, model: Model, signer: Signer) -> None:
    messages = cast("list[JsonObject]", request["messages"])
    _check_messages(messages, model)
    _check_pairing(messages)
    _check_signatures(messages, model, signer)
    _check_cache_marks(request)
    _check_tools(request, model)
    output_config = cast("JsonObject", request.get("output_config") or {})
    if output_config.get("effort") is not None and not model.effort:
        raise refuse("output_config.effort", f"This model does not support the effort parameter: {model.id}")
    if request.get("speed") == "fast" and model.fast == "refused":
        raise refuse("speed", f"Fast mode is not supported for {model.id}")


def _check_messages(messages: list[JsonObject], model: Model) -> None:
    for index, message in enumerate(messages):
        role, content = message["role"], message["content"]
        last = index == len(messages) - 1
        if role == "system":
            if not model.system_messages:
                raise refuse(f"messages.{index}.role", f"`system` messages are not supported by {model.id}")
            if index == 0:
                raise refuse(f"messages.{index}.role", "the first message must use the `user` role")
        if not blocks_of(content) or content == "":
            if role == "assistant" and last and model.prefill:
                continue
            raise refuse(
                f"messages.{index}",
                "all messages must have non-empty content except for the optional final assistant message",
            )
        if isinstance(content, str) and content.isspace():
            raise refuse(f"messages.{index}", "text content blocks must contain non-whitespace text")
    if messages[0]["role"] == "assistant":
        raise refuse("messages.0.role", "the first message must use the `user` role")
    final = messages[-1]
    if final["role"] == "assistant":
        if not model.prefill:
            raise refuse(
                "messages",
                "This model does not support assistant message prefill. The conversation must end with a user message.",
            )
        text = blocks_of(final["content"])[-1].get("text")
        if isinstance(text, str) and text != text.rstrip():
            raise refuse("messages", "final assistant content cannot end with trailing whitespace")


def _turns(messages: list[JsonObject]) -> list[tuple[str, list[tuple[str, JsonObject]]]]:
    """Merge consecutive messages of one role, as the real API does; blocks keep the path they came from."""
    turns: list[tuple[str, list[tuple[str, JsonObject]]]] = []
    for number, message in enumerate(messages):
        role = cast("str", message["role"])
        blocks = [(f"messages.{number}.content.{i}", b) for i, b in enumerate(blocks_of(message["content"]))]
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(blocks)
        else:
            turns.append((role, blocks))
    return turns


def _check_pairing(messages: list[JsonObject]) -> None:
    """Every tool_use is answered by exactly one tool_result at the head of the very next user turn."""
    asked: list[str] = []
    seen: set[str] = set()
    asked_at = ""
    for role, blocks in _turns(messages):
        if role == "user":
            _check_answers(blocks, asked, asked_at)
            asked = []
            continue
        if asked:
            raise _unanswered(asked, asked_at)
        asked = [cast("str", block["id"]) for _, block in blocks if block["type"] == "tool_use"]
        for path, block in blocks:
            if block["type"] == "tool_use":
                asked_at = path.rpartition(".content.")[0]
                if block["id"] in seen:
                    raise refuse(path, "`tool_use` ids must be unique")
                seen.add(cast("str", block["id"]))
    if asked:
        raise _unanswered(asked, asked_at)


def _unanswered(ids: list[str], path: str) -> Refused:
    return refuse(
        path,
        f"`tool_use` ids were found without `tool_result` blocks immediately after: {', '.join(ids)}. Each"
        " `tool_use` block must have a corresponding `tool_result` block in the next message.",
    )


def _check_answers(blocks: list[tuple[str, JsonObject]], asked: list[str], asked_at: str) -> None:
    results = [(path, block) for path, block in blocks if block["type"] == "tool_result"]
    answered = Counter(cast("str", block["tool_use_id"]) for _, block in results)
    for path, block in results:
        use_id = cast("str", block["tool_use_id"])
        if use_id not in asked:
            raise refuse(
                path,
                f"unexpected `tool_use_id` found in `tool_result` blocks: {use_id}. Each `tool_result` block"
                " must have a corresponding `tool_use` block in the previous message.",
            )
        if answered[use_id] > 1:
            raise refuse(
                path,
                f"each tool_use must have a single result. Found multiple `tool_result` blocks with id: {use_id}",
            )
        content = block.get("content")
        if block.get("is_error") and isinstance(content, list):
            for inner in cast("list[JsonObject]", content):
                if inner["type"] != "text":
                    raise refuse(path, "all content must be type `text` if `is_error` is true")
    if missing := [use_id for use_id in asked if use_id not in answered]:
        raise _unanswered(missing, asked_at)
    if results and any(block["type"] != "tool_result" for _, block in blocks[: len(results)]):
        first = next(path for path, block in blocks if block["type"] != "tool_result")
        raise refuse(
            first,
            "`tool_result` blocks must come before any other content of the message that answers `tool_use`",
        )


def _check_signatures(messages: list[JsonObject], model: Model, signer: Signer) -> None:
    if not any(
        block["type"] in ("thinking", "redacted_thinking")
        for message in messages
        if isinstance(message["content"], list)
        for block in cast("list[JsonObject]", message["content"])
    ):
        return
    for number, index, block, turn_start, _ in walk(messages):
        if block["type"] == "redacted_thinking":
            raise refuse(f"messages.{number}.content.{index}", "Invalid `data` in `redacted_thinking` block")
        if block["type"] != "thinking":
            continue
        genuine = signer.is_genuine(
            cast("str", block["signature"]),
            model=model.id,
            thinking=cast("str", block["thinking"]),
            prefix=turn_start if model.thinking_bound_to_prefix else None,
        )
        if not genuine:
            raise refuse(f"messages.{number}.content.{index}", "Invalid `signature` in `thinking` block")


def _check_cache_marks(request: JsonObject) -> None:
    # In the prompt's order: tools, system, messages; the top-level mark stands for the last block.
    parts: list[JsonObject] = [
        *cast("list[JsonObject]", request.get("tools") or []),
        *blocks_of(request.get("system")),
    ]
    for message in cast("list[JsonObject]", request["messages"]):
        for block in blocks_of(message["content"]):
            parts.append(block)
            if block["type"] == "tool_result" and isinstance(block.get("content"), list):
                parts.extend(cast("list[JsonObject]", block["content"]))
    parts.append(request)
    marks = [cast("JsonObject", part["cache_control"]) for part in parts if part.get("cache_control")]
    if len(marks) > CACHE_MARKS_MAX:
        raise Refused(f"A maximum of {CACHE_MARKS_MAX} blocks with cache_control may be provided. Found {len(marks)}.")
    lifetimes = [mark.get("ttl", "5m") for mark in marks]
    if "5m" in lifetimes and "1h" in lifetimes[lifetimes.index("5m") :]:
        raise Refused("a ttl='1h' cache_control block must not come after a ttl='5m' cache_control block.")


def _check_tools(request: JsonObject, model: Model) -> None:
    tools = cast("list[JsonObject]", request.get("tools") or [])
    names = [cast("str", tool["name"]) for tool in tools]
    if len(set(names)) != len(names):
        raise refuse("tools", "Tool names must be unique.")
    if not names and any(
        block["type"] in ("tool_use", "tool_result")
        for message in cast("list[JsonObject]", request["messages"])
        for block in blocks_of(message["content"])
    ):
        raise refuse("tools", "Field required: the conversation contains `tool_use` or `tool_result` blocks")
    choice = cast("JsonObject | None", request.get("tool_choice"))
    if choice is None:
        return
    kind = choice["type"]
    if not tools and kind != "none":
        raise refuse("tool_choice", "may only be specified while providing tools")
    if kind in ("any", "tool"):
        if not model.forced_tool_choice:
            raise refuse("tool_choice", f"type '{kind}' is not supported by {model.id}; use 'auto' or 'none'")
        thinking = cast("JsonObject", request.get("thinking") or {})
        if thinking.get("type") in ("enabled", "adaptive"):
            raise refuse("tool_choice", "Thinking may not be enabled when tool_choice forces tool use.")
    if kind == "tool" and choice["name"] not in names:
        raise refuse("tool_choice.name", f"Tool '{choice['name']}' not found in provided tools")


def _check_thinking(request: JsonObject, model: Model) -> None:
    thinking = cast("JsonObject | None", request.get("thinking"))
    if thinking is None:
        return
    kind = thinking["type"]
    if kind == "disabled" and not model.thinking_disable:
        raise refuse("thinking.type", f"'disabled' is not supported by {model.id}: thinking is always on")
    if kind == "disabled" and model.thinking_disable_effort_max is not None:
        effort = cast("JsonObject", request.get("output_config") or {}).get("effort") or model.thinking_disable_effort_max
        if _EFFORTS.index(cast("str", effort)) > _EFFORTS.index(model.thinking_disable_effort_max):
            raise refuse("thinking.type", f"'disabled' needs an effort of {model.thinking_disable_effort_max} or below")
    if kind == "enabled":
        if not model.thinking_budgets:
            raise refuse(
                "thinking.type",
                f"'enabled' with a token budget is not supported by {model.id}; use 'adaptive'",
            )
        if "max_tokens" in request and cast("int", thinking["budget_tokens"]) >= cast("int", request["max_tokens"]):
            raise Refused("`max_tokens` must be greater than `thinking.budget_tokens`.")
    if kind == "adaptive" and not model.thinking_adaptive:
        raise refuse("thinking.type", f"adaptive thinking is not supported by {model.id}")
    if kind == "between_tools":
        raise refuse("thinking.type", f"'between_tools' is not supported by {model.id}")


def _check_sampling(request: JsonObject, model: Model) -> None:
    given = {name: request[name] for name in ("temperature", "top_p", "top_k") if name in request}
    for name, value in given.items():
        if not model.sampling and value != {"temperature": 1, "top_p": 1, "top_k": 0}[name]:
            raise refuse(name, f"only its default is supported by {model.id}")
    thinking = cast("JsonObject", request.get("thinking") or {})
    if thinking.get("type") in ("enabled", "adaptive") and given.get("temperature", 1) != 1:
        raise refuse("temperature", "may only be set to 1 when thinking is enabled")


def is_thinking(request: JsonObject, model: Model) -> bool:
    """Say whether this request gets thinking blocks."""
    thinking = cast("JsonObject | None", request.get("thinking"))
    if thinking is None:
        return model.thinking_default
    return thinking["type"] in ("enabled", "adaptive")


def shows_thinking(request: JsonObject, model: Model) -> bool:
    """Say whether thinking blocks carry their text, or only a signature."""
    thinking = cast("JsonObject", request.get("thinking") or {})
    return (thinking.get("display") or model.thinking_display) == "summarized"
