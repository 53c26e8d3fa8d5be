"""What happens to client events on receipt: queued, or processed at once.

The request that gives work to an idle session nobody owns says `running` itself, in its own transaction, so a client that polls
right after sending never sees a stale `idle`. The inputs wait in the inbox and are logged when the harness takes them up;
results of custom tools are logged on receipt.

Events of one request are judged one after the other, each in the situation that the ones before it have made. Written is only
what was judged on the row as it still is, or on the row under lock, which makes two clients that answer the same call a first and
a second: the second one is told so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from sqlalchemy import text

from managed_agents.core import ids, limits
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.db.engine import Tx
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.events import CUSTOM_TOOL_RESULT, TOOL_CONFIRMATION, QueuedEvent, StoredEvent, with_processed_at
from managed_agents.eventlog.hints import Hints
from managed_agents.resources.sessions import budgets
from managed_agents.resources.sessions.schemas import (
    AnyClientEvent,
    SystemMessage,
    UserCustomToolResult,
    UserInterrupt,
    UserMessage,
    UserToolConfirmation,
    UserToolResult,
)

_QUEUED_ANSWERS = text(
    "SELECT type, payload FROM inbox WHERE session_id = :id AND type IN ('user.interrupt', 'user.tool_confirmation')"
)
_ANSWERED = text(
    "SELECT EXISTS (SELECT 1 FROM events WHERE session_id = :id AND type = 'user.custom_tool_result' AND tool_use_id = :use)"
)
_MODEL = text("SELECT agent->'model'->>'id' FROM sessions WHERE id = :id")
# spec: models that accept `system` messages in mid-conversation. Other vendors' models are left to their endpoint.
SYSTEM_MESSAGE_MODELS = (
    "claude-fable-5",
    "claude-mythos-5",
    "claude-opus-4-8",
    "claude-opus-5",
    "claude-sonnet-5-5",
    "claude-haiku-5-5",
)
ANSWERS = (
    "only `user.tool_confirmation`, `user.custom_tool_result`, `user.tool_result`, or `user.interrupt` may be sent"  # observed
)


@dataclass(slots=True)
class Accepted:
    """What one request put into a session, to be announced after its commit."""

    appended: list[StoredEvent] = field(default_factory=list[StoredEvent])
    queued: list[QueuedEvent] = field(default_factory=list[QueuedEvent])
    echo: list[bytes] = field(default_factory=list[bytes])
    work: bool = False

    def announce(self, hints: Hints, session_id: str) -> None:
        """Tell workers first, then streams."""
        if self.work:
            hints.work(session_id)
        if self.queued:
            hints.queued(self.queued)
        if self.appended:
            hints.appended(self.appended)


async def accept(tx: Tx, head: log.Head, sent: Sequence[AnyClientEvent]) -> Accepted:
    """Stage `sent` on the session, locked or as it was looked at, in order.

    Raises:
        InvalidRequest: archived or terminated, too much is waiting, or an event that does not fit the situation.
        NotFound: unknown thread.
    """
    if head.archived or head.state.status == "terminated":
        raise InvalidRequest(f"Session {head.id} is archived or terminated and accepts no more events")
    check_positions(sent)
    receiver = _Receiver(tx, head)
    await receiver.look()
    for index, event in enumerate(sent):
        await receiver.receive(index, event)
    if receiver.accepted.work:
        head.input_seq += 1
    return receiver.accepted


def check_positions(sent: Sequence[AnyClientEvent]) -> None:
    """The rules of `system.message`: one, the last, right behind what it accompanies.

    Raises:
        InvalidRequest: it stands anywhere else.
    """
    # spec: beta_managed_agents_system_message_event_params.py says where it may stand
    for index, event in enumerate(sent):
        if not isinstance(event, SystemMessage):
            continue
        if any(isinstance(other, SystemMessage) for other in sent[index + 1 :]):
            raise InvalidRequest("events: at most one system.message is allowed in a request")
        if index != len(sent) - 1:
            raise InvalidRequest(f"events.{index}: a system.message must be the last event of the request")
        if index == 0 or not isinstance(sent[index - 1], UserMessage | UserToolResult | UserCustomToolResult):
            raise InvalidRequest(
                f"events.{index}: a system.message must immediately follow the user.message, user.tool_result or "
                "user.custom_tool_result it accompanies"
            )


class _Receiver:
    """Takes the events of one request, one after the other."""

    def __init__(self, tx: Tx, head: log.Head) -> None:
        self.accepted = Accepted()
        self._tx = tx
        self._head = head
        # As the harness will find it when it has taken up what is queued before.
        self._waiting = dict(head.state.waiting)
        self._interrupted = False

    async def look(self) -> None:
        """Take account of the answers that wait to be taken up."""
        if self._waiting and self._head.inbox_count:
            for row in await self._tx.execute(_QUEUED_ANSWERS, {"id": self._head.id}):
                if row.type == TOOL_CONFIRMATION:
                    self._waiting.pop(orjson.loads(row.payload)["tool_use_id"], None)
                else:
                    self._interrupted = True

    async def receive(self, index: int, event: AnyClientEvent) -> None:
        if self._head.at_cap:
            budgets.check_accepted(event.type, index)
        match event:
            case UserMessage():
                self._check_not_blocked(index, event.type)
                self._enqueue(event.type, _content(event.content), starts_work=True)
            case UserInterrupt():
                self._interrupt(event)
            case UserToolConfirmation():
                self._confirmation(index, event)
            case UserCustomToolResult():
                await self._custom_result(index, event)
            case UserToolResult():
                # Observed hosted behaviour: only a self-hosted environment's worker runs built-in tools.
                raise InvalidRequest(f"events.{index}: user.tool_result is only accepted in self_hosted environments")
            case SystemMessage():
                await self._check_model(index)
                self._enqueue(event.type, _content(event.content), starts_work=False)

    @property
    def _rests(self) -> bool:
        """Nobody else will say that the session runs."""
        return self._head.state.status == "idle" and self._head.owner is None

    def _check_not_blocked(self, index: int, event_type: str) -> None:
        if self._head.state.status == "idle" and self._waiting and not self._interrupted:
            waiting = ", ".join(self._waiting)
            raise InvalidRequest(
                f"Invalid `{event_type}` event at events[{index}]: waiting on responses to events [{waiting}]; {ANSWERS}"
            )

    def _interrupt(self, event: UserInterrupt) -> None:
        head = self._head
        if event.session_thread_id is not None and event.session_thread_id not in head.threads:
            raise NotFound(
                f"session_thread_id: thread {event.session_thread_id[:100]} not found",
                error_code="thread_not_found",
            )
        fields = {"session_thread_id": event.session_thread_id}
        if head.at_cap and self._rests and not self._waiting and head.inbox_count == 0:
            # spec: an interrupt of a session that its budget has paused is accepted, ignored and never stored
            ignored = ev.new_event(event.type, head.primary_thread_id, fields)
            assert ignored.payload is not None
            self.accepted.echo.append(with_processed_at(ignored.payload, None))
            return
        if self._rests and not self._waiting and head.inbox_count == 0:
            # Nothing to interrupt: history keeps it, nothing runs.
            self._append(ev.new_event(event.type, head.primary_thread_id, fields))
            return
        # One that ends a wait starts no work: the session stays idle, its reason changes.
        self._interrupted = True
        self._enqueue(event.type, fields, starts_work=False)

    def _confirmation(self, index: int, event: UserToolConfirmation) -> None:
        awaited = self._waiting.get(event.tool_use_id)
        if awaited == CUSTOM_TOOL_RESULT:
            raise InvalidRequest(
                f"events.{index}.tool_use_id: {event.tool_use_id} is a custom tool; answer it with user.custom_tool_result"
            )
        if awaited is None:
            raise _unawaited(index, "tool_use_id", event.tool_use_id)
        del self._waiting[event.tool_use_id]
        fields: dict[str, Any] = {"tool_use_id": event.tool_use_id, "result": event.result}
        if event.deny_message is not None:
            fields["deny_message"] = event.deny_message
        # Both decisions are work: a call to run, or to refuse.
        self._enqueue(event.type, {**fields, "session_thread_id": None}, starts_work=True)

    async def _custom_result(self, index: int, event: UserCustomToolResult) -> None:
        use = event.custom_tool_use_id
        awaited = self._waiting.pop(use, None)
        if awaited == TOOL_CONFIRMATION:
            raise InvalidRequest(
                f"events.{index}.custom_tool_use_id: {use} is a built-in tool; answer it with user.tool_confirmation"
            )
        if awaited is None and not await self._was_answered(use):
            raise _unawaited(index, "custom_tool_use_id", use)
        fields: dict[str, Any] = {"custom_tool_use_id": use}
        if event.content is not None:
            fields |= _content(event.content)
        if event.is_error is not None:
            fields["is_error"] = event.is_error
        new = ev.new_event(event.type, self._head.primary_thread_id, {**fields, "session_thread_id": None}, tool_use_id=use)
        # The first answer counts. A repeated one is history, and shows one more running period (observed).
        repeated = awaited is None
        self._append(new._replace(for_model=not repeated))
        if repeated or not self._waiting:
            self._open()
        self.accepted.work = True

    async def _was_answered(self, tool_use_id: str) -> bool:
        values = {"id": self._head.id, "use": tool_use_id}
        if any(event.type == CUSTOM_TOOL_RESULT and event.tool_use_id == tool_use_id for event, _, _ in self._head.events):
            return True
        return ids.has_prefix(tool_use_id, ids.EVENT) and (await self._tx.execute(_ANSWERED, values)).scalar_one()

    async def _check_model(self, index: int) -> None:
        model: str = (await self._tx.execute(_MODEL, {"id": self._head.id})).scalar_one()
        if model.startswith("claude-") and not model.startswith(SYSTEM_MESSAGE_MODELS):
            raise InvalidRequest(
                f"events.{index}: {model} does not support system messages in mid-conversation",
                error_code="model_does_not_support_mid_conversation_system",
            )

    def _open(self) -> None:
        if self._rests:
            self.accepted.appended += self._head.append(ev.running(self._head.primary_thread_id, self._head.agent_name))

    def _append(self, event: ev.NewEvent) -> None:
        stored = self._head.append([event])
        self.accepted.appended += stored
        self.accepted.echo.append(stored[0].body)

    def _enqueue(self, event_type: str, fields: dict[str, Any], *, starts_work: bool) -> None:
        if starts_work:
            self._open()
        new = ev.new_event(event_type, self._head.primary_thread_id, fields)
        assert new.payload is not None
        try:
            self.accepted.queued += self._head.enqueue([new], maximum=limits.INBOX_EVENTS_MAX)
        except log.InboxFull as error:
            raise InvalidRequest(
                f"events: at most {limits.INBOX_EVENTS_MAX} events may wait in a session; wait until some were processed"
            ) from error
        self.accepted.echo.append(with_processed_at(new.payload, None))
        self.accepted.work = True


def _unawaited(index: int, name: str, tool_use_id: str) -> InvalidRequest:
    return InvalidRequest(f"events.{index}.{name}: no non-archived thread is waiting on {name} {tool_use_id[:100]}")


def _content(content: Sequence[Any]) -> dict[str, Any]:
    return {"content": [block.model_dump(exclude_none=True) for block in content]}
