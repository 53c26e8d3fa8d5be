"""A session, its log and its workers in memory, for a state machine: the real rules, fold, guards and decisions, no processes.

The API side is `inputs.accept`, writes are `Head.append` behind `Append.stage`, workers are `Context`s that `decide` for; what
is ours here is the table (a list), and the loop, cut into steps between any two of which a worker may die or lose its lease.
"""

import copy
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any, cast

from managed_agents.core import ids, limits
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog import fold
from managed_agents.eventlog.batch import Append, Rest
from managed_agents.eventlog.events import NewEvent, QueuedEvent, SpanUsage, StoredEvent
from managed_agents.eventlog.fold import SessionState, ThreadState
from managed_agents.harness import decide as steps
from managed_agents.harness.context import Context
from managed_agents.harness.response import Response, events_of
from managed_agents.harness.transcript import Transcript
from managed_agents.resources.sessions import inputs
from managed_agents.resources.sessions.schemas import SendEvents
from tests.support.invariants import check_history

THREAD, NAME = "sthr_1", "tester"
CUSTOM: dict[str, Any] = {"type": "custom", "name": "weather", "description": "Weather.", "input_schema": {"type": "object"}}
TOOLS: list[dict[str, Any]] = [
    CUSTOM,
    {
        "type": "agent_toolset_20260401",
        "default_config": {"enabled": True, "permission_policy": {"type": "always_allow"}},
        "configs": [{"name": "write", "enabled": True, "permission_policy": {"type": "always_ask"}}],
    },
]


@dataclass
class Worker:
    """One owner's memory: all of it is lost when it dies."""

    id: str
    epoch: int
    context: Context
    asked: str | None = None  # the span of a model request under way
    calling: set[str] = field(default_factory=set[str])
    calls: int = 0

    def append(self, events: Sequence[NewEvent], **more: Any) -> Append:
        return Append("sesn_1", events, self.id, self.epoch, **more)


class Tables:
    """Answers the statements of `inputs.accept`."""

    def __init__(self, world: "World") -> None:
        self._world = world

    async def execute(self, statement: Any, values: dict[str, Any]) -> Any:
        if statement is inputs._QUEUED_ANSWERS:
            wanted = ("user.interrupt", "user.tool_confirmation")
            return [event for event in self._world.inbox if event.type in wanted]
        if statement is inputs._ANSWERED:
            answered = [e for e in self._world.events if e.type == "user.custom_tool_result"]
            found = any(event.json()["custom_tool_use_id"] == values["use"] for event in answered)
            return SimpleNamespace(scalar_one=lambda: found)
        assert statement is inputs._MODEL
        return SimpleNamespace(scalar_one=lambda: "claude-opus-5")


