"""The turn loop: read the log, decide, act, append; until there is nothing to do.

One runner owns one claimed session. Whatever ends it, what it has appended stands, and the next owner goes on from there.
Appends are shielded: a cancelled append might still be written, and the result of a call must never be written twice.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskGroup
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from managed_agents.core import faults, limits
from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.eventlog import interest
from managed_agents.eventlog.append import BudgetReached, NewInput
from managed_agents.eventlog.batch import Append, Appender, Rest
from managed_agents.eventlog.events import NewEvent, QueuedEvent, SpanUsage, StoredEvent
from managed_agents.eventlog.previews import PreviewSender
from managed_agents.harness import decide as steps
from managed_agents.harness import lease
from managed_agents.harness.brain import STANDARD, Harness
from managed_agents.harness.context import Context
from managed_agents.harness.hands import Hands, SessionHands
from managed_agents.harness.judge import Judge
from managed_agents.harness.lease import Claim
from managed_agents.harness.permissions import Judgement
from managed_agents.harness.preview import Preview
from managed_agents.harness.prompt import Brief
from managed_agents.harness.request import Failed, Finished, ModelRequester
from managed_agents.harness.response import Response, compacted, events_of, judged_calls
from managed_agents.harness.tools import definitions
from managed_agents.harness.tools.web import WebTools
from managed_agents.harness.turn import ToolCall, snapshot
from managed_agents.harness.web_calls import WebCalls
from managed_agents.sandbox.backend import Outcome

logger = logging.getLogger(__name__)
T = TypeVar("T")

TURN_LOADED = faults.register("turn.loaded", "session claimed and read, nothing decided")
REQUEST_LOGGED = faults.register("turn.request_logged", "span opened in the log, request not sent")
RESPONSE_ARRIVED = faults.register("turn.response_arrived", "response complete, not in the log")
CALLS_JUDGED = faults.register("turn.calls_judged", "policy auto decided, response not in the log")
RESPONSE_LOGGED = faults.register("turn.response_logged", "response in the log, no tool started")
OUTCOME_ARRIVED = faults.register("turn.outcome_arrived", "tool finished, result not in the log")
OUTCOME_LOGGED = faults.register("turn.outcome_logged", "result in the log, not acknowledged to the sandbox")
ANSWERS_LOGGED = faults.register("turn.answers_logged", "the client's decisions in the log, nothing done about them")
TURN_CLOSED = faults.register("turn.closed", "interrupt and idle in the log, the next turn not begun")
BEFORE_IDLE = faults.register("turn.before_idle", "turn over, idle not in the log")

CUT: ev.Json = {"cut": True}  # the private part of a span that ended by a crash or an interrupt
INTERRUPTED = "Tool execution was interrupted before completion. Please retry."  # observed
_HAS_INTERRUPT = text("SELECT EXISTS (SELECT 1 FROM inbox WHERE session_id = :session_id AND type = 'user.interrupt')")


@dataclass(frozen=True, slots=True)
class Parts:
    """What every runner of a worker shares."""

    db: Database
    appender: Appender
    requester: ModelRequester
    hands: Hands
    # By name; `STANDARD` is among them.
    harnesses: Mapping[str, Harness]
    previews: PreviewSender
    web: WebTools
    jitter: Callable[[], float]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A model request under way."""

    start_id: str
    preview: Preview
    judgements: dict[int, Judgement] = field(default_factory=dict[int, Judgement])


