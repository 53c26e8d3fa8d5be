"""Rules of a session's resources: list, retrieve, add, update, delete.

What may change is the list of mounted files; the sandbox is brought in line by its owner before the next call
(`harness/hands.py`). Race: a file added while a worker runs the session. Both sides take the session row; the change
counts as input of an owned session, so its owner looks again before it asks the model or rests.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import delete, func, select, tuple_, update

from managed_agents.core import ids
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.core.ids import SessionId, WorkspaceId
from managed_agents.db.engine import Database, Tx
from managed_agents.encryption.sealing import Sealing
from managed_agents.eventlog import append as log
from managed_agents.eventlog.hints import Hints
from managed_agents.eventlog.tables import SESSIONS
from managed_agents.resources.files import service as files
from managed_agents.resources.sessions import mounts, repositories
from managed_agents.resources.sessions.present import resource_json
from managed_agents.resources.sessions.schemas import RESOURCES_MAX, FileResource, ListResources, RotateToken
from managed_agents.resources.sessions.service import check_id, lock_session, not_found
from managed_agents.resources.sessions.tables import RESOURCES
from managed_agents.web import pagination

Json = dict[str, Any]
LISTING = "resources/"  # of one session: a cursor is good for its own list only


async def page(db: Database, workspace_id: WorkspaceId, session_id: str, query: ListResources) -> Json:
    """One page in the order in which they were given; without a limit all of them. Raises NotFound."""
    check_id(session_id)
    statement = select(RESOURCES).where(RESOURCES.c.session_id == session_id)
    key = tuple_(RESOURCES.c.created_at, RESOURCES.c.id)
    if query.page is not None:
        micros, last_id = pagination.decode_cursor(LISTING + session_id, query.page, (int, str))
        statement = statement.where(key > tuple_(pagination.from_micros(micros), last_id))
    limit = RESOURCES_MAX if query.limit is None else query.limit
    async with db.autocommit() as tx:
        await _require_session(tx, workspace_id, session_id)
        rows = (await tx.execute(statement.order_by(RESOURCES.c.created_at, RESOURCES.c.id).limit(limit + 1))).all()
    return {
        "data": [resource_json(row) for row in rows[:limit]],
        "next_page": pagination.next_page(LISTING + session_id, rows, limit),
    }


async def retrieve(db: Database, workspace_id: WorkspaceId, session_id: str, resource_id: str) -> Json:
    """One resource. Raises NotFound."""
    async with db.autocommit() as tx:
        await _require_session(tx, workspace_id, session_id)
        return resource_json(await _select(tx, session_id, resource_id))


async def add(db: Database, hints: Hints, workspace_id: WorkspaceId, session_id: str, wanted: FileResource) -> Json:
    """Mount one more file; it is there before the session's next tool call.

    Raises:
        NotFound: session or file. InvalidRequest: archived, full, or the path is taken.
    """
    async with db.transaction() as tx:
        head = await _lock(tx, workspace_id, session_id)
        present = (await mounts.resources_of(tx, [session_id])).get(session_id, [])
        if len(present) >= RESOURCES_MAX:
            raise InvalidRequest(f"at most {RESOURCES_MAX} resources are allowed in a session")
        taken = [row.sandbox_path for row in present]
        # Behind all there are, whatever the clock says: the list's order is the order of adding.
        at = max([head.at, *(mounts.behind(row.created_at) for row in present)])
        resource_id = await mounts.mount_file(tx, workspace_id, SessionId(session_id), wanted, "", at, taken=taken)
        told = await _touch(tx, head)
        answer = resource_json(await _select(tx, session_id, resource_id))
    if told:
        hints.work(session_id)
    return answer


async def rotate_token(
    db: Database, sealing: Sealing, workspace_id: WorkspaceId, session_id: str, resource_id: str, command: RotateToken
) -> Json:
    """Replace a repository's token (spec: ResourceUpdateParams); it counts from the next request to the host on, and a clone that
    failed is tried again in the next turn.

    Raises:
        NotFound. InvalidRequest: archived, or of a kind without a token.
    """
    async with db.transaction() as tx:
        head = await _lock(tx, workspace_id, session_id)
        row = await _select(tx, session_id, resource_id)
        if row.type != "github_repository":
            raise InvalidRequest(
                f'authorization_token: a "{row.type}" resource has no token; '
                "only github_repository resources support token rotation"
            )
        columns = repositories.sealed_token(sealing, workspace_id, resource_id, row.body["url"], command.authorization_token)
        changed = update(RESOURCES).where(RESOURCES.c.id == resource_id)
        await tx.execute(changed.values(**columns, updated_at=head.at))
        await repositories.try_again(tx, session_id, resource_id)
        return resource_json(await _select(tx, session_id, resource_id))


async def delete_resource(db: Database, hints: Hints, workspace_id: WorkspaceId, session_id: str, resource_id: str) -> Json:
    """Unmount a file and delete the session's copy of it.

    Raises:
        NotFound. InvalidRequest: archived, or of a kind that stays for the session's life.
    """
    async with db.transaction() as tx:
        head = await _lock(tx, workspace_id, session_id)
        row = await _select(tx, session_id, resource_id)
        if row.type != "file":
            raise InvalidRequest(f'a "{row.type}" resource stays for the life of its session; only files can be removed')
        await tx.execute(delete(RESOURCES).where(RESOURCES.c.id == resource_id))
        await files.delete_session_copy(tx, session_id, row.file_id)
        told = await _touch(tx, head)
    if told:
        hints.work(session_id)
    return {"id": resource_id, "type": "session_resource_deleted"}


async def _touch(tx: Tx, head: log.Head) -> bool:
    """Note the change on the session; says whether an owner has to be told.

    An idle session is not woken: whoever claims it next reads its resources then.
    """
    owned = head.owner is not None
    values: dict[str, Any] = {"updated_at": head.at}
    if owned:
        values["input_seq"] = SESSIONS.c.input_seq + 1
    await tx.execute(update(SESSIONS).where(SESSIONS.c.id == head.id).values(values))
    return owned


async def _lock(tx: Tx, workspace_id: WorkspaceId, session_id: str) -> log.Head:
    head = await lock_session(tx, workspace_id, session_id)
    if head.archived or head.state.status == "terminated":
        raise InvalidRequest(f"Session {session_id} is archived and cannot be modified")
    return head


async def _require_session(tx: Tx, workspace_id: WorkspaceId, session_id: str) -> datetime:
    check_id(session_id)
    at: datetime | None = await tx.scalar(
        select(func.clock_timestamp()).where(
            SESSIONS.c.id == session_id, SESSIONS.c.workspace_id == workspace_id, SESSIONS.c.deleted_at.is_(None)
        )
    )
    if at is None:
        raise not_found(session_id)
    return at


async def _select(tx: Tx, session_id: str, resource_id: str) -> Any:
    row = None
    if ids.has_prefix(resource_id, ids.SESSION_RESOURCE):
        statement = select(RESOURCES).where(RESOURCES.c.session_id == session_id, RESOURCES.c.id == resource_id)
        row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise NotFound(f"Resource {resource_id[:100]} not found")
    return row
