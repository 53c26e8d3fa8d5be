"""Budgets: a session stops where its list cost reaches the cap, and goes on when that is raised or removed."""

from decimal import Decimal
from typing import Any

import anthropic
import pytest
from sqlalchemy import text as sql

from managed_agents.scripted_model import Request, text, tool_use
from tests.support.stack import TOOLSET, Gate, Stack, message
from tests.support.watch import Watch

pytestmark = pytest.mark.anyio

LONG = "word " * 2000  # 2,500 tokens: 6.25 cents of this model's output


def budget(cents: int | str) -> dict[str, Any]:
    return {"type": "limit", "max_list_cost": {"amount": str(cents), "currency": "USD"}}


def stops(watch: Watch) -> list[tuple[str, str]]:
    kinds = ("session.thread_status_idle", "session.status_idle")
    return [(event.type, event.stop_reason.type) for event in watch.logged if event.type in kinds]


async def exact(server: Stack, session: Any) -> Decimal:
    """What the session has cost, in cents, less its running time."""
    async with server.db.transaction() as tx:
        row = (await tx.execute(sql("SELECT token_cost FROM sessions WHERE id = :id"), {"id": session.id})).one()
    return row.token_cost * 100


@pytest.mark.requirement("SES-101", "SES-102")
async def test_a_turn_is_paused_before_the_request_that_would_exceed_the_cap(server: Stack) -> None:
    replies = [[text(LONG), tool_use("bash", command="echo ran")], "finished"]
    session = await server.session(replies, tools=TOOLSET, budget=budget(5))
    assert session.budget.to_dict() == budget(5)
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        # The crossing request finishes, its tool runs, its result is recorded; the model is not asked again.
        assert watch.types[-4:] == [
            "agent.tool_result",
            "session.thread_status_idle",
            "session.usage",
            "session.status_idle",
        ]
        assert stops(watch) == [("session.thread_status_idle", "budget_reached"), ("session.status_idle", "budget_reached")]
        usage = watch.logged[-2]
        assert usage.budget.to_dict() == budget(5)
        assert int(usage.usage.list_cost.amount) == round(await exact(server, session))
        assert len(server.requests(session)) == 1

        await server.client.beta.sessions.update(session.id, budget=budget(1000))
        await watch.idle(2)
    assert len(server.requests(session)) == 2
    after = watch.types[watch.types.index("session.updated") :]
    assert after[:4] == [
        "session.updated",
        "session.status_running",
        "session.thread_status_running",
        "span.model_request_start",
    ]
    assert watch.logged[-1].stop_reason.type == "end_turn"
    assert watch.logged[-2].budget.to_dict() == budget(1000)
    updated = next(event for event in watch.logged if event.type == "session.updated")
    assert updated.budget.to_dict() == budget(1000)
    assert [e.to_dict() for e in await server.history(session)] == [e.to_dict() for e in watch.logged]


@pytest.mark.requirement("SES-170")
async def test_calls_are_not_judged_beyond_the_cap(server: Stack) -> None:
    """Not behind the response that crossed it, and not behind the judgement that did."""
    auto = [{**TOOLSET[0], "default_config": {"permission_policy": {"type": "auto"}}}]
    calls = [tool_use("bash", command="echo one"), tool_use("bash", command="echo two")]

    def crossing(request: Request) -> Any:
        return "ALLOW" if request.judging is not None else [text(LONG), *calls]

    def judge_crossing(request: Request) -> Any:
        return f"{LONG}\nALLOW" if request.judging is not None else calls

    for reply, permissions in ((crossing, ["deny", "deny"]), (judge_crossing, ["allow", "deny"])):
        session = await server.session(reply, tools=auto, budget=budget(5))
        watch = await server.turn(session)
        uses = [event for event in watch.logged if event.type == "agent.tool_use"]
        assert [use.evaluated_permission for use in uses] == permissions
        assert uses[1].evaluation.evaluated_permission.to_dict() == {"type": "deny", "reason_code": "indeterminate"}
        assert watch.logged[-1].stop_reason.type == "budget_reached"
        assert len(server.requests(session)) == 1 + permissions.count("allow")


