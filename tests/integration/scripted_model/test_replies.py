"""What the scripted model answers, read by the official client with strict response validation."""

import anyio
import httpx
import pytest
from anthropic import APIStatusError, AsyncAnthropic

from managed_agents.scripted_model import (
    Request,
    broken_tool_use,
    cut,
    fail,
    pace,
    refuse,
    stall,
    stop_reason,
    text,
    thinking,
    tool_use,
)

from .conftest import Scripted

pytestmark = pytest.mark.anyio
BASH = {"name": "bash", "input_schema": {"type": "object"}}
HI = [{"role": "user", "content": "hi"}]


async def test_streams_are_the_real_event_sequence(scripted: Scripted, client: AsyncAnthropic) -> None:
    scripted.reply = lambda _: [
        thinking("Let me look."),
        text("I will look."),
        tool_use("bash", command="ls -la /workspace"),
    ]
    names, pinged = [], []
    async with client.messages.with_streaming_response.create(
        model="claude-opus-5", max_tokens=1000, messages=HI, tools=[BASH], stream=True
    ) as response:
        assert response.headers["request-id"].startswith("req_")
        async for line in response.iter_lines():
            if line.startswith("event: "):
                (pinged if line == "event: ping" else names).append(line[7:])
    assert pinged == ["ping"]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    squeezed = [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    assert squeezed == ["message_start", *block, *block, *block, "message_delta", "message_stop"]

    async with client.messages.stream(model="claude-opus-5", max_tokens=1000, messages=HI, tools=[BASH]) as stream:
        events = [event async for event in stream]
        message = await stream.get_final_message()
    assert message.stop_reason == "tool_use"
    assert [b.type for b in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[2].input == {"command": "ls -la /workspace"}
    assert message.content[2].id.startswith("toolu_")
    assert message.id.startswith("msg_")
    assert len([e for e in events if e.type == "content_block_delta" and e.delta.type == "input_json_delta"]) > 2
    assert len({e.delta.type for e in events if e.type == "content_block_delta"}) == 4


async def test_what_came_back_may_be_sent_back(scripted: Scripted, client: AsyncAnthropic) -> None:
    scripted.reply = lambda r: (
        [thinking("hm"), tool_use("bash", command="ls")] if r.round == 0 else [text(r.tool_results[0].text)]
    )
    for model in ("claude-opus-5-5", "claude-fable-5-1", "claude-opus-5"):
        first = await client.messages.create(model=model, max_tokens=1000, messages=HI, tools=[BASH])
        assert first.content[0].thinking == ("" if model == "claude-opus-5-5" else "hm")
        result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "a.txt"}
        messages = [*HI, first.to_param(), {"role": "user", "content": [result]}]
        second = await client.messages.create(model=model, max_tokens=1000, messages=messages, tools=[BASH])
        assert second.content[0].text == "a.txt"


async def test_errors_are_answers_and_later_ones_events(scripted: Scripted, client: AsyncAnthropic) -> None:
    for status, kind in [
        (429, "rate_limit_error"),
        (500, "api_error"),
        (529, "overloaded_error"),
        (402, "billing_error"),
    ]:
        scripted.reply = lambda _, status=status: fail(status, retry_after=7)
        with pytest.raises(APIStatusError) as caught:
            await client.messages.create(model="claude-opus-5", max_tokens=10, messages=HI)
        assert (caught.value.status_code, caught.value.type) == (status, kind)
        assert caught.value.response.headers["retry-after"] == "7"
    scripted.reply = lambda _: [text("so far"), fail(529)]
    with pytest.raises(APIStatusError) as caught:
        async with client.messages.stream(model="claude-opus-5", max_tokens=10, messages=HI) as stream:
            await stream.until_done()
    assert caught.value.type == "overloaded_error"


async def test_the_same_request_is_known_to_be_a_retry(scripted: Scripted, client: AsyncAnthropic) -> None:
    scripted.reply = lambda r: fail(529) if r.attempt <= 2 else text(f"attempt {r.attempt}")
    for _ in range(2):
        with pytest.raises(APIStatusError):
            await client.messages.create(model="claude-opus-5", max_tokens=10, messages=HI)
    message = await client.messages.create(model="claude-opus-5", max_tokens=10, messages=HI)
    assert message.content[0].text == "attempt 3"


async def test_refusals_stop_reasons_limits_and_stop_sequences(scripted: Scripted, client: AsyncAnthropic) -> None:
    async def ask(**more: object):
        return await client.messages.create(**{"model": "claude-opus-5", "max_tokens": 1000, "messages": HI} | more)

    scripted.reply = lambda _: [text("I can"), refuse("cyber", "No.")]
    refused = await ask()
    assert (refused.stop_reason, refused.stop_details.category) == ("refusal", "cyber")
    scripted.reply = lambda _: refuse()
    assert (await ask()).content == []
    scripted.reply = lambda _: [text("a"), stop_reason("pause_turn")]
    assert (await ask()).stop_reason == "pause_turn"
    scripted.reply = lambda _: "word " * 100
    short = await ask(max_tokens=5)
    assert (short.stop_reason, short.content[0].text) == ("max_tokens", "word word word word ")
    stopped = await ask(stop_sequences=["d w"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == (
        "stop_sequence",
        "d w",
        "wor",
    )
    empty = await ask(max_tokens=0)
    assert (empty.stop_reason, empty.content) == ("max_tokens", [])
    scripted.reply = lambda _: [thinking("hm"), text("a")]
    assert [b.type for b in (await ask(thinking={"type": "disabled"})).content] == ["text"]


async def test_a_wrong_script_is_a_500_that_says_what(scripted: Scripted, client: AsyncAnthropic) -> None:
    def raises(_: Request) -> object:
        raise KeyError("oops")

    wrong = [
        (raises, "KeyError"),
        (lambda _: 3, "int"),
        (lambda _: [], "empty list"),
        (lambda _: text(" "), "some text"),
        (lambda _: broken_tool_use("bash", "{"), "stream"),
    ]
    for reply, wanted in wrong:
        scripted.reply = reply
        with pytest.raises(APIStatusError, match=wanted) as caught:
            await client.messages.create(model="claude-opus-5", max_tokens=10, messages=HI)
        assert caught.value.status_code == 500


async def test_usage_follows_the_prompt_cache(scripted: Scripted, client: AsyncAnthropic) -> None:
    big = [{"type": "text", "text": "x" * 8000, "cache_control": {"type": "ephemeral"}}]

    async def ask(said: str, **more: object):
        messages = [{"role": "user", "content": said}]
        return (await client.messages.create(model="claude-opus-5", max_tokens=99, system=big, messages=messages, **more)).usage

    first, second = await ask("one"), await ask("two")
    assert first.cache_read_input_tokens == 0
    assert first.cache_creation_input_tokens == first.cache_creation.ephemeral_5m_input_tokens > 2000
    assert second.cache_read_input_tokens == first.cache_creation_input_tokens
    assert second.cache_creation_input_tokens == 0
    assert second.input_tokens == first.input_tokens
    third = await ask("three", cache_control={"type": "ephemeral", "ttl": "5m"})
    assert third.cache_read_input_tokens == first.cache_creation_input_tokens
    assert third.cache_creation_input_tokens > 0
    assert third.input_tokens == 0
    counted = await client.messages.count_tokens(model="claude-opus-5", system=big, messages=[{"role": "user", "content": "one"}])
    assert counted.input_tokens == first.input_tokens + first.cache_creation_input_tokens
    short = await client.messages.create(model="claude-opus-5", max_tokens=9, messages=HI, cache_control={"type": "ephemeral"})
    assert short.usage.cache_creation_input_tokens == 0


async def test_models_are_listed_with_limits(client: AsyncAnthropic) -> None:
    listed = [model async for model in client.models.list(limit=5)]
    assert len({model.id for model in listed}) == len(listed) > 15
    assert all(model.max_tokens and model.max_input_tokens and model.capabilities for model in listed)
    haiku = await client.models.retrieve("claude-haiku-4-5-20251001")
    assert (haiku.max_input_tokens, haiku.max_tokens, haiku.display_name) == (
        200_000,
        64_000,
        "Claude Haiku 4.5",
    )
    with pytest.raises(APIStatusError):
        await client.models.retrieve("claude-nothing")


async def test_a_cut_ends_the_connection_inside_the_message(scripted: Scripted, client: AsyncAnthropic) -> None:
    for reply in (
        [text("half"), cut(), text("never")],
        [text("a whole sentence of text"), cut(after_events=3)],
        [cut()],
    ):
        scripted.reply = lambda _, reply=reply: reply
        body = {"model": "claude-opus-5", "max_tokens": 10, "messages": HI, "stream": True}
        async with httpx.AsyncClient(base_url=scripted.base_url) as http:
            with pytest.raises(httpx.RemoteProtocolError):
                await http.post("/v1/messages", json=body, headers={"x-api-key": "k", "anthropic-version": "2023-06-01"})
    assert [record["state"] for record in await scripted.records(3, "cut")] == ["cut"] * 3


async def test_a_client_that_leaves_is_noticed(scripted: Scripted, client: AsyncAnthropic) -> None:
    scripted.reply = lambda _: [text("half"), stall(600), text("never")]
    async with client.messages.stream(model="claude-opus-5", max_tokens=100, messages=HI) as stream:
        async for event in stream:
            if event.type == "text":
                break
    assert (await scripted.records(1, "disconnected"))[0]["status"] == 200
    scripted.reply = lambda _: [stall(600), text("never")]
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            await client.messages.create(model="claude-opus-5", max_tokens=100, messages=HI)

        tasks.start_soon(ask)
        await scripted.records(2)
        tasks.cancel_scope.cancel()
    await scripted.records(2, "disconnected")


async def test_paced_deltas_come_one_by_one(scripted: Scripted) -> None:
    scripted.reply = lambda _: [pace(chars_per_second=400), text("0123456789" * 4)]
    body = {"model": "claude-opus-5", "max_tokens": 100, "messages": HI, "stream": True}
    chunks = []
    async with httpx.AsyncClient(base_url=scripted.base_url) as http:
        headers = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
        async with http.stream("POST", "/v1/messages", json=body, headers=headers) as response:
            began = anyio.current_time()
            async for chunk in response.aiter_bytes():
                chunks.append(chunk)
    assert sum(chunk.count(b"text_delta") for chunk in chunks) == 5
    assert anyio.current_time() - began >= 0.08


async def test_records_show_what_was_asked_but_no_key(scripted: Scripted, client: AsyncAnthropic) -> None:
    await client.messages.create(model="claude-opus-5", max_tokens=10, messages=HI, extra_headers={"anthropic-beta": "b-1"})
    (record,) = await scripted.records(1, "finished")
    assert record["body"]["messages"] == HI
    assert record["betas"] == "b-1"
    assert record["path"] == "/v1/messages"
    assert not {"authorization", "x-api-key"} & set(scripted.seen[0].headers)


async def test_the_beta_route_is_the_same(scripted: Scripted, client: AsyncAnthropic) -> None:
    message = await client.beta.messages.create(
        model="claude-opus-5",
        max_tokens=99,
        messages=HI,
        betas=["x-2026-01-01"],
        extra_query={"beta": "true"},
    )
    assert message.content[-1].text == "You said: hi"
    assert (await scripted.records(1))[0]["query"] == "beta=true"


async def test_the_built_in_script_takes_commands(scripted: Scripted, client: AsyncAnthropic) -> None:
    messages = [{"role": "user", "content": "think: first a look\nrun: ls\nsay: that was it"}]
    first = await client.messages.create(model="claude-opus-5", max_tokens=99, messages=messages, tools=[BASH])
    assert [b.type for b in first.content] == ["thinking", "tool_use"]
    assert first.content[1].input == {"command": "ls"}
    result = {"type": "tool_result", "tool_use_id": first.content[1].id, "content": "a.txt"}
    messages += [first.to_param(), {"role": "user", "content": [result]}]
    second = await client.messages.create(model="claude-opus-5", max_tokens=99, messages=messages, tools=[BASH])
    assert second.content[0].text == "that was it"


async def test_hundreds_of_streams_at_once(scripted: Scripted, client: AsyncAnthropic) -> None:
    scripted.reply = lambda _: [stall(0.2), text("a"), stall(0.3), text("b")]
    done = []

    async def one() -> None:
        message = await client.messages.create(model="claude-opus-5", max_tokens=10, messages=HI)
        done.append(message)

    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            for _ in range(300):
                tasks.start_soon(one)
    assert len(done) == 300