class World:
    """The database as one session sees it, and everybody who has ever claimed it."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)
        self.row = log.Head(
            id="sesn_1",
            workspace_id="wrkspc_1",
            primary_thread_id=THREAD,
            agent_name=NAME,
            at=self.now,
            archived=False,
            deleted=False,
            epoch=0,
            budget_cents=None,
            last_seq=0,
            last_processed_at=None,
            last_inbox_seq=0,
            inbox_count=0,
            input_seq=0,
            handled_seq=0,
            due_at=None,
            not_before=None,
            crashes=0,
            owner=None,
            state=SessionState(),
            loaded=(),
            threads={THREAD: ThreadState()},
        )
        self.events: list[StoredEvent] = []
        self.private: list[NewEvent] = []
        self.inbox: list[QueuedEvent] = []
        self.workers: list[Worker] = []
        self.executed: dict[str, int] = {}

    # Transactions

    def lock(self) -> log.Head:
        """The row as read under its lock."""
        head = copy.deepcopy(self.row)
        head.at, head.events, head.queued, head.taken = self.now, [], [], []
        return head

    def commit(self, head: log.Head) -> None:
        """Write what is staged, all or nothing, by the rules of the tables."""
        taken = set(head.taken)
        assert taken <= {event.id for event in self.inbox}, "taken up twice"
        for new, stored, _ in head.events:
            assert stored.seq == len(self.events) + 1, "seq has a gap"
            assert stored.id not in {event.id for event in self.events}, "an event is in the log twice"
            self.events.append(stored)
            self.private.append(new)
        self.inbox = [event for event in self.inbox if event.id not in taken] + head.queued
        assert head.inbox_count == len(self.inbox)
        self.row = head

    def append(self, group: Append) -> list[StoredEvent]:
        """One append of a worker."""
        head = self.lock()
        group.stage(head)
        self.commit(head)
        return group.stored

    # The API

    def send(self, *events: dict[str, Any]) -> None:
        """One request of the client. Raises InvalidRequest."""
        head = self.lock()
        _now(inputs.accept(cast("Any", Tables(self)), head, SendEvents.model_validate({"events": list(events)}).events))
        self.commit(head)

    # Workers

    def claim(self) -> Worker | None:
        """Claim the session as `lease.claim` would."""
        row = self.row
        due = row.due_at is not None and row.due_at <= self.now
        if row.owner is not None or not (row.input_seq > row.handled_seq or due):
            return None
        row.epoch += 1
        row.owner = f"wrk_{row.epoch}"
        context = Context("sesn_1", row.input_seq, self._due_in(), Transcript)
        context.extend(self.events)
        context.inbox = list(self.inbox)
        worker = Worker(row.owner, row.epoch, context)
        self.workers.append(worker)
        return worker

    def free(self) -> None:
        """What other workers do when the owner is dead, or seems to be."""
        if self.row.owner is not None:
            self.row.owner = None
            self.row.epoch += 1

    def step(self, worker: Worker, respond: "Respond") -> None:
        """Go on to the next append. Raises LeaseLost where another one owns the session."""
        try:
            self._step(worker, respond)
        except log.NewInput:
            pass
        except log.LeaseLost:
            assert (self.row.owner, self.row.epoch) != (worker.id, worker.epoch), "the owner was refused"
            self.workers.remove(worker)
            return
        if self.row.owner != worker.id:
            self.workers.remove(worker)
            return
        self._refresh(worker)

    def _log(self, worker: Worker, events: Sequence[NewEvent], **more: Any) -> None:
        stored = self.append(worker.append(events, **more))
        taken = {event.id for event in stored}
        worker.context.inbox = [event for event in worker.context.inbox if event.id not in taken]
        worker.context.extend(self.events[worker.context.turn.seq :])

    def _rest(
        self, worker: Worker, events: Sequence[NewEvent], taken: Sequence[QueuedEvent] = (), due: float | None = None
    ) -> None:
        self.append(worker.append(events, rest=Rest(due), taken=taken, expect_input_seq=worker.context.input_seq))

    def _refresh(self, worker: Worker) -> None:
        context = worker.context
        context.due_in_seconds = self._due_in()
        if self.row.input_seq != context.input_seq:
            context.extend(self.events[context.turn.seq :])
            context.inbox = list(self.inbox)
            context.input_seq = self.row.input_seq

    def _step(self, worker: Worker, respond: "Respond") -> None:
        context = worker.context
        if worker.asked is not None:
            return self._answered(worker, worker.asked, respond)
        step = steps.decide(context.turn, context.inbox, due_in_seconds=context.due_in_seconds)
        match step:
            case steps.CloseSpan(start_id):
                self._log(worker, [ev.span_end(THREAD, start_id, SpanUsage(), is_error=True, private={"cut": True})])
            case steps.Interrupt():
                self._interrupt(worker, step)
            case steps.TakeAnswers():
                self._log(worker, _opening(step.opens_period) + _taken(step.taken), taken=step.taken)
            case steps.RunTools():
                self._call(worker, step, respond)
            case steps.RequestModel():
                start = ev.span_start(THREAD)
                self._log(worker, [*_opening(step.opens_period), *_taken(step.taken), start], taken=step.taken)
                worker.asked = start.id
            case steps.GoIdle():
                reason: dict[str, Any] = {"type": step.stop_reason}
                if step.event_ids:
                    reason["event_ids"] = list(step.event_ids)
                idle = [*_opening(step.opens_period), *_taken(step.taken), *ev.idle(THREAD, NAME, reason, step.stop_details)]
                if step.more:
                    self._log(worker, idle + _opening(True), taken=step.taken)
                else:
                    self._rest(worker, idle, step.taken)
            case steps.Park(seconds):
                self._rest(worker, [], due=seconds)
            case steps.Rest():
                self._rest(worker, [])
            case steps.StopExhausted():
                self._exhausted(worker, step.error_type)
            case steps.Compact():
                raise AssertionError("the context is never full here")
        return None

    def _call(self, worker: Worker, step: steps.RunTools, respond: "Respond") -> None:
        """One of the calls ends; a sandbox runs each id once, whoever asks."""
        call = step.calls[respond.choose(len(step.calls))]
        if call.refused is None:
            self.executed.setdefault(call.event_id, 0)
            if call.event_id not in worker.calling:
                self.executed[call.event_id] = 1
                worker.calling.add(call.event_id)
                return self._log(worker, []) if respond.choose(2) else None
        content = [{"type": "text", "text": call.refused or "done"}]
        return self._log(worker, [ev.tool_result(THREAD, call.event_id, content, is_error=call.refused is not None)])

    def _interrupt(self, worker: Worker, step: steps.Interrupt) -> None:
        content = [{"type": "text", "text": "interrupted"}]
        events = [ev.tool_result(THREAD, call.event_id, content, is_error=True) for call in step.calls] + _taken(step.taken)
        if step.ends_turn:
            events += ev.idle(THREAD, NAME, {"type": "end_turn"})
        if not step.more:
            return self._rest(worker, events, step.taken)
        more = {"taken": step.taken, "expect_input_seq": worker.context.input_seq}
        return self._log(worker, events + _opening(step.ends_turn), **more)

    def _answered(self, worker: Worker, start_id: str, respond: "Respond") -> None:
        context = worker.context
        if any(queued.type == "user.interrupt" for queued in context.inbox):
            worker.asked = None
            return self._log(worker, [ev.span_end(THREAD, start_id, SpanUsage(), is_error=True, private={"cut": True})])
        response = respond.response()
        if response is not None:
            worker.asked = None
            return self._log(worker, events_of(response, THREAD, start_id, TOOLS))
        if context.turn.failures + 1 >= limits.MODEL_TRIES_MAX:
            worker.asked = None
            return self._exhausted(worker, "model_overloaded_error")
        told = [ev.session_error(THREAD, "model_overloaded_error", "busy", "retrying")] * (not context.turn.failure_told)
        closing = ev.span_end(THREAD, start_id, SpanUsage(), is_error=True)
        return self._rest(worker, [closing, *told, *ev.rescheduled(THREAD, NAME)], due=1.0)

    def _exhausted(self, worker: Worker, error_type: str) -> None:
        turn, inbox = worker.context.turn, list(worker.context.inbox)
        events = [ev.span_end(THREAD, turn.open_span, SpanUsage(), is_error=True)] if turn.open_span else []
        content = [{"type": "text", "text": "interrupted"}]
        events += [ev.tool_result(THREAD, call_id, content, is_error=True) for call_id in turn.pending]
        events.append(ev.session_error(THREAD, error_type, "no more", "exhausted"))
        events += [queued.taken_up(for_model=False) for queued in inbox]
        self._rest(worker, events + ev.idle(THREAD, NAME, {"type": "retries_exhausted"}), inbox)

    def _due_in(self) -> float | None:
        return None if self.row.due_at is None else (self.row.due_at - self.now).total_seconds()

    # What holds at any time

    def bodies(self) -> list[dict[str, Any]]:
        return [event.json() for event in self.events]

    def check(self, *, at_rest: bool = False) -> None:
        check_history(self.bodies(), at_rest=at_rest)
        state, thread = SessionState(), ThreadState()
        for new, stored in zip(self.private, self.events, strict=True):
            at = datetime.fromisoformat(stored.json()["processed_at"])
            fold.apply(state, thread, new.type, at, new.usage)
            fold.apply_call(state, new.type, new.id, new.tool_use_id, new.awaits)
        assert (state, thread) == (self.row.state, self.row.threads[THREAD]), "the fold of the log is not the row"
        assert all(times == 1 for times in self.executed.values()), "a tool ran twice"
        for worker in self.workers:
            again = Context("sesn_1", 0, None, Transcript)
            again.extend(self.events[: worker.context.turn.seq])
            assert again.turn == worker.context.turn, "a new owner would decide otherwise"
            assert again.transcript.for_request() == worker.context.transcript.for_request()


class Respond:
    """What the world outside does: chosen by the test."""

    def choose(self, count: int) -> int:
        raise NotImplementedError

    def response(self) -> Response | None:
        """The model's answer; None: it is overloaded."""
        raise NotImplementedError


