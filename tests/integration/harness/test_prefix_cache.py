"""What a prefix cache serves of each request, computed from the requests that the model really got."""

from itertools import pairwise
from typing import Any

import orjson
import pytest

from managed_agents.harness.compaction import INSTRUCTION, SUMMARY_TOKENS_MAX
from managed_agents.harness.prompt import THINKING_BUDGETS
from managed_agents.scripted_model import Reply, Request, text, thinking, tool_use
from managed_agents.scripted_model.usage import prompt_parts, tokens
from tests.support.stack import TOOLSET, Stack

pytestmark = pytest.mark.anyio

SERVED_MIN = 0.95
BLOCKS_LOOKED_BACK = 20  # the API finds an entry at most this many blocks before a mark


def parts_of(request: dict[str, Any]) -> list[tuple[bytes, bool]]:
    """Every block of the prompt as bytes, and whether it is marked."""
    parts: list[tuple[bytes, bool]] = []
    for role, block in prompt_parts(request):
        bare = {name: value for name, value in block.items() if name != "cache_control"}
        parts.append((role.encode() + orjson.dumps(bare), "cache_control" in block))
    return parts


def served(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The share of `before`'s tokens that `after` reads from what `before` wrote."""
    if {key: before.get(key) for key in ("model", "thinking", "speed")} != {
        key: after.get(key) for key in ("model", "thinking", "speed")
    }:
        return 0.0
    old, new = parts_of(before), parts_of(after)
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a[0] != b[0]), min(len(old), len(new)))
    written = [i for i, (_, marked) in enumerate(old) if marked and i < same]
    looked_for = [i for i, (_, marked) in enumerate(new) if marked]
    hits = [at for at in written if any(0 <= mark - at < BLOCKS_LOOKED_BACK for mark in looked_for)]
    if not hits:
        return 0.0
    size = [tokens(part) for part, _ in old]
    return sum(size[: hits[-1] + 1]) / sum(size)


def marks(request: dict[str, Any]) -> int:
    return sum(marked for _, marked in parts_of(request)) + ("cache_control" in request)


@pytest.mark.parametrize("model", ["claude-opus-5", "claude-opus-5-5", "claude-opus-4-5"])
async def test_each_request_reads_nearly_all_of_the_one_before_from_the_cache(server: Stack, model: str) -> None:
    def reply(request: Request) -> Reply:
        match request.round:
            case 0:
                return [thinking("Let me see."), text("I look."), tool_use("bash", command="echo one")]
            case 1:
                # More results in one round than the API looks back.
                return [tool_use("bash", command=f"echo {number}") for number in range(25)]
            case _:
                return [thinking("Aha."), text("Done.")]

    session = await server.session(reply, tools=TOOLSET, model=model)
    for number in range(3):
        await server.turn(session, f"message {number}" if number else "More than is too little to be cached. " * 120)
    requests = [request.body for request in server.requests(session)]
    assert len(requests) == 9
    shares = [served(before, after) for before, after in pairwise(requests)]
    assert min(shares) >= SERVED_MIN, [round(share, 3) for share in shares]
    assert max(marks(request) for request in requests) <= 4
    # The scripted model's own cache, which knows nothing of this computation, says the same of what it read.
    ends = [event.model_usage for event in await server.history(session, types=["span.model_request_end"])]
    assert all(end.cache_read_input_tokens > end.input_tokens for end in ends[1:])


@pytest.mark.parametrize(
    ("model", "effort", "thinks"), [("claude-opus-5", "max", 0), ("claude-opus-4-5", "high", THINKING_BUDGETS["high"])]
)
async def test_the_request_for_a_summary_reads_the_conversation_from_the_cache(
    server: Stack, model: str, effort: str, thinks: int
) -> None:
    """Also with a thinking budget, which must not depend on how much a summary may say."""
    long = "All work and no play makes Jack a dull boy. " * 270

    def reply(request: Request) -> Reply:
        return "The summary." if request.last_user_text.endswith(INSTRUCTION) else [thinking("Well."), text(long)]

    session = await server.session(reply, tools=TOOLSET, model={"id": model, "effort": effort})
    for _ in range(2):
        await server.turn(session, long)
    requests = [request.body for request in server.requests(session)]
    assert len(requests) == 3
    before, summing = requests[:2]
    assert served(before, summing) >= SERVED_MIN
    budget = summing.get("thinking", {}).get("budget_tokens", 0)
    assert budget == thinks
    assert summing["max_tokens"] == SUMMARY_TOKENS_MAX + budget


async def test_sessions_of_one_agent_share_its_instructions_and_tools(server: Stack) -> None:
    agent = await server.agent(lambda _request: "ok", tools=TOOLSET)
    sessions = [await server.client.beta.sessions.create(agent=agent.id, environment_id=server.environment_id) for _ in range(2)]
    for number, session in enumerate(sessions):
        await server.turn(session, f"message {number}")
    first, second = (request.body for request in server.requests(sessions[0]))
    assert orjson.dumps([first["tools"], first["system"]]) == orjson.dumps([second["tools"], second["system"]])
    assert served(first, second) > 0.9  # all but the message
