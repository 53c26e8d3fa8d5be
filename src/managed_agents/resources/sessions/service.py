"""Rules of sessions: create, retrieve, list, update, archive, delete.

Every state-changing command locks the session row first; what it appends commits with it, and the hints are given after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import false, func, insert, select, tuple_, update

from managed_agents.core import ids
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.core.ids import SessionId, WorkspaceId
from managed_agents.db.engine import Database, Tx
from managed_agents.encryption.sealing import Sealing
from managed_agents.eventlog import append as log
from managed_agents.eventlog import events as ev
from managed_agents.eventlog import fold
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.tables import SESSIONS, THREADS
from managed_agents.resources.agents import service as agents
from managed_agents.resources.environments import service as environments
from managed_agents.resources.sessions import budgets, inputs, mounts, web_domains
from managed_agents.resources.sessions.present import session_json
from managed_agents.resources.sessions.schemas import CreateSession, ListSessions, UpdateSession
from managed_agents.web import metadata, pagination

Json = dict[str, Any]
LISTING = "sessions"
BUSY = frozenset({"running", "rescheduling"})


def not_found(session_id: str) -> NotFound:
    """The 404 for a session that does not exist, was deleted, or is another workspace's."""
    return NotFound(f"Session {session_id[:100]} not found")


def check_id(session_id: str) -> None:
    """Refuse what cannot be a session's id before it reaches the database (a NUL in it, say). Raises NotFound."""
    if not ids.has_prefix(session_id, ids.SESSION):
        raise not_found(session_id)


