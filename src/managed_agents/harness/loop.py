"""The turn loop: read the log, decide, act, append; until there is nothing to do.

One runner owns one claimed session. Whatever ends it, what it has appended stands, and the next owner goes on from there.
The two long steps are carried out by `asking` (a model request) and `tool_run`; `journal` writes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import anyio
from anyio.abc import TaskGroup

from managed_agents.core import faults, limits
from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.append import BudgetReached, NewInput
from managed_agents.eventlog.batch import Appender, Rest
from managed_agents.eventlog.events import NewEvent, QueuedEvent
from managed_agents.eventlog.previews import PreviewSender
from managed_agents.harness import decide as steps
from managed_agents.harness import lease
from managed_agents.harness.asking import Asked, Asking
from managed_agents.harness.brain import STANDARD, Guarded, Harness
from managed_agents.harness.changes import Changes
from managed_agents.harness.compaction import is_whole
from managed_agents.harness.context import Context
from managed_agents.harness.hands import Hands, SessionHands
from managed_agents.harness.journal import CUT, REJECTED, Journal
from managed_agents.harness.lease import Claim
from managed_agents.harness.prompt import Brief
from managed_agents.harness.request import Failed, Finished, ModelRequester
from managed_agents.harness.response import Response, compacted, events_of
from managed_agents.harness.tool_run import ToolRun
from managed_agents.harness.tools import definitions
from managed_agents.harness.tools.web import WebTools
from managed_agents.harness.turn import snapshot
from managed_agents.harness.web_calls import WebCalls
from managed_agents.resources.sessions.repositories import described

logger = logging.getLogger(__name__)

TURN_LOADED = faults.register("turn.loaded", "session claimed and read, nothing decided")
REQUEST_LOGGED = faults.register("turn.request_logged", "span opened in the log, request not sent")
RESPONSE_ARRIVED = faults.register("turn.response_arrived", "response complete, not in the log")
RESPONSE_LOGGED = faults.register("turn.response_logged", "response in the log, no tool started")
ANSWERS_LOGGED = faults.register("turn.answers_logged", "the client's decisions in the log, nothing done about them")
TURN_CLOSED = faults.register("turn.closed", "interrupt and idle in the log, the next turn not begun")
BEFORE_IDLE = faults.register("turn.before_idle", "turn over, idle not in the log")

CLOSE_SECONDS_MAX = 5.0


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


class SessionRunner:
    """Runs one claimed session until it rests, or the lease is lost."""

    def __init__(self, parts: Parts, claim: Claim, worker_id: str) -> None:
        self.claim = claim
        self._parts = parts
        # It stopped between two steps, and the session is still ours.
        self.handed_over = False
        self._draining = False
        self._agent = self._servable(claim.agent)
        # One that asks for a harness we do not have is only told so.
        self._harness = Guarded(parts.harnesses.get(claim.harness or STANDARD, parts.harnesses[STANDARD]))
        self._context = Context(claim.session_id, claim.input_seq, claim.due_in_seconds, self._harness.transcript)
        self._brief: Brief | None = None
        self._changes = Changes(parts.db, claim.session_id)
        self._journal = Journal(parts.db, parts.appender, claim, worker_id, self._context)
        self._hands: SessionHands = parts.hands.of_session(claim)
        self._web = WebCalls(parts.web, parts.db, claim, self._agent, self._hands)
        self._background: TaskGroup | None = None
        self._asking: Asking | None = None
        self._prepared = False
        self._offers_sandbox = definitions.offers_sandbox(self._agent["tools"])

    def notify(self) -> None:
        """New input arrived for this session."""
        self._context.hinted()
        self._changes.notify()

    def drain(self) -> None:
        """Stop after the step at hand; the session is to be given back."""
        self._draining = True

    async def run(self) -> None:
        """Run to rest, or until told to drain (`handed_over` says so).

        Raises (perhaps in a group):
            LeaseLost, SessionGone, AppendUncertain, SQLAlchemyError: stop; the log is what it is.
        """
        parts = self._parts
        try:
            async with anyio.create_task_group() as group:
                self._background = group
                self._asking = Asking(parts.db, self.claim, parts.requester, parts.previews, parts.jitter, self._changes, group)
                group.start_soon(self._hands.keep_safe)
                group.start_soon(self._hands.collect_outputs)
                group.start_soon(self._hands.repositories.keep_clones)
                try:
                    await self._run()
                finally:
                    group.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(CLOSE_SECONDS_MAX, shield=True):
                await self._hands.aclose()

    async def _run(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._context.load, self._parts.db)
            group.start_soon(self._learn)
        faults.reach(TURN_LOADED)
        if self.claim.harness not in (None, *self._parts.harnesses) and not isinstance(self._decide(), steps.Rest):
            # Not a session that has nothing to do, or is archived.
            await self._stop("unknown_error", f'This server has no harness "{self.claim.harness}".')
            return
        context = self._context
        before = (context.turn.seq, context.input_seq, context.at_cap, self._journal.holds)
        while not await self._step():
            if not self._journal.holds:  # else the next append says whether there is new input
                await context.refresh(self._parts.db)
            after = (context.turn.seq, context.input_seq, context.at_cap, self._journal.holds)
            # A step that changes nothing would be decided for ever.
            assert after != before, f"no progress at event {context.turn.seq}"
            before = after
            if self._draining and isinstance(self._decide(), (steps.RequestModel, steps.Compact, steps.RunTools)):
                # What is about to rest does so here: it is one append away.
                await self._journal.flush()
                self.handed_over = True
                return

    async def _step(self) -> bool:
        """Do one step; says whether the session is at rest."""
        await self._tell_troubles()
        try:
            step = self._decide()
        except Exception:
            await self._journal.flush()  # what a harness does not understand is no reason to lose it
            raise
        if self._journal.holds and not isinstance(step, (steps.RequestModel, steps.Compact)):
            # Whatever else there is to do is decided with the result in the log, on the newest input.
            await self._journal.flush()
            return False
        try:
            return await self._act(step)
        except BudgetReached:
            self._context.at_cap = True
            return False

    async def _tell_troubles(self) -> None:
        if troubles := self._hands.repositories.troubles():
            await self._journal.flush()
            await self._journal.log([trouble.event(self._journal.thread_id) for trouble in troubles])
            await self._hands.repositories.told(troubles)

    async def _act(self, step: steps.Step) -> bool:
        if isinstance(step, (steps.RequestModel, steps.Compact, steps.TakeAnswers)) and step.opens_period:
            await self._reload_agent()
        match step:
            case steps.CloseSpan(start_id):
                await self._journal.log([self._journal.failed_span(start_id, CUT)])
            case steps.Interrupt():
                return await self._interrupt(step)
            case steps.TakeAnswers():
                await self._take_answers(step)
            case steps.RunTools():
                assert self._background is not None
                parts = (self._context, self._journal, self._changes, self._hands, self._web)
                run = ToolRun(self._parts.db, *parts, self._background)
                await run.run(step, self._decide, self._take_answers)
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
                return await self._journal.rest([], Rest(due_in_seconds=seconds))
            case steps.Rest():
                return await self._journal.rest([], Rest())
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
        events = [*self._journal.opening(step.opens_period), *(queued.taken_up() for queued in step.taken)]
        events += self._journal.idle(stop_reason, step.stop_details, step.of_session)
        # A session at its cap says so: a turn that ends as if below it is decided again when that is not true any more.
        ends_below = step.stop_reason == "end_turn" and step.of_session is None
        if step.more:
            # Running again in the same append: nobody may see the session idle and owned.
            await self._journal.log([*events, *self._journal.opening(True)], step.taken)
            return False
        return await self._journal.rest(events, Rest(), step.taken, within_budget=ends_below)

    async def _harvest(self) -> None:
        if self._context.turn.called_tools:
            await self._hands.harvest()

    def _prepare_hands(self) -> None:
        if not self._prepared and self._offers_sandbox:
            assert self._background is not None
            self._prepared = True
            self._background.start_soon(self._hands.prepare)

    # The model

    async def _learn(self) -> None:
        """Find out what requests are built from beside the log."""
        rules = await self._parts.requester.rules(self._agent["model"]["id"])
        wanted = await self._hands.repositories.wanted() if self._offers_sandbox else []
        self._brief = Brief(self._agent, rules, await self._uploads(), described(wanted))

    async def _uploads(self) -> list[str]:
        # Only a session with tools tells the model of its files.
        return [upload.path for upload in await self._hands.uploads(self._context.input_seq)] if self._offers_sandbox else []

    async def _request_model(self, step: steps.RequestModel) -> bool:
        def answered(response: Response, asked: Asked) -> list[NewEvent]:
            tools, told = self._agent["tools"], asked.preview.event_ids
            return events_of(response, self._journal.thread_id, asked.start_id, tools, asked.judgements, event_ids=told)

        return await self._ask(step.opens_period, step.taken, self._context.transcript.request, answered)

    async def _compact(self, step: steps.Compact) -> bool:
        transcript = self._context.transcript

        def body(brief: Brief) -> ev.Json:
            return transcript.compaction(brief, briefly=step.briefly)

        def summarised(response: Response, asked: Asked) -> list[NewEvent]:
            assert self._brief is not None
            whole = is_whole(response.stop_reason, briefly=step.briefly)
            kept = transcript.checkpoint(self._brief, response.content) if whole else None
            checkpoint = None if kept is None else {**kept, "turn": snapshot(self._context.turn)}
            return compacted(response, self._journal.thread_id, asked.start_id, checkpoint)

        return await self._ask(step.opens_period, (), body, summarised, own=True)

    async def _ask(
        self,
        opens_period: bool,
        taken: Sequence[QueuedEvent],
        body: Callable[[Brief], ev.Json],
        events: Callable[[Response, Asked], list[NewEvent]],
        *,
        own: bool = False,
    ) -> bool:
        """Open a span, ask the model with `body`, and append what `events` makes of the answer in one append.

        `own`: the answer is for the harness itself. Clients see no previews of it, and what it calls is not run.
        """
        start = ev.span_start(self._journal.thread_id)
        opening = self._journal.opening(opens_period)
        asking = [*opening, *(queued.taken_up() for queued in taken), start]
        # What is held was decided on without another look at the input.
        expected = self._context.input_seq if self._journal.holds else None
        try:
            stored = await self._journal.log(asking, taken, expect_input_seq=expected, within_budget=True)
        except NewInput:
            await self._journal.flush()
            return False
        faults.reach(REQUEST_LOGGED)
        self._prepare_hands()
        assert self._brief is not None
        assert self._asking is not None
        self._brief = replace(self._brief, uploads=await self._uploads())
        request = body(self._brief)
        asked = self._asking.begin(stored[-1], shown=not own)
        wait = steps.pause_seconds(self._context.turn.pauses, self._parts.jitter())
        outcome = await self._asking.ask(asked, request, self._agent, judge=not own, after_seconds=wait)
        match outcome:
            case Finished(response):
                faults.reach(RESPONSE_ARRIVED)
                await self._journal.log(events(response, asked))
                faults.reach(RESPONSE_LOGGED)
            case Failed(too_long=True):
                # Not a try that failed: a shorter one may do. Compactions that did not fit are counted.
                useless = {"compaction": {"useful": False}} if own else {}
                await self._journal.log([self._journal.failed_span(start.id, {"too_long": True, **useless})])
            case Failed():
                return await self._model_failed(start.id, outcome)
            case None:
                await self._journal.log([self._journal.failed_span(start.id, CUT, asked.used)])
        return False

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
            return await self._stop(failed.error_type, failed.message, closing=REJECTED if failed.rejected else None)
        # One `retrying` error per streak; the reschedule itself is visible each time.
        error = [ev.session_error(self._journal.thread_id, failed.error_type, failed.message, "retrying")]
        wait = steps.backoff_seconds(failures, self._parts.jitter(), failed.retry_after_seconds)
        closing = self._journal.failed_span(start_id)
        parked = [closing, *([] if told else error), *ev.rescheduled(self._journal.thread_id, self._agent["name"])]
        while not await self._journal.rest(parked, Rest(due_in_seconds=wait)):
            await self._context.refresh(self._parts.db)
            if any(queued.type == "user.interrupt" for queued in self._context.inbox):
                await self._journal.log([closing])
                return False
        return True

    async def _stop(self, error_type: str, message: str, *, closing: ev.Json | None = None) -> bool:
        """Give the turn up: close what is open, a span with `closing`, tell why, flush what waits, go idle."""
        await self._harvest()
        while True:
            turn, inbox = self._context.turn, list(self._context.inbox)
            events = [self._journal.failed_span(turn.open_span, closing)] if turn.open_span else []
            events += [self._journal.interrupted_result(call) for call in turn.pending.values()]
            events.append(ev.session_error(self._journal.thread_id, error_type, message, "exhausted"))
            events += [queued.taken_up(for_model=False) for queued in inbox]
            events += self._journal.idle({"type": "retries_exhausted"})
            if await self._journal.rest(events, Rest(), inbox):
                return True
            await self._context.refresh(self._parts.db)

    # What the client sends meanwhile

    async def _take_answers(self, step: steps.TakeAnswers) -> None:
        await self._journal.log(
            [*self._journal.opening(step.opens_period), *(queued.taken_up() for queued in step.taken)], step.taken
        )
        faults.reach(ANSWERS_LOGGED)

    async def _interrupt(self, step: steps.Interrupt) -> bool:
        """End the turn. The session rests in the same append, or is running again: nobody may see it idle and owned."""
        # Also after a crash: what a former owner started must not go on behind the interrupt.
        await self._hands.cancel([call.event_id for call in step.calls if call.awaits is None])
        # The tools' closing results come first, so that nothing stands between the interrupt and the idle it causes.
        events = [self._journal.interrupted_result(call) for call in step.calls]
        events += [queued.taken_up() for queued in step.taken]
        if step.ends_turn:
            await self._harvest()
            events += self._journal.idle({"type": "end_turn"})
        if not step.more:
            return await self._journal.rest(events, Rest(), step.taken)
        events += self._journal.opening(step.ends_turn)
        try:
            # An answer that the API has logged meanwhile would be the second result of its call.
            await self._journal.log(events, step.taken, expect_input_seq=self._context.input_seq)
        except NewInput:
            self._context.current = False
            return False
        faults.reach(TURN_CLOSED)
        return False
