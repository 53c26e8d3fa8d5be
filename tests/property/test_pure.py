"""Any order of sends, answers, interrupts, deaths, lost leases and jumps of the clock leaves a log that keeps every promise."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from managed_agents.core.errors import InvalidRequest
from managed_agents.harness.response import Response
from tests.property import world as w

FEW, MANY = 25, 4000
STEPS = 40
BLOCKS: dict[str, Any] = {
    "words": lambda: w.words("Hello."),
    "bash": lambda: w.call("bash", command="true"),
    "write": lambda: w.call("write", file_path="/workspace/a", content="a"),
    "weather": lambda: w.call("weather", city="Bonn"),
    "unknown": lambda: w.call("fly", to="Bonn"),
}
ANSWERS = st.one_of(
    st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3),
    st.sampled_from(["overloaded", "refusal", "max_tokens", "nothing"]),
)


class Drawn(w.Respond):
    """Answers as drawn."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def choose(self, count: int) -> int:
        return self._data.draw(st.integers(0, count - 1))

    def response(self) -> Response | None:
        drawn = self._data.draw(ANSWERS)
        match drawn:
            case "overloaded":
                return None
            case "refusal" | "max_tokens":
                return w.response(w.words("I will"), stop_reason=drawn)
            case "nothing":
                return w.response(stop_reason="end_turn")
            case _:
                return w.response(*(BLOCKS[name]() for name in drawn))


class Plain(w.Respond):
    """The model has said enough, the first call ends first."""

    def choose(self, count: int) -> int:
        return 0

    def response(self) -> Response | None:
        return w.response(w.words("Done."))


class Sessions(RuleBasedStateMachine):
    """One session, its client, and workers of which any but the newest has lost its lease."""

    def __init__(self) -> None:
        super().__init__()
        self.world = w.World()

    def send(self, *events: dict[str, Any]) -> None:
        before = (list(self.world.events), list(self.world.inbox))
        try:
            self.world.send(*events)
        except InvalidRequest:
            assert (self.world.events, self.world.inbox) == before, "a refused request left something"

    @rule()
    def message(self) -> None:
        self.send({"type": "user.message", "content": [w.words("go on")]})

    @rule()
    def interrupt(self) -> None:
        self.send({"type": "user.interrupt"})

    @rule()
    def interrupt_and_message(self) -> None:
        self.send({"type": "user.interrupt"}, {"type": "user.message", "content": [w.words("other")]})

    @precondition(lambda self: self.calls())
    @rule(data=st.data(), allow=st.booleans())
    def answer(self, data: Any, allow: bool) -> None:
        """Any call, also one that has its answer, or waits for none."""
        self.send(w.answer_of(data.draw(st.sampled_from(self.calls())), allow=allow))

    def calls(self) -> list[Any]:
        return [event for event in self.world.events if event.type in ("agent.tool_use", "agent.custom_tool_use")][-6:]

    @rule()
    def claim(self) -> None:
        self.world.claim()

    @precondition(lambda self: self.world.workers)
    @rule(data=st.data())
    def step(self, data: Any) -> None:
        """Also of a worker that does not know yet that it lost its lease."""
        workers = self.world.workers
        self.world.step(workers[data.draw(st.integers(0, len(workers) - 1))], Drawn(data))

    @precondition(lambda self: self.world.workers)
    @rule()
    def crash(self) -> None:
        owner = self.world.workers.pop()
        if self.world.row.owner == owner.id:
            self.world.free()

    @rule()
    def lose_lease(self) -> None:
        self.world.free()

    @rule(seconds=st.floats(-100, 1000))
    def clock_jumps(self, seconds: float) -> None:
        w.jump(self.world, seconds)

    @invariant()
    def keeps_its_promises(self) -> None:
        self.world.check()

    def teardown(self) -> None:
        """Left to healthy workers and a client that answers, any session comes to rest with nothing lost."""
        world = self.world
        for _ in range(400):
            w.jump(world, 1000)
            if (worker := world.claim()) is None and world.row.owner is not None:
                world.free()
                continue
            for _ in range(400):
                if worker is None or worker not in world.workers:
                    break
                world.step(worker, Plain())
            else:
                raise AssertionError("it never rests")
            settled = world.row.input_seq == world.row.handled_seq and world.row.due_at is None
            # What was sent meanwhile may wait for the answers too.
            if world.row.state.waiting and (settled or not world.inbox):
                call = next(iter(world.row.state.waiting))
                self.send(w.answer_of(next(event for event in world.events if event.id == call)))
            elif settled:
                break
        assert world.row.state.status == "idle"
        assert not world.inbox
        world.workers.clear()
        if world.events:
            statuses = [event.type for event in world.events if event.type.startswith("session.status_")]
            assert not statuses or statuses[-1] == "session.status_idle"
            world.check()


def run(examples: int, *, derandomize: bool) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Sessions,
        settings=settings(
            max_examples=examples,
            stateful_step_count=STEPS,
            deadline=None,
            derandomize=derandomize,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_session_keeps_its_promises_in_any_order_of_events() -> None:
    run(FEW, derandomize=True)


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_a_session_keeps_its_promises_in_thousands_of_runs() -> None:
    run(int(os.environ.get("MANAGED_AGENTS_TEST_RUNS", MANY)), derandomize=False)