@dataclass(frozen=True, slots=True)
class Sessions:
    """The commands of one process."""

    db: Database
    hints: Hints
    sealing: Sealing
    web_search: bool = False
    """Whether the workers have a search provider."""
    web_networking: bool = True
    """Whether `allowed_hosts` of a limited environment bounds the web tools."""

    async def create(self, workspace_id: WorkspaceId, body: CreateSession) -> Json:
        """Create a session: idle, or running when it has initial events.

        Raises:
            NotFound: agent, environment or file does not exist here. InvalidRequest: any of them cannot be used.
        """
        session_id = SessionId(ids.new_id(ids.SESSION))
        thread_id = ids.new_id(ids.THREAD)
        async with self.db.transaction() as tx:
            agent = await agents.resolve_for_session(tx, workspace_id, body.agent, web_search=self.web_search)
            environment = await environments.usable_for_session(tx, workspace_id, body.environment_id)
            if self.web_networking:
                web_domains.check(agent["tools"], environment.config)
            at: datetime = (await tx.execute(select(func.clock_timestamp()))).scalar_one()
            await tx.execute(
                insert(SESSIONS).values(
                    id=session_id,
                    workspace_id=workspace_id,
                    environment_id=body.environment_id,
                    agent_id=agent["id"],
                    agent_version=agent["version"],
                    agent=agent,
                    environment_config=environment.config,
                    primary_thread_id=thread_id,
                    budget_cents=budgets.checked(body.budget, agent["model"]["id"]),
                    title=body.title,
                    metadata=metadata.checked(body.metadata or {}),
                    created_at=at,
                    updated_at=at,
                )
            )
            await tx.execute(
                insert(THREADS).values(
                    id=thread_id,
                    session_id=session_id,
                    workspace_id=workspace_id,
                    agent={key: value for key, value in agent.items() if key != "multiagent"},
                    created_at=at,
                    updated_at=at,
                )
            )
            wanted = [(resource, f"resources.{index}.") for index, resource in enumerate(body.resources)]
            await mounts.mount(tx, workspace_id, session_id, wanted, at, sealing=self.sealing)
            accepted = inputs.Accepted()
            if body.initial_events:
                head = await log.lock(tx, session_id)
                assert head is not None
                accepted = await inputs.accept(tx, head, body.initial_events)
                await log.write(tx, [head])
            answer = await _read(tx, workspace_id, session_id)
        accepted.announce(self.hints, session_id)
        return answer

    async def retrieve(self, workspace_id: WorkspaceId, session_id: str) -> Json:
        """Return the session. Raises NotFound."""
        async with self.db.autocommit() as tx:
            return await _read(tx, workspace_id, session_id)

    async def update(self, workspace_id: WorkspaceId, session_id: str, body: UpdateSession) -> Json:
        """Set title and budget, merge metadata, replace the agent's tools; what really changed is told by one `session.updated`.

        New tools are those of the next turn: a worker reads the agent when it claims the session.

        Raises:
            NotFound. InvalidRequest: archived, too much metadata, a budget that cannot be set, or new tools while it is not
            idle.
        """
        sent = body.model_fields_set
        appended: list[ev.StoredEvent] = []
        async with self.db.transaction() as tx:
            head = await lock_session(tx, workspace_id, session_id)
            if head.archived:
                raise InvalidRequest(f"Session {session_id} is archived and cannot be modified")
            columns = (SESSIONS.c.title, SESSIONS.c.metadata, SESSIONS.c.agent, SESSIONS.c.environment_config)
            stored = (await tx.execute(select(*columns).where(SESSIONS.c.id == session_id))).one()
            changed: Json = {}
            if "title" in sent and body.title != stored.title:
                changed["title"] = body.title
            labels = metadata.merged(stored.metadata, body.metadata or {})
            if labels != stored.metadata:
                changed["metadata"] = labels
            if body.agent.model_fields_set:
                agent = agents.updated_for_session(stored.agent, body.agent, web_search=self.web_search)
                if self.web_networking:
                    web_domains.check(agent["tools"], stored.environment_config)
                if _busy(head) is not None or head.owner is not None:
                    raise InvalidRequest(
                        f"agent: tools and mcp_servers of session {session_id} can only be changed while it is idle"
                    )
                if agent != stored.agent:
                    changed["agent"] = agent
            resumes = False
            if "budget" in sent and budgets.change(head, body.budget):
                changed["budget"] = fold.budget_json(head.budget_cents)
                resumes = await budgets.resumes(tx, head)
            if changed:
                values = {name: value for name, value in changed.items() if name != "budget"}
                values["budget_cents"] = head.budget_cents
                await tx.execute(update(SESSIONS).where(SESSIONS.c.id == session_id).values(**values))
                # spec: beta_managed_agents_session_updated_event.py, metadata is absent when it became empty
                told = {key: value for key, value in changed.items() if key != "metadata" or value}
                appended = head.append([ev.new_event("session.updated", head.primary_thread_id, told)])
                if resumes:
                    appended += head.append(ev.running(head.primary_thread_id, head.agent_name))
                if "budget" in changed:
                    # Whoever runs the session has to look at it again.
                    head.input_seq += 1
                await log.write(tx, [head])
            answer = await _read(tx, workspace_id, session_id)
        if "budget" in changed:
            self.hints.work(session_id)
        if appended:
            self.hints.appended(appended)
        return answer

    async def archive(self, workspace_id: WorkspaceId, session_id: str) -> Json:
        """End the session for good; it stays readable. Repeating it changes nothing.

        Raises:
            NotFound. InvalidRequest: it is running.
        """
        appended: list[ev.StoredEvent] = []
        async with self.db.transaction() as tx:
            head = await lock_session(tx, workspace_id, session_id)
            if not head.archived:
                if (status := _busy(head)) is not None:
                    raise InvalidRequest(
                        f'Session {session_id} cannot be archived while its status is "{status}". '
                        "Only pending or idle sessions may be archived."
                    )
                if head.state.status != "terminated":
                    appended = head.append(ev.terminated(head.primary_thread_id, head.agent_name))
                head.input_seq += 1
                await log.write(tx, [head])
                await tx.execute(update(SESSIONS).where(SESSIONS.c.id == session_id).values(archived_at=head.at))
            answer = await _read(tx, workspace_id, session_id)
        if appended:
            self.hints.appended(appended)
            self.hints.work(session_id)
        return answer

    async def delete(self, workspace_id: WorkspaceId, session_id: str) -> Json:
        """Delete: 404 from now on; rows, files and sandbox are removed by reconcilers.

        Raises:
            NotFound. InvalidRequest: it is running.
        """
        async with self.db.transaction() as tx:
            head = await lock_session(tx, workspace_id, session_id)
            if _busy(head) is not None:
                raise InvalidRequest(
                    "Cannot delete session while it is running. Send an interrupt event or wait for the session to complete."
                )
            await tx.execute(
                update(SESSIONS)
                .where(SESSIONS.c.id == session_id)
                .values(deleted_at=head.at, environment_id=None, owner=None, epoch=SESSIONS.c.epoch + 1)
            )
        self.hints.changed(session_id)
        return {"id": session_id, "type": "session_deleted"}

    async def page(self, workspace_id: WorkspaceId, query: ListSessions) -> Json:
        """One page, with cursors in both directions."""
        async with self.db.autocommit() as tx:
            return await _page(tx, workspace_id, query)