class SessionRunner:
    """Runs one claimed session until it rests, or the lease is lost."""

    def __init__(self, parts: Parts, claim: Claim, worker_id: str) -> None:
        self.claim = claim
        self._parts = parts
        self.worker_id = worker_id
        # It stopped between two steps, and the session is still ours.
        self.handed_over = False
        self._draining = False
        self._thread_id = claim.thread_id
        self._agent = self._servable(claim.agent)
        # One that asks for a harness we do not have is only told so.
        self._harness = parts.harnesses.get(claim.harness or STANDARD, parts.harnesses[STANDARD])
        self._context = Context(claim.session_id, claim.input_seq, claim.due_in_seconds, self._harness.transcript())
        self._brief: Brief | None = None
        self._changed = anyio.Event()  # new input, or a call has ended
        self._hands: SessionHands = parts.hands.of_session(claim)
        self._web = WebCalls(parts.web, parts.db, claim, self._agent, self._hands)
        self._background: TaskGroup | None = None
        self._prepared = False
        self._offers_sandbox = definitions.offers_sandbox(self._agent["tools"])

    def notify(self) -> None:
        """New input arrived for this session."""
        self._changed.set()

    def drain(self) -> None:
        """Stop after the step at hand; the session is to be given back."""
        self._draining = True

    async def run(self) -> None:
        """Run to rest, or until told to drain (`handed_over` says so).

        Raises (perhaps in a group):
            LeaseLost, SessionGone, AppendUncertain, SQLAlchemyError: stop; the log is what it is.
        """
        async with anyio.create_task_group() as group:
            self._background = group
            group.start_soon(self._hands.keep_safe)
            try:
                await self._run()
            finally:
                group.cancel_scope.cancel()
        await self._hands.aclose()

    async def _run(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._context.load, self._parts.db)
            group.start_soon(self._learn)
        faults.reach(TURN_LOADED)
        if self.claim.crashes >= limits.CRASHES_MAX:
            await self._stop("unknown_error", "The server failed repeatedly while running this turn. Send a message to retry.")
            return
        if self.claim.harness not in (None, *self._parts.harnesses):
            await self._stop("unknown_error", f'This server has no harness "{self.claim.harness}".')
            return
        context = self._context
        before = (context.turn.seq, context.input_seq, context.at_cap)
        while not await self._step():
            await context.refresh(self._parts.db)
            after = (context.turn.seq, context.input_seq, context.at_cap)
            # A step that changes nothing would be decided for ever.
            assert after != before, f"no progress at event {context.turn.seq}"
            before = after
            if self._draining and isinstance(self._decide(), (steps.RequestModel, steps.Compact, steps.RunTools)):
                # What is about to rest does so here: it is one append away.
                self.handed_over = True
                return

    async def record_crash(self) -> None:
        """Give the session up after a failure of our own, so that the next try waits a little longer."""
        await self._append([], rest=Rest(crashed=True))

    async def _step(self) -> bool:
        """Do one step; says whether the session is at rest."""
        try:
            return await self._act(self._decide())
        except BudgetReached:
            self._context.at_cap = True
            return False

    async def _act(self, step: steps.Step) -> bool:
        if isinstance(step, (steps.RequestModel, steps.Compact, steps.TakeAnswers)) and step.opens_period:
            await self._reload_agent()
        match step:
            case steps.CloseSpan(start_id):
                await self._log([self._failed_span(start_id, CUT)])
            case steps.Interrupt():
                return await self._interrupt(step)
            case steps.TakeAnswers():
                await self._take_answers(step)
            case steps.RunTools():
                await self._run_tools(step)
            case steps.RequestModel():
                return await self._request_model(step)
            case steps.Compact():
                return await self._compact(step)
            case steps.StopExhausted():
                return await self._stop(step.error_type, step.message)
            case steps.GoIdle():
                await self._harvest()
                faults.reach(BEFORE_IDLE)
                return await self._go_idle(step)
            case steps.Park(seconds):
                return await self._rest([], Rest(due_in_seconds=seconds))
            case steps.Rest():
                return await self._rest([], Rest())
        return False

    def _servable(self, agent: dict[str, Any]) -> dict[str, Any]:
        """The agent with the tools that this worker can run."""
        return {**agent, "tools": definitions.available(agent["tools"], self._parts.web.missing)}

    async def _reload_agent(self) -> None:
        """While the session was idle its tools may have been updated; they count from this turn on."""
        async with self._parts.db.autocommit() as tx:
            agent = self._servable(await lease.current_agent(tx, self.claim.session_id))
        if agent != self._agent:
            self._agent = agent
            self._offers_sandbox = definitions.offers_sandbox(agent["tools"])
            self._web = WebCalls(self._parts.web, self._parts.db, self.claim, agent, self._hands)
            await self._learn()

    def _decide(self) -> steps.Step:
        context = self._context
        assert self._brief is not None
        return self._harness.decide(
            context.turn,
            context.inbox,
            due_in_seconds=context.due_in_seconds,
            context_full=context.transcript.is_full(self._brief, context.inbox),
            at_cap=context.at_cap,
        )

    async def _go_idle(self, step: steps.GoIdle) -> bool:
        stop_reason: dict[str, Any] = {"type": step.stop_reason}
        if step.event_ids:
            stop_reason["event_ids"] = step.event_ids
        events = [*self._opening(step.opens_period), *(queued.taken_up() for queued in step.taken)]
        events += self._idle(stop_reason, step.stop_details, step.of_session)
        # A session at its cap says so: a turn that ends as if below it is decided again when that is not true any more.
        ends_below = step.stop_reason == "end_turn" and step.of_session is None
        return await self._rest(events, Rest(), step.taken, within_budget=ends_below)

    async def _harvest(self) -> None:
        if self._context.turn.called_tools:
            await self._hands.harvest()

    def _prepare_hands(self) -> None:
        if not self._prepared and self._offers_sandbox:
            assert self._background is not None
            self._prepared = True
            self._background.start_soon(self._hands.prepare)

    # Appending

    async def _append(
        self,
        events: Sequence[NewEvent],
        *,
        taken: Sequence[QueuedEvent] = (),
        rest: Rest | None = None,
        expect_input_seq: int | None = None,
        within_budget: bool = False,
    ) -> list[StoredEvent]:
        append = Append(
            self.claim.session_id,
            events,
            self.worker_id,
            self.claim.epoch,
            expect_input_seq=expect_input_seq,
            within_budget=within_budget,
            taken=taken,
            rest=rest,
        )
        with anyio.CancelScope(shield=True):
            await self._parts.appender.append(append)
        return append.stored

    async def _log(
        self,
        events: Sequence[NewEvent],
        taken: Sequence[QueuedEvent] = (),
        *,
        expect_input_seq: int | None = None,
        within_budget: bool = False,
    ) -> list[StoredEvent]:
        stored = await self._append(events, taken=taken, expect_input_seq=expect_input_seq, within_budget=within_budget)
        await self._context.follow(self._parts.db, stored)
        return stored

    async def _rest(
        self, events: Sequence[NewEvent], rest: Rest, taken: Sequence[QueuedEvent] = (), *, within_budget: bool = False
    ) -> bool:
        """Append the resting step on the input it was decided on; False when that has moved."""
        expected = self._context.input_seq
        try:
            await self._append(events, taken=taken, rest=rest, expect_input_seq=expected, within_budget=within_budget)
        except NewInput:
            return False
        return True

    # The model

    async def _learn(self) -> None:
        """Find out what requests are built from beside the log."""
        rules = await self._parts.requester.rules(self._agent["model"]["id"])
        self._brief = Brief(self._agent, rules, await self._uploads())

    async def _uploads(self) -> list[str]:
        # Only a session with tools tells the model of its files.
        return [upload.path for upload in await self._hands.uploads(self._context.input_seq)] if self._offers_sandbox else []

    async def _request_model(self, step: steps.RequestModel) -> bool:
        def answered(response: Response, asked: _Asked) -> list[NewEvent]:
            tools, told = self._agent["tools"], asked.preview.event_ids
            return events_of(response, self._thread_id, asked.start_id, tools, asked.judgements, event_ids=told)

        return await self._ask(step.opens_period, step.taken, self._context.transcript.request, answered)

    async def _compact(self, step: steps.Compact) -> bool:
        transcript = self._context.transcript

        def body(brief: Brief) -> ev.Json:
            return transcript.compaction(brief, briefly=step.briefly)

        def summarised(response: Response, asked: _Asked) -> list[NewEvent]:
            assert self._brief is not None
            kept = transcript.checkpoint(self._brief, response.content)
            checkpoint = None if kept is None else {**kept, "turn": snapshot(self._context.turn)}
            return compacted(response, self._thread_id, asked.start_id, checkpoint)

        return await self._ask(step.opens_period, (), body, summarised, own=True)

    async def _ask(
        self,
        opens_period: bool,
        taken: Sequence[QueuedEvent],
        body: Callable[[Brief], ev.Json],
        events: Callable[[Response, _Asked], list[NewEvent]],
        *,
        own: bool = False,
    ) -> bool:
        """Open a span, ask the model with `body`, and append what `events` makes of the answer in one append.

        `own`: the answer is for the harness itself. Clients see no previews of it, and what it calls is not run.
        """
        start = ev.span_start(self._thread_id)
        opening = self._opening(opens_period)
        asking = [*opening, *(queued.taken_up() for queued in taken), start]
        stored = await self._log(asking, taken, within_budget=True)
        faults.reach(REQUEST_LOGGED)
        self._prepare_hands()
        assert self._brief is not None
        self._brief = replace(self._brief, uploads=await self._uploads())
        request = body(self._brief)
        asked = _Asked(start.id, self._preview(stored[-1].seq, shown=not own))

        async def ask() -> Finished | Failed:
            outcome = await self._parts.requester.send(request, self._agent["model"], watch=asked.preview.take)
            if isinstance(outcome, Finished) and not own:
                asked.judgements.update(await self._judge(outcome.response, request["messages"]))
            return outcome

        outcome = await self._until_interrupted(ask)
        match outcome:
            case Finished(response):
                faults.reach(RESPONSE_ARRIVED)
                await self._log(events(response, asked))
                faults.reach(RESPONSE_LOGGED)
            case Failed(too_long=True):
                # Not a try that failed: a shorter one may do.
                await self._log([self._failed_span(start.id, {"too_long": True})])
            case Failed():
                return await self._model_failed(start.id, outcome)
            case None:
                await self._log([self._failed_span(start.id, CUT)])
        return False

    async def _judge(self, response: Response, messages: Sequence[dict[str, Any]]) -> dict[int, Judgement]:
        if not (calls := judged_calls(response, self._agent["tools"])):
            return {}
        requester = self._parts.requester
        judge = Judge(requester.client, requester.models, self._parts.jitter)
        judgements = await judge.judge(self._agent, messages, calls)
        faults.reach(CALLS_JUDGED)
        return judgements

    def _preview(self, span_seq: int, *, shown: bool) -> Preview:
        """Begin the previews of the request whose start is in the log; whether anyone wants them is asked beside it."""
        preview = Preview(self.claim.session_id, self._thread_id, span_seq, self._parts.previews.push)
        if not shown:
            preview.decide(False)
            return preview
        assert self._background is not None
        self._background.start_soon(self._ask_interest, preview)
        return preview

    async def _ask_interest(self, preview: Preview) -> None:
        try:
            async with self._parts.db.autocommit() as tx:
                preview.decide(await interest.wanted(tx, self.claim.session_id))
        except (SQLAlchemyError, OSError, TimeoutError) as error:
            # No previews for this request: nothing depends on them.
            logger.warning("interest in previews of %s not known: %s", self.claim.session_id, type(error).__name__)
            preview.decide(False)

    async def _model_failed(self, start_id: str, failed: Failed) -> bool:
        """Reschedule, or give the turn up. Ends at rest unless an interrupt came meanwhile."""
        failures = self._context.turn.failures + 1
        told = self._context.turn.failure_told
        logger.warning(
            "model request of %s failed (%d of %d): %s",
            self.claim.session_id,
            failures,
            limits.MODEL_TRIES_MAX,
            failed.message,
        )
        if not failed.retryable or failures >= limits.MODEL_TRIES_MAX:
            return await self._stop(failed.error_type, failed.message)
        # One `retrying` error per streak; the reschedule itself is visible each time.
        error = [ev.session_error(self._thread_id, failed.error_type, failed.message, "retrying")]
        wait = steps.backoff_seconds(failures, self._parts.jitter(), failed.retry_after_seconds)
        closing = self._failed_span(start_id)
        parked = [closing, *([] if told else error), *ev.rescheduled(self._thread_id, self._agent["name"])]
        while not await self._rest(parked, Rest(due_in_seconds=wait)):
            await self._context.refresh(self._parts.db)
            if any(queued.type == "user.interrupt" for queued in self._context.inbox):
                await self._log([closing])
                return False
        return True

    async def _stop(self, error_type: str, message: str) -> bool:
        """Give the turn up: close what is open, tell why, flush what waits, go idle."""
        await self._harvest()
        while True:
            turn, inbox = self._context.turn, list(self._context.inbox)
            events = [self._failed_span(turn.open_span)] if turn.open_span else []
            events += [self._interrupted_result(call) for call in turn.pending.values()]
            events.append(ev.session_error(self._thread_id, error_type, message, "exhausted"))
            events += [queued.taken_up(for_model=False) for queued in inbox]
            events += self._idle({"type": "retries_exhausted"})
            if await self._rest(events, Rest(), inbox):
                return True
            await self._context.refresh(self._parts.db)

    # Tools

    async def _take_answers(self, step: steps.TakeAnswers) -> None:
        await self._log([*self._opening(step.opens_period), *(queued.taken_up() for queued in step.taken)], step.taken)
        faults.reach(ANSWERS_LOGGED)

    async def _run_tools(self, first: steps.RunTools) -> None:
        """Run calls until none runs or an interrupt came; calls that the client allows meanwhile join them."""
        context = self._context
        stored: list[StoredEvent] = []
        started: set[str] = set()
        ended: set[str] = set()
        async with anyio.create_task_group() as group:

            async def run(call: ToolCall) -> None:
                await self._run_call(call, stored)
                ended.add(call.event_id)
                self._changed.set()

            step: steps.Step = first
            while not isinstance(step, steps.Interrupt):
                if isinstance(step, steps.TakeAnswers):
                    await self._take_answers(step)
                elif isinstance(step, steps.RunTools):
                    for call in step.calls:
                        if call.event_id not in started:
                            started.add(call.event_id)
                            group.start_soon(run, call)
                    await self._change()
                else:
                    # Not the concern of running calls: something sent for later, say.
                    await self._change()
                await self._follow_results(stored)
                if started == ended:
                    return
                await context.refresh(self._parts.db)
                step = self._decide()
            group.cancel_scope.cancel()
        # What was cancelled may have been logged all the same.
        await self._follow_results(stored)

    async def _follow_results(self, stored: list[StoredEvent]) -> None:
        new, stored[:] = list(stored), []
        await self._context.follow(self._parts.db, new)

    async def _change(self) -> None:
        await self._changed.wait()
        self._changed = anyio.Event()

    async def _run_call(self, call: ToolCall, stored: list[StoredEvent]) -> None:
        if call.refused is not None:
            outcome, usage = Outcome([{"type": "text", "text": call.refused}], is_error=True), None
        else:
            is_web = call.name in definitions.WEB_TOOLS
            outcome, usage = await self._web.run(call) if is_web else (await self._hands.execute(call), None)
            faults.reach(OUTCOME_ARRIVED)
        result = ev.tool_result(self._thread_id, call.event_id, outcome.content, is_error=outcome.is_error, usage=usage)
        stored += await self._append([result])
        faults.reach(OUTCOME_LOGGED)
        if call.name not in definitions.WEB_TOOLS:
            await self._hands.acknowledge(call.event_id)

    # Interrupts

    async def _until_interrupted(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """Run `work`; None when an interrupt came first, and `work` is cancelled."""
        result: T | None = None
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await self._interrupt_arrived()
                group.cancel_scope.cancel()

            group.start_soon(watch)
            result = await work()
            group.cancel_scope.cancel()
        return result

    async def _interrupt_arrived(self) -> None:
        while True:
            await self._change()
            async with self._parts.db.autocommit() as tx:
                if (await tx.execute(_HAS_INTERRUPT, {"session_id": self.claim.session_id})).scalar_one():
                    return

    async def _interrupt(self, step: steps.Interrupt) -> bool:
        """End the turn. The session rests in the same append, or is running again: nobody may see it idle and owned."""
        # Also after a crash: what a former owner started must not go on behind the interrupt.
        await self._hands.cancel([call.event_id for call in step.calls if call.awaits is None])
        # The tools' closing results come first, so that nothing stands between the interrupt and the idle it causes.
        events = [self._interrupted_result(call) for call in step.calls]
        events += [queued.taken_up() for queued in step.taken]
        if step.ends_turn:
            await self._harvest()
            events += self._idle({"type": "end_turn"})
        if not step.more:
            return await self._rest(events, Rest(), step.taken)
        events += self._opening(step.ends_turn)
        try:
            # An answer that the API has logged meanwhile would be the second result of its call.
            await self._log(events, step.taken, expect_input_seq=self._context.input_seq)
        except NewInput:
            return False
        faults.reach(TURN_CLOSED)
        return False

    # Events

    def _interrupted_result(self, call: ToolCall) -> NewEvent:
        content = [{"type": "text", "text": INTERRUPTED}]
        return ev.tool_result(self._thread_id, call.event_id, content, is_error=True)

    def _failed_span(self, start_id: str, private: ev.Json | None = None) -> NewEvent:
        """`private` is null for the model's own failures, which count as tries."""
        return ev.span_end(self._thread_id, start_id, SpanUsage(), is_error=True, private=private)

    def _opening(self, opens_period: bool) -> list[NewEvent]:
        return ev.running(self._thread_id, self._agent["name"]) if opens_period else []

    def _idle(self, stop_reason: ev.Json, stop_details: ev.Json | None = None, of_session: str | None = None) -> list[NewEvent]:
        other = None if of_session is None else {"type": of_session}
        return ev.idle(self._thread_id, self._agent["name"], stop_reason, stop_details, of_session=other)
