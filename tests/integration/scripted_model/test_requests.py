"""Every rule of the Messages API that the scripted model enforces: a request it refuses, and a near twin
that passes."""

import base64
import copy
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from managed_agents.scripted_model.signing import EMPTY, Signer

from .conftest import Scripted

pytestmark = pytest.mark.anyio

Body = dict[str, Any]
Edit = Callable[[Body], object]
PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 16).decode()
TOOL = {"name": "bash", "input_schema": {"type": "object", "properties": {"command": {"type": "string"}}}}
USE = {"type": "tool_use", "id": "toolu_1", "name": "bash", "input": {"command": "ls"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "a.txt"}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}
HOUR = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def plain(model: str = "claude-opus-5", **more: Any) -> Body:
    return {"model": model, "max_tokens": 2000, "messages": [{"role": "user", "content": "hi"}], **more}


def tooled(**more: Any) -> Body:
    return plain(tools=[copy.deepcopy(TOOL)], **more)


def answered(*results: Body, uses: tuple[Body, ...] = (USE,)) -> Body:
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": list(uses)},
        {"role": "user", "content": list(results)},
    ]
    return tooled() | {"messages": messages}


def said(*blocks: Any, model: str = "claude-opus-5") -> Body:
    return plain(model) | {"messages": [{"role": "user", "content": list(blocks)}]}


def texts(count: int, mark: Body = EPHEMERAL) -> list[Body]:
    return [{"type": "text", "text": f"part {i}", **mark} for i in range(count)]


def thought(model: str, text: str = "hm", *, signed: str | None = None, signed_for: str | None = None) -> Body:
    signature = Signer().sign(model=signed_for or model, thinking=signed or text, prefix=EMPTY)
    block = {"type": "thinking", "thinking": text, "signature": signature}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [block, {"type": "text", "text": "hello"}]},
        {"role": "user", "content": "go on"},
    ]
    return plain(model) | {"messages": messages}


def without(body: Body, name: str) -> Body:
    return {key: value for key, value in body.items() if key != name}


def image(data: str = PNG, media_type: str = "image/png") -> Body:
    return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}


def schema(**fields: Any) -> Body:
    return plain(tools=[{"name": "bash", "input_schema": fields}])


def then(*messages: tuple[str, Any], model: str = "claude-opus-5", **more: Any) -> Body:
    return plain(model, **more) | {"messages": [{"role": role, "content": content} for role, content in messages]}


BIG_IMAGE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * (10 * 1024 * 1024)).decode()
SECOND = {**USE, "id": "toolu_2"}
ERROR_IMAGE = {**RESULT, "is_error": True, "content": [image()]}
ERROR_TEXT = {**RESULT, "is_error": True, "content": [{"type": "text", "text": "no"}]}

