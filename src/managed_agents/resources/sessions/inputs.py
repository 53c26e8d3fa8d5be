"""What happens to client events on receipt: queued, or processed at once.

The request that gives work to an idle session nobody owns says `running` itself, in its own transaction, so a client that polls
right after sending never sees a stale `idle`. The inputs wait in the inbox and are logged when the harness takes them up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from managed_agents.core import ids, limits
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog.events import QueuedEvent, StoredEvent, with_processed_at
from managed_agents.eventlog.hints import Hints
from managed_agents.resources.sessions import budgets
from managed_agents.resources.sessions.schemas import UserInterrupt, UserMessage


@dataclass(slots=True)
class Accepted:
    """What one request put into a session, to be announced after its commit."""

    appended: list[StoredEvent] = field(default_factory=list[StoredEvent])
    queued: list[QueuedEvent] = field(default_factory=list[QueuedEvent])
    echo: list[bytes] = field(default_factory=list[bytes])

    def announce(self, hints: Hints, session_id: str) -> None:
        """Tell workers first, then streams."""
        if self.queued:
            hints.work(session_id)
            hints.queued(self.queued)
        if self.appended:
            hints.appended(self.appended)


def accept(head: log.Head, sent: Sequence[UserMessage | UserInterrupt]) -> Accepted:
    """Stage `sent` on the locked session, in order.

    Raises:
        InvalidRequest: archived or terminated, or too much is waiting. NotFound: unknown thread.
    """
    if head.archived or head.state.status == "terminated":
        raise InvalidRequest(f"Session {head.id} is archived or terminated and accepts no more events")
    accepted = Accepted()
    for index, event in enumerate(sent):
        _check_thread(head, event)
        if head.at_cap:
            budgets.check_accepted(event.type, index)
        new = _encoded(head.primary_thread_id, event)
        assert new.payload is not None
        if head.at_cap and head.state.status == "idle":
            # spec: an interrupt of a session that its budget has paused is accepted, ignored and never stored
            accepted.echo.append(with_processed_at(new.payload, None))
            continue
        idle = head.state.status == "idle" and head.owner is None and head.inbox_count == 0
        if idle and event.type == "user.interrupt":
            # Nothing to interrupt: history keeps it, nothing runs.
            stored = head.append([new])
            accepted.appended += stored
            accepted.echo.append(stored[0].body)
            continue
        if idle:
            accepted.appended += head.append(ev.running(head.primary_thread_id, head.agent_name))
        accepted.queued += _enqueue(head, new)
        accepted.echo.append(with_processed_at(new.payload, None))
    if accepted.queued:
        head.input_seq += 1
    return accepted


def _enqueue(head: log.Head, event: ev.NewEvent) -> list[QueuedEvent]:
    try:
        return head.enqueue([event], maximum=limits.INBOX_EVENTS_MAX)
    except log.InboxFull as error:
        raise InvalidRequest(
            f"events: at most {limits.INBOX_EVENTS_MAX} events may wait in a session; wait until some were processed"
        ) from error


def _check_thread(head: log.Head, event: UserMessage | UserInterrupt) -> None:
    if isinstance(event, UserInterrupt) and event.session_thread_id is not None and event.session_thread_id not in head.threads:
        raise NotFound(
            f"session_thread_id: thread {event.session_thread_id[:100]} not found",
            error_code="thread_not_found",
        )


def _encoded(thread_id: str, event: UserMessage | UserInterrupt) -> ev.NewEvent:
    event_id = ids.new_id(ids.EVENT)
    fields: dict[str, Any] = {"type": event.type, "id": event_id, **_fields(event)}
    return ev.NewEvent(event.type, event_id, thread_id, orjson.dumps(fields))


def _fields(event: UserMessage | UserInterrupt) -> dict[str, Any]:
    if isinstance(event, UserMessage):
        return {"content": [block.model_dump(exclude_none=True) for block in event.content]}
    return {"session_thread_id": event.session_thread_id}
