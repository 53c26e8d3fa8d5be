"""What sessions do while workers die: the model's script, the client's part, and how often a worker passes each fault point.

Commands count their runs in a file, so that the log itself tells of a second one. Calls side by side may share a commit: the
counts are what every run reaches.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from managed_agents.harness.compaction import INSTRUCTION
from managed_agents.scripted_model import Reply, Request, fail, text, tool_use
from tests.crash import script
from tests.crash.matrix.rig import Run
from tests.support.following import Event

SIDE = f"/workspace/{script.SIDE}"
LONG_OUTPUT = f"{script.RUN}; yes 0123456789abcdef | head -n 1500"
ALL_TOOLS: list[Any] = [{"type": "agent_toolset_20260401"}]
CUSTOM: dict[str, Any] = {"type": "custom", "name": "weather", "description": "Weather.", "input_schema": {"type": "object"}}
LOOK_SECONDS = 0.05


def toolset(default: str, **policies: str) -> dict[str, Any]:
    configs = [{"name": name, "permission_policy": {"type": policy}} for name, policy in policies.items()]
    return {
        "type": "agent_toolset_20260401",
        "default_config": {"permission_policy": {"type": default}},
        "configs": configs,
    }


async def one_turn(run: Run) -> None:
    """Says one thing and waits for the end."""
    await run.say("work")
    await run.follower.idle()


@dataclass(frozen=True)
class Scenario:
    """One way to use a session."""

    what: str
    reply: Callable[[Request], Reply]
    drive: Callable[[Run], Awaitable[None]] = one_turn
    tools: list[Any] = field(default_factory=lambda: ALL_TOOLS)
    # Whether the command that counts its runs is among the calls.
    counts: bool = True
    context_tokens: int | None = None
    # Retries are no part of the comparison: a try that a crash swallowed may have been the one that failed.
    retries: bool = False
    fields: dict[str, Any] = field(default_factory=dict[str, Any])


# plain


def greeting(_request: Request) -> Reply:
    return "Hello."


# tools


def one_after_the_other(request: Request) -> Reply:
    match request.round:
        case 0:
            return [text("On it."), tool_use("bash", command=script.RUN)]
        case 1:
            return tool_use("bash", command=f"wc -l < {SIDE}")
        case _:
            return "All done."


# confirmation


def confirming(request: Request) -> Reply:
    if request.round == 0:
        return [tool_use("bash", command=script.RUN), tool_use("write", file_path=f"/workspace/{script.NOTES}", content="x")]
    return tool_use("bash", command=f"cat {SIDE}") if request.round == 1 else "All done."


async def allow_then_deny(run: Run) -> None:
    await run.say("work")
    decisions: list[dict[str, Any]] = [{"result": "allow"}, {"result": "deny", "deny_message": "enough"}]
    for wait, decision in enumerate(decisions, 1):
        calls = await run.waited_for(wait)
        await run.send([{"type": "user.tool_confirmation", "tool_use_id": call["id"], **decision} for call in calls])
    await run.follower.idle(3)


# custom tool


def asking_for_weather(request: Request) -> Reply:
    if request.round > 0:
        return "All done."
    cities = [tool_use("weather", city=city) for city in ("Bonn", "Ulm")]
    return [text("On it."), tool_use("bash", command=script.RUN), *cities]


async def tell_weather(run: Run) -> None:
    """Answers one call at a time, the last one first."""
    await run.say("work")
    for wait in (1, 2):
        call = (await run.waited_for(wait))[-1]
        content = [{"type": "text", "text": f"sunny in {call['input']['city']}"}]
        await run.send([{"type": "user.custom_tool_result", "custom_tool_use_id": call["id"], "content": content}])
    await run.follower.idle(3)


# interrupt


def gated_then_look(request: Request) -> Reply:
    if request.turn == 1:
        return tool_use("bash", command=script.GATED)
    return tool_use("bash", command=f"wc -l < {SIDE}") if request.round == 0 else "Seen."


async def interrupt_the_command(run: Run) -> None:
    await run.say("work")
    await run.appeared(script.SIDE)
    await run.send([{"type": "user.interrupt"}])
    await run.follower.idle()
    await run.say("look")
    await run.follower.idle(2)


def turning_around(request: Request) -> Reply:
    if request.turn == 1:
        return tool_use("bash", command="echo never >> /workspace/never")
    return tool_use("glob", pattern="/workspace/*") if request.round == 0 else "Turned."


async def turn_around(run: Run) -> None:
    await run.say("work")
    await run.waited_for(1)
    await run.send([{"type": "user.interrupt"}, {"type": "user.message", "content": [{"type": "text", "text": "no, look"}]}])
    await run.follower.idle(3)


# auto


def judging(request: Request) -> Reply:
    if request.judging is not None:
        return "DENY" if "rm " in str(request.judging.input) else "ALLOW"
    if request.round == 0:
        return [tool_use("bash", command=script.RUN), tool_use("bash", command="rm -rf /")]
    return "All done."


# retry


def failing_once(request: Request) -> Reply:
    if request.round == 0:
        return fail(529) if request.attempt == 1 else [text("On it."), tool_use("bash", command=script.RUN)]
    return "All done."


async def hurried_turn(run: Run) -> None:
    """The time of each retry comes at once."""
    async with anyio.create_task_group() as group:

        async def hurry() -> None:
            while True:
                await run.jump_to_retry()
                await anyio.sleep(LOOK_SECONDS)

        group.start_soon(hurry)
        # Other words in each session: to the model it is another request, with tries of its own.
        await run.say(f"work on {run.session_id}")
        await run.follower.idle()
        group.cancel_scope.cancel()


# compaction


def growing(request: Request) -> Reply:
    """One result that fills the context, a summary, and a look at what was done before it."""
    if request.last_user_text.endswith(INSTRUCTION):
        return "The command has run."
    if "The command has run." in request.user_texts[0]:
        return tool_use("bash", command=f"cat {SIDE}") if request.round == 0 else "All done."
    return [text("On it."), tool_use("bash", command=LONG_OUTPUT)]


# budget


def costly(request: Request) -> Reply:
    """An answer that costs more than the cap, with a call that still runs."""
    return [text("word " * 2000), tool_use("bash", command=script.RUN)] if request.round == 0 else "All done."


async def raise_the_cap(run: Run) -> None:
    await run.say("work")
    await run.follower.idle()
    await run.rig.client.beta.sessions.update(run.session_id, budget=budget(1000))
    await run.follower.idle(2)


def budget(cents: int) -> dict[str, Any]:
    return {"type": "limit", "max_list_cost": {"amount": str(cents), "currency": "USD"}}


def without_retries(events: list[Event]) -> list[Event]:
    """Without what tells of a retry: its error, the reschedule, and the pair that opens the next running period."""
    kept: list[Event] = []
    again = False
    for event in events:
        kind = event["type"]
        if kind.endswith("status_rescheduled"):
            again = True
        elif again and kind.endswith("status_running"):
            again = kind == "session.status_running"
        elif kind != "session.error" or event["error"]["retry_status"]["type"] != "retrying":
            kept.append(event)
    return kept


SCENARIOS: dict[str, Scenario] = {
    "plain": Scenario("a message and an answer", greeting, tools=[], counts=False),
    "tools": Scenario("two commands, one after the other, and an output file", one_after_the_other),
    "parallel tools": Scenario("a command beside a file's writing, then a look at both", script.work),
    "confirmation": Scenario(
        "a call allowed beside one that runs at once, a call denied",
        confirming,
        allow_then_deny,
        [toolset("always_allow", bash="always_ask")],
    ),
    "custom tool": Scenario(
        "a command beside two calls for the client, answered one at a time",
        asking_for_weather,
        tell_weather,
        [CUSTOM, toolset("always_allow")],
    ),
    "interrupt": Scenario("a running command is interrupted, and another turn follows", gated_then_look, interrupt_the_command),
    "interrupted wait": Scenario(
        "an interrupt and a new message instead of an answer",
        turning_around,
        turn_around,
        [toolset("always_allow", bash="always_ask")],
        counts=False,
    ),
    "policy auto": Scenario("one call allowed and one denied by the judge", judging, tools=[toolset("auto")]),
    "retry": Scenario("the model is overloaded once", failing_once, hurried_turn, retries=True),
    "compaction": Scenario("the context is full after a command", growing, context_tokens=12_000),
    "budget": Scenario(
        "a turn stops at the session's cap, and goes on when that is raised", costly, raise_the_cap, fields={"budget": budget(5)}
    ),
}

# How often an undisturbed run passes each point at least, one column a scenario in the order of `SCENARIOS`.
PASSED: dict[str, tuple[int, ...]] = {
    "worker.registered": (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    "worker.claimed": (1, 1, 1, 3, 3, 2, 2, 1, 2, 1, 2),
    "turn.loaded": (1, 1, 1, 3, 3, 2, 2, 1, 2, 1, 2),
    "turn.answers_logged": (0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0),
    "turn.closed": (0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0),
    "turn.request_logged": (1, 3, 3, 3, 2, 3, 3, 2, 3, 4, 2),
    "turn.response_arrived": (1, 3, 3, 3, 2, 3, 3, 2, 2, 4, 2),
    "turn.before_judging": (0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0),
    "turn.calls_judged": (0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0),
    "turn.response_logged": (1, 3, 3, 3, 2, 3, 3, 2, 2, 4, 2),
    "hands.bound": (0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    "hands.created": (0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    "hands.recorded": (0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
    "hands.attached": (0, 0, 0, 2, 2, 1, 0, 0, 0, 0, 0),
    "hands.before_call": (0, 2, 3, 2, 1, 2, 1, 1, 1, 2, 1),
    "turn.outcome_arrived": (0, 2, 3, 2, 1, 1, 1, 1, 1, 2, 1),
    "turn.outcome_logged": (0, 2, 3, 3, 1, 1, 1, 2, 1, 2, 1),
    "hands.acknowledged": (0, 2, 3, 2, 1, 1, 1, 1, 1, 2, 1),
    "hands.cancelled": (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0),
    "hands.output_stored": (0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1),
    "hands.output_recorded": (0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1),
    "turn.before_idle": (1, 1, 1, 3, 3, 1, 2, 1, 1, 1, 2),
    "append.before_write": (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1),
    "append.before_commit": (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1),
    "append.before_known": (3, 7, 8, 12, 8, 7, 9, 6, 7, 9, 6),
    "batch.committed": (3, 7, 8, 12, 8, 8, 9, 6, 7, 9, 7),
    "hints.before": (3, 7, 8, 12, 8, 8, 9, 6, 7, 9, 7),
}


def points(scenario: str) -> dict[str, int]:
    """The fault points that a scenario reaches, and how often."""
    column = list(SCENARIOS).index(scenario)
    return {point: counts[column] for point, counts in PASSED.items() if counts[column]}