@pytest.mark.requirement("SES-103")
async def test_a_turn_that_ends_beyond_the_cap_is_done_and_the_session_takes_nothing_more(server: Stack) -> None:
    session = await server.session([LONG, "more"], budget=budget(5))
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        assert stops(watch) == [("session.thread_status_idle", "end_turn"), ("session.status_idle", "budget_reached")]
        said = await server.refused("POST", f"/v1/sessions/{session.id}/events", json={"events": [message("again")]})
        assert "user.tool_confirmation" in said
        assert "budget" in said
        before = await server.history(session)
        interrupt = {"events": [{"type": "user.interrupt"}]}
        answer = await server.raw("POST", f"/v1/sessions/{session.id}/events", json=interrupt)
        assert (answer.status_code, len(answer.json()["data"])) == (200, 1)
        assert await server.history(session) == before
        # Nothing is owed: a raised cap starts nothing by itself.
        raised = await server.client.beta.sessions.update(session.id, budget=budget(500))
        assert raised.status == "idle"
        await server.say(session, "again")
        await watch.idle(2)
    assert watch.logged[-1].stop_reason.type == "end_turn"


@pytest.mark.requirement("SES-104")
async def test_a_removed_budget_never_comes_back(server: Stack) -> None:
    session = await server.session([[text(LONG), tool_use("bash", command="true")], "finished"], tools=TOOLSET, budget=budget(1))
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        freed = await server.client.beta.sessions.update(session.id, budget=None)
        assert freed.budget is None
        await watch.idle(2)
    assert watch.logged[-1].stop_reason.type == "end_turn"
    updated = next(event for event in watch.logged if event.type == "session.updated")
    assert updated.to_dict()["budget"] is None
    said = await server.refused("POST", f"/v1/sessions/{session.id}", json={"budget": budget(10_000)})
    assert "budget_create_only" in said
    never = await server.session()
    assert "budget_create_only" in await server.refused("POST", f"/v1/sessions/{never.id}", json={"budget": budget(10_000)})


@pytest.mark.requirement("SES-105")
async def test_a_cap_is_above_what_was_spent(server: Stack) -> None:
    session = await server.session([LONG], budget=budget(100))
    await server.turn(session)
    spent = int(await exact(server, session))
    update = f"/v1/sessions/{session.id}"
    for low in (1, spent):
        said = await server.refused("POST", update, json={"budget": budget(low)})
        assert said == "budget.max_list_cost must be greater than the session's consumed list cost"
    lowered = await server.client.beta.sessions.update(session.id, budget=budget(spent + 5))
    assert lowered.budget is not None
    assert lowered.budget.max_list_cost.amount == str(spent + 5)
    assert lowered.status == "idle"


@pytest.mark.requirement("SES-106")
@pytest.mark.parametrize("amount", ["0", "-1", "1.5", "007", "", "1e3", " 5", 5, None, "9" * 40])
async def test_amounts_are_whole_cents(server: Stack, amount: Any) -> None:
    agent = await server.agent()
    body = {
        "agent": agent.id,
        "environment_id": server.environment_id,
        "budget": {"type": "limit", "max_list_cost": {"amount": amount, "currency": "USD"}},
    }
    assert (await server.refused("POST", "/v1/sessions", json=body)).startswith("budget.max_list_cost.amount")
    body["budget"]["max_list_cost"] = {"amount": "5", "currency": "EUR"}
    assert (await server.refused("POST", "/v1/sessions", json=body)).startswith("budget.max_list_cost.currency")


@pytest.mark.requirement("SES-107")
async def test_a_model_without_a_price_has_no_budget(server: Stack) -> None:
    agent = await server.client.beta.agents.create(name="own", model="my-own-model")
    with pytest.raises(anthropic.BadRequestError, match="model_not_budgetable"):
        await server.client.beta.sessions.create(agent=agent.id, environment_id=server.environment_id, budget=budget(5))


