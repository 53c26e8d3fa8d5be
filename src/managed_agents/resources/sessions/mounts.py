"""Resources of a session: what goes where."""

import posixpath
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import insert, select

from managed_agents.core import ids
from managed_agents.core.errors import InvalidRequest
from managed_agents.core.ids import SessionId, WorkspaceId
from managed_agents.db.engine import Tx
from managed_agents.encryption.sealing import Sealing
from managed_agents.resources.files import service as files
from managed_agents.resources.sessions import repositories
from managed_agents.resources.sessions.schemas import FileResource, GithubRepository
from managed_agents.resources.sessions.tables import RESOURCES

UPLOADS = "/mnt/session/uploads"
PATH_CHARS_MAX = 1024
NAME_BYTES_MAX = 255  # of one name, on any usual file system


def upload_path(mount_path: str | None, file_id: str, prefix: str) -> str:
    """Where a file lies inside the sandbox: the caller's path rooted under the uploads directory.

    Raises InvalidRequest naming the field, whose path begins with `prefix`: a path that climbs out, or none at all.
    """
    if mount_path is None:
        return f"{UPLOADS}/{file_id}"
    inner = mount_path.removeprefix(UPLOADS) if mount_path.startswith(UPLOADS + "/") else mount_path
    if len(mount_path) > PATH_CHARS_MAX:
        raise InvalidRequest(f"{prefix}mount_path: at most {PATH_CHARS_MAX} characters are allowed")
    if ".." in inner.split("/"):
        raise InvalidRequest(f"{prefix}mount_path: {mount_path!r} escapes /uploads/")
    if any(len(part.encode()) > NAME_BYTES_MAX for part in inner.split("/")):
        raise InvalidRequest(f"{prefix}mount_path: a name in it is longer than {NAME_BYTES_MAX} bytes")
    path = posixpath.normpath(f"{UPLOADS}/{inner.strip('/')}")
    if path == UPLOADS or any(ord(char) < 32 for char in path):
        raise InvalidRequest(f"{prefix}mount_path: Input should be the path of a file")
    return path


def _check_overlap(path: str, taken: Sequence[str], prefix: str) -> None:
    for other in taken:
        if path == other or path.startswith(other + "/") or other.startswith(path + "/"):
            raise InvalidRequest(f"{prefix}mount_path: overlaps another resource")


def behind(at: datetime) -> datetime:
    """The next instant: resources are listed by age, and those of one request must keep their order."""
    return at + timedelta(microseconds=1)


async def mount(
    tx: Tx,
    workspace_id: WorkspaceId,
    session_id: SessionId,
    wanted: Sequence[tuple[FileResource | GithubRepository, str]],
    at: datetime,
    *,
    sealing: Sealing,
) -> None:
    """Record what a new session is given. Each resource comes with the path of its fields in the request (`resources.0.`).

    Raises InvalidRequest or NotFound naming the field.
    """
    taken: list[str] = []
    for resource, prefix in wanted:
        if isinstance(resource, GithubRepository):
            path = repositories.clone_path(resource, prefix)
            _check_overlap(path, taken, prefix)
            await repositories.mount(tx, workspace_id, session_id, resource, path, at, sealing=sealing)
            taken.append(path)
        else:
            await mount_file(tx, workspace_id, session_id, resource, prefix, at, taken=taken)
        at = behind(at)


async def mount_file(
    tx: Tx,
    workspace_id: WorkspaceId,
    session_id: SessionId,
    resource: FileResource,
    prefix: str,
    at: datetime,
    *,
    taken: list[str],
) -> str:
    """Give the session a copy of a file, under a new id of its own; returns the resource's id.

    `taken` are the paths that are mounted already; the file's joins them. Raises InvalidRequest or NotFound naming the field.
    """
    path = upload_path(resource.mount_path, resource.file_id, prefix)
    _check_overlap(path, taken, prefix)
    taken.append(path)
    copy = await files.mint_session_copy(tx, workspace_id, session_id, resource.file_id, path=f"{prefix}file_id")
    resource_id = ids.new_id(ids.SESSION_RESOURCE)
    # The caller's own string is echoed; the default shows the full path.
    shown = path if resource.mount_path is None else resource.mount_path
    await tx.execute(
        insert(RESOURCES).values(
            id=resource_id,
            session_id=session_id,
            type="file",
            sandbox_path=path,
            file_id=copy.id,
            body={"file_id": copy.id, "mount_path": shown},
            created_at=at,
            updated_at=at,
        )
    )
    return resource_id


async def resources_of(tx: Tx, session_ids: Sequence[str]) -> dict[str, list[Any]]:
    """Resources of several sessions, in the order in which they were given."""
    if not session_ids:
        return {}
    found: dict[str, list[Any]] = {}
    statement = select(RESOURCES).where(RESOURCES.c.session_id.in_(session_ids)).order_by(RESOURCES.c.created_at, RESOURCES.c.id)
    for row in await tx.execute(statement):
        found.setdefault(row.session_id, []).append(row)
    return found