async def lock_session(tx: Tx, workspace_id: WorkspaceId, session_id: str) -> log.Head:
    """Lock a session of the workspace. Raises NotFound."""
    check_id(session_id)
    head = await log.lock(tx, session_id, workspace_id=workspace_id)
    if head is None or head.deleted:
        raise not_found(session_id)
    return head


def _busy(head: log.Head) -> str | None:
    """The status that forbids archiving and deleting, if any. Queued work counts as running: it is about to be.

    Behind calls that wait for the client nothing is about to happen.
    """
    if head.state.status in BUSY:
        return head.state.status
    return "running" if head.inbox_count and not head.state.waiting else None


async def _read(tx: Tx, workspace_id: WorkspaceId, session_id: str) -> Json:
    check_id(session_id)
    row = (
        await tx.execute(
            select(SESSIONS, func.clock_timestamp().label("at")).where(
                SESSIONS.c.id == session_id,
                SESSIONS.c.workspace_id == workspace_id,
                SESSIONS.c.deleted_at.is_(None),
            )
        )
    ).one_or_none()
    if row is None:
        raise not_found(session_id)
    resources = await mounts.resources_of(tx, [session_id])
    return session_json(row, resources.get(session_id, []), row.at)


async def _page(tx: Tx, workspace_id: WorkspaceId, query: ListSessions) -> Json:
    bounds = {
        "gt": query.created_at_gt,
        "gte": query.created_at_gte,
        "lt": query.created_at_lt,
        "lte": query.created_at_lte,
    }
    statement = select(SESSIONS, func.clock_timestamp().label("at")).where(
        SESSIONS.c.workspace_id == workspace_id,
        SESSIONS.c.deleted_at.is_(None),
        *pagination.created_between(SESSIONS.c.created_at, bounds),  # pyright: ignore[reportArgumentType]
    )
    if not query.include_archived:
        statement = statement.where(SESSIONS.c.archived_at.is_(None))
    if query.agent_id is not None:
        statement = statement.where(SESSIONS.c.agent_id == query.agent_id)
        if query.agent_version is not None:
            statement = statement.where(SESSIONS.c.agent_version == query.agent_version)
    if query.deployment_id is not None or query.memory_store_id is not None:
        # No session was made by a deployment or has a memory store mounted: there are neither yet.
        statement = statement.where(false())
    if query.statuses:
        statement = statement.where(SESSIONS.c.status.in_(query.statuses))
    backward = False
    if query.page is not None:
        order, direction, micros, last_id = pagination.decode_cursor(LISTING, query.page, (str, str, int, str))
        if order != query.order:
            raise InvalidRequest("page token order does not match request")
        if direction not in ("next", "prev"):
            raise InvalidRequest("invalid page cursor")
        at = pagination.from_micros(micros)
        _within(at, bounds)
        backward = direction == "prev"
        key = tuple_(SESSIONS.c.created_at, SESSIONS.c.id)
        older = (query.order == "desc") != backward
        statement = statement.where(key < tuple_(at, last_id) if older else key > tuple_(at, last_id))
    descending = (query.order == "desc") != backward
    ordering = (SESSIONS.c.created_at.desc(), SESSIONS.c.id.desc()) if descending else (SESSIONS.c.created_at, SESSIONS.c.id)
    rows = (await tx.execute(statement.order_by(*ordering).limit(query.limit + 1))).all()
    more = len(rows) > query.limit
    rows = rows[: query.limit]
    if backward:
        rows = rows[::-1]
    resources = await mounts.resources_of(tx, [row.id for row in rows])
    # Behind a page reached backwards there is always the page it was reached from.
    has_next = more if not backward else True
    has_prev = query.page is not None if not backward else more
    return {
        "data": [session_json(row, resources.get(row.id, []), row.at) for row in rows],
        "next_page": _cursor(query.order, "next", rows[-1:]) if has_next else None,
        "prev_page": _cursor(query.order, "prev", rows[:1]) if has_prev else None,
    }


def _cursor(order: str, direction: str, row: Sequence[Any]) -> str | None:
    if not row:
        return None
    return pagination.encode_cursor(LISTING, [order, direction, pagination.as_micros(row[0].created_at), row[0].id])


def _within(at: datetime, bounds: dict[str, datetime | None]) -> None:
    """A cursor outside the asked range means that the range was narrowed between pages (spec: refused)."""
    after = bounds["gte"] or bounds["gt"]
    before = bounds["lte"] or bounds["lt"]
    floor = at.replace(microsecond=at.microsecond // 1000 * 1000)
    if (after is not None and at < after and floor < after) or (before is not None and floor > before):
        raise InvalidRequest("page: cursor position is excluded by created_at")