def response(*blocks: dict[str, Any], stop_reason: str = "end_turn") -> Response:
    usage = {"input_tokens": 5, "output_tokens": 7}
    calls = any(block["type"] == "tool_use" for block in blocks)
    return Response(blocks, usage, "claude-opus-5", "tool_use" if calls else stop_reason, None, None, {})


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def call(name: str, **values: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": ids.new_id("toolu_"), "name": name, "input": values}


def jump(world: World, seconds: float) -> None:
    """The database's clock jumps, back too."""
    world.now += timedelta(seconds=seconds)


def _opening(opens: bool) -> list[NewEvent]:
    return ev.running(THREAD, NAME) if opens else []


def _taken(queued: Iterable[QueuedEvent]) -> list[NewEvent]:
    return [event.taken_up() for event in queued]


def _now(work: Coroutine[Any, Any, Any]) -> Any:
    """Run what never waits."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def answer_of(event: StoredEvent, *, allow: bool = True) -> dict[str, Any]:
    """A client's answer to a call that waits for it."""
    if event.type == "agent.custom_tool_use":
        content = [{"type": "text", "text": "sunny"}]
        return {"type": "user.custom_tool_result", "custom_tool_use_id": event.id, "content": content}
    return {"type": "user.tool_confirmation", "tool_use_id": event.id, "result": "allow" if allow else "deny"}
