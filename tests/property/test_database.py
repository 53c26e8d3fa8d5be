"""On a real database: any order of sends, answers, updates, deaths, lost leases and jumps of its clock keeps every promise.

What holds at any time is in `check_history` and `check_rows`: no gaps, the rows are the fold of the log, each call gets one
result before the model is asked again. Beyond that: who lost the lease writes nothing, a refused request leaves nothing,
terminated stays terminated, what was streamed is what is listed, and no secret is in the log.
"""

import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import anyio
import pytest
from anyio.from_thread import start_blocking_portal
from hypothesis import HealthCheck, Phase, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from managed_agents.db import databases
from managed_agents.scripted_model import cut, fail, refuse, stop_reason, text, tool_use
from tests.property import server as s
from tests.support import sessions

FEW, MANY = 18, 2500
STEPS = 30
SEED = 20261121
CUSTOM: dict[str, Any] = {"type": "custom", "name": "weather", "description": "Weather.", "input_schema": {"type": "object"}}


def toolset(policy: str, *, enabled: bool = True) -> dict[str, Any]:
    """Only the search, which needs no sandbox."""
    config = {"name": "web_search", "enabled": enabled, "permission_policy": {"type": policy}}
    return {"type": "agent_toolset_20260401", "default_config": {"enabled": False}, "configs": [config]}


TOOLS: list[list[dict[str, Any]]] = [
    [CUSTOM, toolset("always_allow")],
    [CUSTOM, toolset("always_ask")],
    [toolset("always_allow", enabled=False), CUSTOM],
    [CUSTOM],
]
REPLIES: dict[str, Callable[[], Any]] = {
    "words": lambda: "Done.",
    "search": lambda: [text("Let me see."), tool_use("web_search", query="cats")],
    "two searches": lambda: [tool_use("web_search", query="cats"), tool_use("web_search", query="dogs")],
    "weather": lambda: tool_use("weather", city="Bonn"),
    "both": lambda: [tool_use("weather", city="Bonn"), tool_use("web_search", query="cats")],
    "unknown": lambda: tool_use("fly", to="Bonn"),
    "blank query": lambda: tool_use("web_search", query=" "),
    "overloaded": lambda: fail(529),
    "cut": lambda: [text("I will"), cut()],
    "refusal": refuse,
    "max_tokens": lambda: [text("I will"), stop_reason("max_tokens")],
}
POINTS = [
    "turn.request_logged",
    "turn.response_arrived",
    "turn.response_logged",
    "turn.outcome_arrived",
    "turn.outcome_logged",
    "turn.answers_logged",
    "turn.closed",
    "turn.before_idle",
]
HAPPENINGS = ["say", "interrupt", "answer", "lose_lease", "bug", "back", "drain"]
# What is drawn must not depend on what the server did, whose timing is real: one of however many there are then.
PICK = st.integers(0, 5)
COMMIT_POINTS = ["append.before_write", "append.before_commit", "append.before_known", "batch.committed"]


def message(words: str) -> dict[str, Any]:
    return {"type": "user.message", "content": [{"type": "text", "text": words}]}


def answer_of(event: dict[str, Any], *, allow: bool = True) -> dict[str, Any]:
    if event["type"] == "agent.custom_tool_use":
        content = [{"type": "text", "text": "sunny"}]
        return {"type": "user.custom_tool_result", "custom_tool_use_id": event["id"], "content": content}
    return {"type": "user.tool_confirmation", "tool_use_id": event["id"], "result": "allow" if allow else "deny"}


