"""Runs the calls that a step allows, in parallel, until none runs or an interrupt came.

Those of `bash` share one shell and run one after the other, in the model's order: the second may build on the first.

Each result is appended by itself, as it arrives; the last one is held, for the model request that it leads to is logged at once.
A call that was cancelled may have been logged all the same.
"""

from collections.abc import Awaitable, Callable

import anyio
from anyio.abc import TaskGroup

from managed_agents.core import faults
from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.events import NewEvent, SpanUsage, StoredEvent
from managed_agents.harness import decide as steps
from managed_agents.harness.changes import Changes
from managed_agents.harness.context import Context
from managed_agents.harness.hands import SessionHands
from managed_agents.harness.journal import Journal
from managed_agents.harness.tools import definitions
from managed_agents.harness.turn import ToolCall
from managed_agents.harness.web_calls import WebCalls
from managed_agents.sandbox.backend import Outcome

OUTCOME_ARRIVED = faults.register("turn.outcome_arrived", "tool finished, result not in the log")
OUTCOME_LOGGED = faults.register("turn.outcome_logged", "result in the log, not acknowledged to the sandbox")


class ToolRun:
    """One step of running tools; calls that the client allows meanwhile join it."""

    def __init__(
        self,
        db: Database,
        context: Context,
        journal: Journal,
        changes: Changes,
        hands: SessionHands,
        web: WebCalls,
        background: TaskGroup,
    ) -> None:
        self._db = db
        self._context = context
        self._journal = journal
        self._changes = changes
        self._hands = hands
        self._web = web
        self._background = background
        # Appended, and not in the context yet.
        self._stored: list[StoredEvent] = []
        self._shell = anyio.Lock()
        # The result of the last call, which the sandbox keeps until it knows that it is in the log, and what to do then.
        self._last: tuple[NewEvent, Callable[[], None]] | None = None
        hands.on_wait = self._say_waiting

    async def run(
        self,
        first: steps.RunTools,
        decide: Callable[[], steps.Step],
        take_answers: Callable[[steps.TakeAnswers], Awaitable[None]],
    ) -> None:
        """Run calls until none runs or an interrupt came; `decide` and `take_answers` are the loop's."""
        started: set[str] = set()
        ended: set[str] = set()
        async with anyio.create_task_group() as group:

            async def run(call: ToolCall) -> None:
                await self._run_call(call, lambda: started == {*ended, call.event_id} >= self._context.turn.pending.keys())
                ended.add(call.event_id)
                self._changes.notify()

            step: steps.Step = first
            while not isinstance(step, steps.Interrupt):
                if isinstance(step, steps.TakeAnswers):
                    await take_answers(step)
                elif isinstance(step, steps.RunTools):
                    for call in step.calls:
                        if call.event_id not in started:
                            started.add(call.event_id)
                            group.start_soon(run, call)
                    await self._changes.next()
                else:
                    # Not the concern of running calls: something sent for later, say.
                    await self._changes.next()
                await self._follow_results()
                if started == ended:
                    await self._hold_last()
                    return
                await self._context.refresh(self._db)
                step = decide()
            group.cancel_scope.cancel()
        # What was cancelled may have been logged all the same.
        await self._follow_results()
        await self._hold_last()

    async def _hold_last(self) -> None:
        if self._last is not None:
            result, then = self._last
            await self._journal.hold([result], then)

    async def _follow_results(self) -> None:
        new, self._stored = self._stored, []
        await self._context.follow(self._db, new)

    async def _say_waiting(self, message: str) -> None:
        stored = await self._journal.append([ev.session_error(self._journal.thread_id, "unknown_error", message, "retrying")])
        self._stored += stored

    async def _run_call(self, call: ToolCall, is_last: Callable[[], bool]) -> None:
        async with self._web.spending(call):
            await self._run_and_log(call, is_last)

    async def _run_and_log(self, call: ToolCall, is_last: Callable[[], bool]) -> None:
        if call.refused is not None:
            outcome, usage = Outcome([{"type": "text", "text": call.refused}], is_error=True), None
        else:
            outcome, usage = await self._outcome(call)
            faults.reach(OUTCOME_ARRIVED)
        result = ev.tool_result(self._journal.thread_id, call.event_id, outcome.content, is_error=outcome.is_error, usage=usage)
        troubles = self._hands.repositories.troubles()
        told = [trouble.event(self._journal.thread_id) for trouble in troubles]

        def logged() -> None:
            faults.reach(OUTCOME_LOGGED)
            if call.name not in definitions.WEB_TOOLS:
                self._background.start_soon(self._hands.acknowledge, call.event_id)

        if not troubles and call.name not in definitions.WEB_TOOLS and is_last():
            self._last = result, logged
            return
        stored = await self._journal.append([*told, result])
        self._stored += stored  # apart: while that waits, another list may take the place of this one
        logged()
        await self._hands.repositories.told(troubles)

    async def _outcome(self, call: ToolCall) -> tuple[Outcome, SpanUsage | None]:
        if call.name in definitions.WEB_TOOLS:
            return await self._web.run(call)
        if call.name != definitions.SHELL_TOOL:
            return await self._hands.execute(call), None
        async with self._shell:
            return await self._hands.execute(call), None
