"""How a runner writes: its appends, fenced by owner and epoch, and the events that every step is made of.

Appends are shielded: a cancelled append might still be written, and the result of a call must never be written twice.

What can be had again after a crash may be held, to be committed together with what follows from it at once. It is folded ahead
of that, on the position that it will have. Where somebody else has written meanwhile it is appended by itself,
behind that, and the log is read again.
"""

from collections.abc import Callable, Sequence

import anyio

from managed_agents.db.engine import Database
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.append import NewInput
from managed_agents.eventlog.batch import Append, Appender, Rest
from managed_agents.eventlog.events import NewEvent, QueuedEvent, SpanUsage, StoredEvent
from managed_agents.harness.context import Context
from managed_agents.harness.lease import Claim
from managed_agents.harness.turn import ToolCall

CUT: ev.Json = {"cut": True}  # the private part of a span that ended by a crash or an interrupt
REJECTED: ev.Json = {"rejected": True}  # of one whose request the endpoint will not take as it is
INTERRUPTED = "Tool execution was interrupted before completion. Please retry."  # observed


class Journal:
    """The log of one claimed session, for its owner."""

    def __init__(self, db: Database, appender: Appender, claim: Claim, worker_id: str, context: Context) -> None:
        self.thread_id = claim.thread_id
        self._db = db
        self._appender = appender
        self._claim = claim
        self._worker_id = worker_id
        self._context = context
        # Of the agent's snapshot only tools are ever updated.
        self._agent_name: str = claim.agent["name"]
        self._held: list[NewEvent] = []
        self._held_behind = 0
        self._then: Callable[[], None] | None = None

    # Holding

    @property
    def holds(self) -> bool:
        """Whether events wait for the next append."""
        return bool(self._held)

    async def hold(self, events: Sequence[NewEvent], then: Callable[[], None]) -> None:
        """Take events into the context that the next append writes first; `then` is called once they are committed."""
        assert not self._held, "held events are written before others are held"
        self._held, self._held_behind, self._then = list(events), self._context.turn.seq, then
        try:
            self._context.foresee(events)
        except Exception:
            # A harness that cannot take them: that is no reason to lose them.
            await self.flush()
            raise

    async def flush(self) -> None:
        """Write what is held by itself."""
        if not self._held:
            return
        try:
            await self.append([])
        except NewInput:
            held, then, self._held, self._then = self._held, self._then, [], None
            await self.append(held)
            assert then is not None
            then()
            await self._context.load_again(self._db)

    async def append(
        self,
        events: Sequence[NewEvent],
        *,
        taken: Sequence[QueuedEvent] = (),
        rest: Rest | None = None,
        expect_input_seq: int | None = None,
        within_budget: bool = False,
    ) -> list[StoredEvent]:
        """Append without following: for what is logged beside the loop, and for the last step. What is held comes first.

        Raises:
            NewInput: also when something is held and somebody else has written since it was folded.
        """
        held = len(self._held)
        append = Append(
            self._claim.session_id,
            [*self._held, *events],
            self._worker_id,
            self._claim.epoch,
            expect_input_seq=expect_input_seq,
            expect_last_seq=self._held_behind if held else None,
            within_budget=within_budget,
            taken=taken,
            rest=rest,
        )
        hints = self._context.hints
        with anyio.CancelScope(shield=True):
            await self._appender.append(append)
        self._context.committed(append.input_seq, hints)
        if self._then is not None:
            then, self._held, self._then = self._then, [], None
            then()
        return append.stored[held:]

    async def log(
        self,
        events: Sequence[NewEvent],
        taken: Sequence[QueuedEvent] = (),
        *,
        expect_input_seq: int | None = None,
        within_budget: bool = False,
    ) -> list[StoredEvent]:
        """Append, and take the events into the context."""
        stored = await self.append(events, taken=taken, expect_input_seq=expect_input_seq, within_budget=within_budget)
        await self._context.follow(self._db, stored)
        return stored

    async def rest(
        self, events: Sequence[NewEvent], rest: Rest, taken: Sequence[QueuedEvent] = (), *, within_budget: bool = False
    ) -> bool:
        """Append the resting step on the input it was decided on; False when that has moved."""
        expected = self._context.input_seq
        try:
            await self.append(events, taken=taken, rest=rest, expect_input_seq=expected, within_budget=within_budget)
        except NewInput:
            self._context.current = False
            return False
        return True

    # Events

    def interrupted_result(self, call: ToolCall) -> NewEvent:
        """Close a call that an interrupt or the end of the turn cut off."""
        content = [{"type": "text", "text": INTERRUPTED}]
        return ev.tool_result(self.thread_id, call.event_id, content, is_error=True)

    def failed_span(self, start_id: str, private: ev.Json | None = None, used: SpanUsage | None = None) -> NewEvent:
        """Close a span without a response. `private` is null for the model's own failures, which count as tries.

        `used` is what has to be paid all the same: a response that an interrupt came before.
        """
        return ev.span_end(self.thread_id, start_id, used or SpanUsage(), is_error=True, private=private)

    def opening(self, opens_period: bool) -> list[NewEvent]:
        """Begin a running period, if one is to begin."""
        return ev.running(self.thread_id, self._agent_name) if opens_period else []

    def idle(self, stop_reason: ev.Json, stop_details: ev.Json | None = None, of_session: str | None = None) -> list[NewEvent]:
        """End a running period; `of_session` is the session's reason where it is not the thread's."""
        other = None if of_session is None else {"type": of_session}
        return ev.idle(self.thread_id, self._agent_name, stop_reason, stop_details, of_session=other)