class Sessions(RuleBasedStateMachine):
    """One session, its client, and workers of which any but the newest has lost its lease."""

    make: Callable[[], s.Session]

    def __init__(self) -> None:
        super().__init__()
        self.session = type(self).make()
        self.logged: list[dict[str, Any]] = []
        assert self.session.update(agent={"tools": TOOLS[0]})

    # The client

    @rule(words=st.sampled_from(["go on", "and then"]))
    def say(self, words: str) -> None:
        self.session.send(message(words))

    @rule()
    def interrupt(self) -> None:
        self.session.send({"type": "user.interrupt"})

    @rule()
    def interrupt_and_say(self) -> None:
        self.session.send({"type": "user.interrupt"}, message("something else"))

    @rule()
    def say_with_instructions(self) -> None:
        self.session.send(message("go on"), {"type": "system.message", "content": [{"type": "text", "text": "Be brief."}]})

    @rule(pick=PICK, allow=st.booleans())
    def answer(self, pick: int, allow: bool) -> None:
        """Any call, also one that has its answer, or waits for none."""
        if calls := self.calls():
            self.session.send(answer_of(calls[pick % len(calls)], allow=allow))

    @rule(tools=st.sampled_from(TOOLS))
    def change_tools(self, tools: list[Any]) -> None:
        self.session.update(agent={"tools": tools})

    @rule(title=st.sampled_from(["one", "two", None]), value=st.sampled_from(["x", None]))
    def rename(self, title: str | None, value: str | None) -> None:
        self.session.update(title=title, metadata={"key": value})

    @rule(really=st.integers(0, 9))
    def archive(self, really: int) -> None:
        if really == 9:
            self.session.archive()

    # Workers

    @rule(works=st.lists(st.tuples(PICK, st.sampled_from(sorted(REPLIES))), min_size=1, max_size=4))
    def work(self, works: list[tuple[int, str]]) -> None:
        """Also of a worker that does not know yet that it lost its lease."""
        for pick, reply in works:
            if (worker := self.worker(pick)) is not None:
                self.session.server.model.reply = REPLIES[reply]()
                self.session.step(worker)

    @rule(pick=PICK, reply=st.sampled_from(sorted(REPLIES)), point=st.sampled_from(POINTS + COMMIT_POINTS))
    def die_at_work(self, pick: int, reply: str, point: str) -> None:
        if (worker := self.worker(pick)) is not None:
            self.session.server.model.reply = REPLIES[reply]()
            self.session.step(worker, point)

    @rule(pick=PICK, reply=st.sampled_from(sorted(REPLIES)), point=st.sampled_from(POINTS), happening=st.sampled_from(HAPPENINGS))
    def something_happens_at_work(self, pick: int, reply: str, point: str, happening: str) -> None:
        """At that very moment: between two commits of one worker."""
        if (worker := self.worker(pick)) is None:
            return
        calls = self.calls()

        def happens() -> None:
            match happening:
                case "say":
                    self.session.send(message("quick"))
                case "interrupt":
                    self.session.send({"type": "user.interrupt"})
                case "answer" if calls:
                    self.session.send(answer_of(calls[-1]))
                case "lose_lease":
                    self.session.api_portal.call(self.session.server.free_elsewhere)
                case "bug":
                    raise KeyError("a bug")
                case "back":
                    self.session.api_portal.call(self.session.server.jump, -50.0)
                case "drain":
                    worker.runner.drain()
                case _:
                    pass

        self.session.server.model.reply = REPLIES[reply]()
        self.session.step(worker, point, happens)

    def worker(self, pick: int) -> s.Process | None:
        """One of those that are at work, mostly the owner; where there is none, whoever claims the session."""
        processes = self.session.processes
        if not processes:
            return self.session.claim()
        return processes[-1 - pick % len(processes)]

    @rule(pick=PICK)
    def crash(self, pick: int) -> None:
        if self.session.processes and (worker := self.worker(pick)) is not None:
            self.session.kill(worker)

    @rule()
    def lose_lease(self) -> None:
        """To another worker, who goes on at once."""
        if self.session.processes:
            self.session.lose_lease()
            self.session.claim()

    @rule(seconds=st.sampled_from([-100.0, -1.0, 2.0, 90.0, 90.0, 90.0]))
    def clock_jumps(self, seconds: float) -> None:
        self.session.api_portal.call(self.session.server.jump, seconds)

    def calls(self) -> list[dict[str, Any]]:
        return [event for event in self.logged if event["type"] in ("agent.tool_use", "agent.custom_tool_use")][-6:]

    @invariant()
    def keeps_its_promises(self) -> None:
        self.logged = self.session.check()

    def teardown(self) -> None:
        # Hypothesis shows only what it can make happen again, and the timing of the server is real.
        if isinstance(error := sys.exception(), Exception) and not isinstance(error, HypothesisException):
            traceback.print_exception(error)
        try:
            self.come_to_rest()
        except Exception:
            traceback.print_exc()
            raise

    def come_to_rest(self) -> None:
        """Left to healthy workers and a client that answers, any session comes to rest with nothing lost."""
        session = self.session
        try:
            session.server.model.reply = "Done."
            for _ in range(60):
                session.api_portal.call(session.server.jump, 1000.0)
                if not session.processes:
                    session.claim()
                for _ in range(60):
                    if not session.processes:
                        break
                    session.step(session.processes[-1])
                else:
                    raise AssertionError("it never rests")
                row = session.api_portal.call(session.rows)
                self.logged = session.check()
                waiting = self.waiting()
                settled = row.owner is None and row.handled_seq == row.input_seq and row.due_at is None
                if settled and not session.processes:
                    if not waiting:
                        break
                    assert session.send(answer_of(waiting[0]))
            else:
                raise AssertionError("it never comes to rest")
            self.logged = session.check(at_rest=True)
            session.check_stream(self.logged)
        finally:
            session.close()

    def waiting(self) -> list[dict[str, Any]]:
        """The calls that the newest idle event names."""
        idles = [event for event in self.logged if event["type"].startswith("session.status_")]
        if not idles or idles[-1]["type"] != "session.status_idle":
            return []
        wanted = idles[-1]["stop_reason"].get("event_ids", [])
        return [event for event in self.logged if event["id"] in wanted]