async def test_messages_that_wait_at_the_cap_are_answered_when_it_is_raised(server: Stack, held: Gate) -> None:
    replies = [[text(LONG), tool_use("bash", command=held.command)], "both"]
    session = await server.session(replies, tools=TOOLSET, budget=budget(100))
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await server.say(session, "and this")
        async with server.db.transaction() as tx:
            # As if running time, which nobody can hurry, had used up the rest.
            await tx.execute(sql("UPDATE sessions SET budget_cents = 1 WHERE id = :id"), {"id": session.id})
        await server.refused("POST", f"/v1/sessions/{session.id}/events", json={"events": [message("too late")]})
        held.open()
        await watch.idle()
        assert watch.logged[-1].stop_reason.type == "budget_reached"
        assert "user.message" in watch.types[watch.types.index("agent.tool_result") :]
        stored = await server.client.beta.sessions.retrieve(session.id)
        assert stored.status == "idle"
        await server.client.beta.sessions.update(session.id, budget=budget(1000))
        await watch.idle(2)
    assert "and this" in str(server.requests(session)[-1].messages[-1])
    assert watch.logged[-1].stop_reason.type == "end_turn"


async def test_raising_a_cap_in_mid_turn_lets_it_go_on(server: Stack, held: Gate) -> None:
    replies = [[text(LONG), tool_use("bash", command=held.command)], "finished"]
    session = await server.session(replies, tools=TOOLSET, budget=budget(2))
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await server.client.beta.sessions.update(session.id, budget=budget(1000))
        held.open()
        await watch.idle()
    assert watch.types.count("session.status_running") == 1
    assert watch.logged[-1].stop_reason.type == "end_turn"


async def test_a_paused_session_can_be_archived(server: Stack) -> None:
    session = await server.session([[text(LONG), tool_use("bash", command="true")]], tools=TOOLSET, budget=budget(1))
    await server.turn(session)
    archived = await server.client.beta.sessions.archive(session.id)
    assert archived.status == "terminated"
    assert archived.budget is not None


async def test_interrupts_at_the_cap_end_what_waits_and_are_ignored_where_nothing_does(server: Stack) -> None:
    """A call that waits for its client is closed; the paused turn behind it ends, and a raised cap begins nothing."""
    tools: list[Any] = [{"type": "custom", "name": "ask", "description": "Ask.", "input_schema": {"type": "object"}}]
    session = await server.session([[text(LONG), tool_use("ask")], "finished"], tools=tools, budget=budget(5))
    interrupt: Any = {"type": "user.interrupt"}
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await watch.idle()
        assert stops(watch)[-1] == ("session.status_idle", "requires_action")
        await server.client.beta.sessions.events.send(session.id, events=[interrupt])
        await watch.idle(2)
        assert watch.types[-5:] == [
            "agent.tool_result",
            "user.interrupt",
            "session.thread_status_idle",
            "session.usage",
            "session.status_idle",
        ]
        assert stops(watch)[-1] == ("session.status_idle", "end_turn")
        logged = len(watch.logged)
        (echo,) = (await server.client.beta.sessions.events.send(session.id, events=[interrupt])).data
        assert echo.processed_at is None
        await server.client.beta.sessions.update(session.id, budget=budget(1000))
        await server.say(session, "now")
        await watch.idle(3)
    assert watch.types[logged:].count("user.interrupt") == 0
    assert stops(watch)[-1] == ("session.status_idle", "end_turn")


async def test_an_interrupt_while_a_tool_runs_beyond_the_cap_ends_the_turn(server: Stack, held: Gate) -> None:
    replies = [[text(LONG), tool_use("bash", command=held.command)], "finished"]
    session = await server.session(replies, tools=TOOLSET, budget=budget(2))
    async with server.watching(session) as watch:
        await server.say(session, "go")
        await held.started()
        await server.client.beta.sessions.events.send(session.id, events=[{"type": "user.interrupt"}])
        await watch.idle()
    assert stops(watch) == [("session.thread_status_idle", "end_turn"), ("session.status_idle", "end_turn")]
    assert watch.types.count("span.model_request_start") == 1
    assert [e.to_dict() for e in await server.history(session)] == [e.to_dict() for e in watch.logged]