# name: (refused, what its message contains, near twin that passes)
RULES: dict[str, tuple[Body, str, Body]] = {
    "model is required": (without(plain(), "model"), "model: Field required", plain()),
    "max_tokens is required": (without(plain(), "max_tokens"), "max_tokens: Field required", plain()),
    "messages are required": (without(plain(), "messages"), "messages: Field required", plain()),
    "messages are not empty": (plain() | {"messages": []}, "messages: List should have", plain()),
    "max_tokens is a number": (
        plain() | {"max_tokens": "9"},
        "max_tokens: Input should be a valid integer",
        plain(),
    ),
    "max_tokens within the model's": (
        plain() | {"max_tokens": 128_001},
        "max_tokens: 128001 > 128000",
        plain() | {"max_tokens": 128_000},
    ),
    "no unknown field": (plain(top_q=1), "top_q: Extra inputs are not permitted", plain(top_p=1)),
    "no unknown field in a block": (
        said({"type": "text", "text": "a", "id": 1}),
        "messages.0.content.0.id: Extra",
        said({"type": "text", "text": "a"}),
    ),
    "known block types": (said({"type": "video"}), "messages.0.content.0: Input tag 'video'", said(image())),
    "known roles": (then(("tool", "a")), "messages.0.role: Input should be 'user'", then(("user", "a"))),
    "first message is the user's": (
        then(("assistant", "a"), ("user", "b")),
        "messages.0.role",
        then(("user", "a"), ("user", "b")),
    ),
    "no prefill": (
        then(("user", "a"), ("assistant", "b")),
        "prefill",
        then(("user", "a"), ("assistant", "b"), ("user", "c")),
    ),
    "prefill without trailing space": (
        then(("user", "a"), ("assistant", "b "), model="claude-haiku-4-5"),
        "trailing whitespace",
        then(("user", "a"), ("assistant", "b"), model="claude-haiku-4-5"),
    ),
    "no empty text": (said({"type": "text", "text": ""}), "non-empty", said({"type": "text", "text": "."})),
    "no blank text": (
        said({"type": "text", "text": " \n"}),
        "non-whitespace",
        said({"type": "text", "text": " a\n"}),
    ),
    "no blank string content": (then(("user", "  ")), "non-whitespace", then(("user", " a "))),
    "no empty content": (then(("user", [])), "non-empty content", then(("user", "a"))),
    "no empty content in the middle": (
        then(("user", "a"), ("assistant", []), ("user", "b")),
        "messages.1: all messages must have non-empty",
        then(("user", "a"), ("assistant", "c"), ("user", "b")),
    ),
    "no tool_use of the user": (
        said(USE),
        "messages.0.content.0: `tool_use` blocks can not be",
        answered(RESULT),
    ),
    "system messages by model": (
        then(("user", "a"), ("system", "b"), model="claude-sonnet-4-6"),
        "messages.1.role: `system`",
        then(("user", "a"), ("system", "b"), model="claude-sonnet-5-5"),
    ),
    "system message is not first": (
        then(("system", "b"), ("user", "a")),
        "messages.0.role",
        then(("user", "a"), ("system", "b")),
    ),
    "system messages are text": (
        then(("user", "a"), ("system", [image()])),
        "messages.1.content.0",
        then(("user", "a"), ("system", [{"type": "text", "text": "b"}])),
    ),
    "every tool_use is answered": (
        answered({"type": "text", "text": "b"}),
        "messages.1: `tool_use` ids were found without `tool_result`",
        answered(RESULT),
    ),
    "all of several are answered": (
        answered(RESULT, uses=(USE, SECOND)),
        "immediately after: toolu_2",
        answered(RESULT, {**RESULT, "tool_use_id": "toolu_2"}, uses=(USE, SECOND)),
    ),
    "answered in the very next message": (
        tooled() | {"messages": [*then(("user", "a"), ("assistant", [USE]), ("system", "b"), ("user", [RESULT]))["messages"]]},
        "immediately after: toolu_1",
        answered(RESULT),
    ),
    "answered once": (answered(RESULT, RESULT), "single result", answered(RESULT)),
    "no result without a call": (
        answered(RESULT, {**RESULT, "tool_use_id": "toolu_9"}),
        "messages.2.content.1: unexpected `tool_use_id`",
        answered(RESULT),
    ),
    "no result in a fresh conversation": (tooled() | said(RESULT), "unexpected `tool_use_id`", tooled()),
    "results come first": (
        answered({"type": "text", "text": "b"}, RESULT),
        "`tool_result` blocks must come before",
        answered(RESULT, {"type": "text", "text": "b"}),
    ),
    "tool_use ids are unique": (
        tooled() | then(("user", "a"), ("assistant", [USE]), ("user", [RESULT]), ("assistant", [USE]), ("user", [RESULT])),
        "messages.3.content.0: `tool_use` ids must be unique",
        tooled()
        | then(
            ("user", "a"),
            ("assistant", [USE]),
            ("user", [RESULT]),
            ("assistant", [SECOND]),
            ("user", [{**RESULT, "tool_use_id": "toolu_2"}]),
        ),
    ),
    "tool_use input is an object": (
        answered(RESULT, uses=({**USE, "input": "ls"},)),
        "messages.1.content.0.input",
        answered(RESULT),
    ),
    "error results are text": (
        answered(ERROR_IMAGE),
        "all content must be type `text`",
        answered(ERROR_TEXT),
    ),
    "no blank text in a result": (
        answered({**RESULT, "content": [{"type": "text", "text": ""}]}),
        "messages.2.content.0.content.0: text content",
        answered({**RESULT, "content": [{"type": "text", "text": "-"}]}),
    ),
    "tools are defined when used": (
        without(answered(RESULT), "tools"),
        "tools: Field required",
        answered(RESULT),
    ),
    "tool names": (
        plain(tools=[TOOL | {"name": "no spaces"}]),
        "tools.0.custom.name: String should match",
        plain(tools=[TOOL | {"name": "a-b_C1"}]),
    ),
    "tool names are unique": (
        plain(tools=[TOOL, TOOL]),
        "tools: Tool names must be unique",
        plain(tools=[TOOL, TOOL | {"name": "b"}]),
    ),
    "tools need a schema": (
        plain(tools=[{"name": "a"}]),
        "tools.0.custom.input_schema: Field required",
        plain(tools=[TOOL]),
    ),
    "schema has a type": (
        schema(properties={}),
        "tools.0.custom.input_schema.type: Field required",
        schema(type="object", properties={}),
    ),
    "schema is of an object": (
        schema(type="string"),
        "input_schema.type: Input should be 'object'",
        schema(type="object"),
    ),
    "schema properties are schemas": (
        schema(type="object", properties={"a": "string"}),
        "input_schema.properties.a: JSON schema is invalid",
        schema(type="object", properties={"a": {"type": "string"}}),
    ),
    "schema types are known": (
        schema(type="object", properties={"a": {"type": "text"}}),
        "properties.a.type: Input should be",
        schema(type="object", properties={"a": {"type": ["string", "null"]}}),
    ),
    "schema required is a list": (
        schema(type="object", required="a"),
        "required: Input should be a valid list",
        schema(type="object", required=["a"]),
    ),
    "no server tools": (
        plain(tools=[{"type": "web_search_20250305", "name": "web_search"}]),
        "tools.0: Input tag 'web_search_20250305'",
        plain(tools=[{**TOOL, "type": "custom"}]),
    ),
    "tool_choice needs tools": (
        plain(tool_choice={"type": "auto"}),
        "tool_choice: may only",
        tooled(tool_choice={"type": "auto"}),
    ),
    "tool_choice names a tool": (
        tooled(tool_choice={"type": "tool", "name": "x"}),
        "tool_choice.name: Tool 'x' not found",
        tooled(tool_choice={"type": "tool", "name": "bash"}),
    ),
    "forced tool_choice by model": (
        tooled(tool_choice={"type": "any"}) | {"model": "claude-opus-5-5"},
        "tool_choice: type 'any' is not supported",
        tooled(tool_choice={"type": "none"}) | {"model": "claude-opus-5-5"},
    ),
    "forced tool_choice and thinking": (
        tooled(tool_choice={"type": "any"}, thinking={"type": "adaptive"}),
        "tool_choice: Thinking may not",
        tooled(tool_choice={"type": "any"}),
    ),
    "four cache marks": (
        said(*texts(5)),
        "A maximum of 4 blocks with cache_control may be provided. Found 5.",
        said(*texts(4)),
    ),
    "the top-level mark counts": (said(*texts(4)) | EPHEMERAL, "Found 5", said(*texts(3)) | EPHEMERAL),
    "marks of system and tools count": (
        said(*texts(3)) | {"system": texts(1), "tools": [TOOL | EPHEMERAL]},
        "Found 5",
        said(*texts(2)) | {"system": texts(1), "tools": [TOOL | EPHEMERAL]},
    ),
    "long marks first": (
        said(*texts(1), *texts(1, HOUR)),
        "ttl='1h' cache_control block must not",
        said(*texts(1, HOUR), *texts(1)),
    ),
    "mark lifetimes": (
        said({"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "2h"}}),
        "cache_control.ttl: Input should be '5m' or '1h'",
        said(*texts(1, HOUR)),
    ),
    "image data is base64": (
        said(image("!!!")),
        "messages.0.content.0.source.data: invalid base64",
        said(image()),
    ),
    "image is what it says": (
        said(image(media_type="image/jpeg")),
        "does not match the provided media type",
        said(image()),
    ),
    "image types": (said(image(media_type="image/bmp")), "source.media_type: Input should be", said(image())),
    "image size": (said(image(BIG_IMAGE)), "image exceeds 10 MB", said(image())),
    "thinking is signed": (
        thought("claude-opus-5", signed="else"),
        "messages.1.content.0: Invalid `signature`",
        thought("claude-opus-5"),
    ),
    "thinking belongs to its model": (
        thought("claude-opus-5", signed_for="claude-opus-4-8"),
        "Invalid `signature` in `thinking` block",
        thought("claude-opus-4-8"),
    ),
    "thinking needs a signature": (
        then(("user", "a"), ("assistant", [{"type": "thinking", "thinking": "hm"}]), ("user", "b")),
        "messages.1.content.0.signature: Field required",
        thought("claude-opus-5"),
    ),
    "thinking is always on": (
        plain("claude-opus-5-5", thinking={"type": "disabled"}),
        "thinking.type: 'disabled'",
        plain("claude-opus-5-5", thinking={"type": "adaptive"}),
    ),
    "thinking of Fable 5 is not disabled": (
        plain("claude-fable-5", thinking={"type": "disabled"}),
        "thinking.type: 'disabled'",
        plain("claude-sonnet-5", thinking={"type": "disabled"}),
    ),
    "thinking is disabled up to high effort": (
        plain(thinking={"type": "disabled"}, output_config={"effort": "xhigh"}),
        "effort of high or below",
        plain(thinking={"type": "disabled"}, output_config={"effort": "high"}),
    ),
    "thinking budgets by model": (
        plain("claude-sonnet-5", thinking={"type": "enabled", "budget_tokens": 1024}),
        "thinking.type: 'enabled'",
        plain("claude-sonnet-4-6", thinking={"type": "enabled", "budget_tokens": 1024}),
    ),
    "thinking budget minimum": (
        plain("claude-sonnet-4-6", thinking={"type": "enabled", "budget_tokens": 1023}),
        "thinking.budget_tokens: Input should be greater",
        plain("claude-sonnet-4-6", thinking={"type": "enabled", "budget_tokens": 1024}),
    ),
    "thinking budget below max_tokens": (
        plain("claude-sonnet-4-6", thinking={"type": "enabled", "budget_tokens": 2000}),
        "`max_tokens` must be greater",
        plain("claude-sonnet-4-6", thinking={"type": "enabled", "budget_tokens": 1999}),
    ),
    "adaptive thinking by model": (
        plain("claude-haiku-4-5", thinking={"type": "adaptive"}),
        "thinking.type: adaptive",
        plain("claude-opus-4-6", thinking={"type": "adaptive"}),
    ),
    "known thinking types": (
        plain(thinking={"type": "on"}),
        "thinking: Input tag 'on'",
        plain(thinking={"type": "adaptive"}),
    ),
    "no temperature on newer models": (
        plain(temperature=0.5),
        "temperature: only its default",
        plain("claude-opus-4-8", temperature=0.5),
    ),
    "no top_k on newer models": (
        plain(top_k=5),
        "top_k: only its default",
        plain("claude-opus-4-8", top_k=5),
    ),
    "temperature range": (
        plain("claude-opus-4-8", temperature=1.5),
        "temperature: Input should be between",
        plain("claude-opus-4-8", temperature=1),
    ),
    "temperature and thinking": (
        plain("claude-opus-4-8", temperature=0.5, thinking={"type": "adaptive"}),
        "temperature: may only be set to 1",
        plain("claude-opus-4-8", temperature=1, thinking={"type": "adaptive"}),
    ),
    "fast by model": (
        plain("claude-opus-4-7", speed="fast"),
        "speed: Fast mode",
        plain("claude-opus-5", speed="fast"),
    ),
    "effort by model": (
        plain("claude-haiku-4-5", output_config={"effort": "low"}),
        "output_config.effort",
        plain("claude-haiku-5-5", output_config={"effort": "low"}),
    ),
    "known efforts": (
        plain(output_config={"effort": "huge"}),
        "output_config.effort: Input should be",
        plain(output_config={"effort": "max"}),
    ),
    "stop sequences are not empty": (
        plain(stop_sequences=[""]),
        "stop_sequences.0",
        plain(stop_sequences=["END"]),
    ),
}


async def post(scripted: Scripted, body: object, **headers: str | None) -> httpx.Response:
    sent = {"x-api-key": "k", "anthropic-version": "2023-06-01"} | {n.replace("_", "-"): v for n, v in headers.items()}
    async with httpx.AsyncClient(base_url=scripted.base_url) as http:
        content = body if isinstance(body, bytes) else None
        kept = {name: value for name, value in sent.items() if value is not None}
        return await http.post("/v1/messages", json=None if content else body, content=content, headers=kept)


@pytest.mark.parametrize("rule", RULES)
async def test_rule_refuses_the_bad_request_and_lets_its_twin_pass(scripted: Scripted, rule: str) -> None:
    bad, wanted, good = RULES[rule]
    refused = await post(scripted, bad)
    assert refused.status_code == 400, refused.text
    error = refused.json()
    assert error["type"] == "error"
    assert error["error"]["type"] == "invalid_request_error"
    assert wanted in error["error"]["message"]
    assert error["request_id"] == refused.headers["request-id"]
    passed = await post(scripted, good)
    assert passed.status_code == 200, passed.text


async def test_consecutive_messages_of_one_role_are_one_turn(scripted: Scripted) -> None:
    split = tooled() | then(
        ("user", "a"),
        ("assistant", [USE]),
        ("assistant", [SECOND]),
        ("user", [RESULT]),
        ("user", [{**RESULT, "tool_use_id": "toolu_2"}]),
    )
    assert (await post(scripted, split)).status_code == 200


async def test_thinking_is_bound_to_the_messages_before_it(scripted: Scripted) -> None:
    body = plain("claude-fable-5-1")
    first = (await post(scripted, body)).json()
    assert [block["type"] for block in first["content"]] == ["thinking", "text"]
    history = [
        *body["messages"],
        {"role": "assistant", "content": first["content"]},
        {"role": "user", "content": "go on"},
    ]
    assert (await post(scripted, body | {"messages": history})).status_code == 200
    as_blocks = copy.deepcopy(history)
    as_blocks[0]["content"] = [{"type": "text", "text": "hi", **EPHEMERAL}]
    assert (await post(scripted, body | {"messages": as_blocks})).status_code == 200
    history[0] = {"role": "user", "content": "something else"}
    assert "Invalid `signature`" in (await post(scripted, body | {"messages": history})).json()["error"]["message"]
    dropped = copy.deepcopy(history)
    del dropped[1]["content"][0]
    assert (await post(scripted, body | {"messages": dropped})).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status", "error_type"),
    [
        ({"x_api_key": None}, 401, "authentication_error"),
        ({"anthropic_version": None}, 400, "invalid_request_error"),
        ({"anthropic_version": "1999-01-01"}, 400, "invalid_request_error"),
        ({"x_api_key": None, "authorization": "Bearer k"}, 200, None),
        ({"anthropic_version": "2026-10-21", "anthropic_beta": "some-beta-2026-01-01"}, 200, None),
    ],
)
async def test_headers_are_checked(scripted: Scripted, headers: dict, status: int, error_type: str | None) -> None:
    answer = await post(scripted, plain(), **headers)
    assert answer.status_code == status
    assert answer.json().get("error", {}).get("type") == error_type


async def test_malformed_json_too_large_bodies_and_unknown_models_are_refused(scripted: Scripted) -> None:
    assert (await post(scripted, b"{")).json()["error"]["type"] == "invalid_request_error"
    assert (await post(scripted, b"[]")).status_code == 400
    large = await post(scripted, b" " * (32 * 1024 * 1024 + 1))
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")
    missing = await post(scripted, plain("claude-opus-9"))
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "model: claude-opus-9")
    assert (await post(scripted, plain("my-own-model"))).status_code == 200
    long = await post(scripted, plain("claude-haiku-4-5") | {"messages": [{"role": "user", "content": "word " * 200_000}]})
    assert "prompt is too long" in long.json()["error"]["message"]


async def test_unknown_routes_and_methods_answer_in_the_envelope(scripted: Scripted) -> None:
    async with httpx.AsyncClient(base_url=scripted.base_url) as http:
        missing = await http.get("/v1/unknown")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")
        wrong = await http.get("/v1/messages")
        assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