@pytest.fixture
def machine(postgres_url: str, template: str) -> Iterator[type[Sessions]]:
    """The state machine on a database of its own, for both threads."""
    name = f"test_{os.urandom(6).hex()}"
    url = anyio.run(databases.create_database, postgres_url, name, template)
    try:
        anyio.run(s.own_clock, url)
        with ExitStack() as stack:
            options = {"backend_options": {"use_uvloop": True}}
            api_portal = stack.enter_context(start_blocking_portal(**options))
            worker_portal = stack.enter_context(start_blocking_portal(**options))
            side = stack.enter_context(api_portal.wrap_async_context_manager(s.api(url)))
            workspace_id = api_portal.call(sessions.workspace, side[0])
            made = stack.enter_context(worker_portal.wrap_async_context_manager(s.server(url, side, workspace_id)))

            def make() -> s.Session:
                session_id, thread_id, stream = api_portal.call(s.new_session, made, side)
                return s.Session(made, api_portal, worker_portal, session_id, thread_id, stream)

            yield type("Sessions", (Sessions,), {"make": staticmethod(make)})
    finally:
        anyio.run(databases.drop_database, postgres_url, name)


def run(machine: type[Sessions], examples: int, seed: int) -> None:
    print(f"seed {seed} (MANAGED_AGENTS_TEST_SEED repeats it)")
    run_state_machine_as_test(
        seeded(seed)(machine),
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_session_in_a_real_database_keeps_its_promises(machine: type[Sessions]) -> None:
    run(machine, FEW, int(os.environ.get("MANAGED_AGENTS_TEST_SEED", SEED)))


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_session_in_a_real_database_keeps_its_promises_in_thousands_of_runs(machine: type[Sessions]) -> None:
    examples = int(os.environ.get("MANAGED_AGENTS_TEST_RUNS", MANY))
    run(machine, examples, int(os.environ.get("MANAGED_AGENTS_TEST_SEED", random.SystemRandom().getrandbits(32))))
