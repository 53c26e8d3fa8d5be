"""Files: what was uploaded, the read-only copies mounted into sessions, and what sessions produced.

A row refers to its bytes by digest; the bytes are stored before the row is written, and a collector removes
what no row refers to. So a crash between the two leaves only bytes that the collector will find. An expired
file stops referring to its bytes; its metadata stays readable for a while.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, delete, func, insert, literal, or_, select, tuple_
from sqlalchemy.dialects.postgresql import insert as upsert

from managed_agents.blobstore.store import BlobRef
from managed_agents.core import clock, ids, limits
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.db.engine import Database, Tx
from managed_agents.resources.files.names import mime_type_of, output_filename
from managed_agents.resources.files.schemas import ListFilesQuery
from managed_agents.resources.files.tables import DeletedOutputRow, FileRow
from managed_agents.web import pagination

METADATA_AFTER_EXPIRY = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class File:
    """One file's metadata and the reference to its bytes."""

    id: str
    filename: str
    mime_type: str
    size_bytes: int
    sha256: str
    downloadable: bool
    session_id: str | None
    created_at: datetime
    expires_at: datetime | None
    expired: bool

    @property
    def blob(self) -> BlobRef:
        """The bytes."""
        return BlobRef(self.sha256, self.size_bytes)

    def body(self) -> dict[str, Any]:
        """Return the object as shown to clients."""
        shown: dict[str, Any] = {
            "id": self.id,
            "type": "file",
            "filename": self.filename,
            "mime_type": self.mime_type,
            "size_bytes": self.size_bytes,
            "created_at": clock.millis(self.created_at),
            "downloadable": self.downloadable,
            "expires_at": None if self.expires_at is None else clock.millis(self.expires_at),
        }
        if self.session_id is not None:
            shown["scope"] = {"id": self.session_id, "type": "session"}
        return shown


@dataclass(frozen=True, slots=True)
class FilePage:
    """A page for both styles of pagination."""

    files: list[File]
    next_page: str | None
    has_more: bool

    def body(self) -> dict[str, Any]:
        """Return the page as shown to clients: the fields of the current SDK and those of older ones."""
        return {
            "data": [file.body() for file in self.files],
            "next_page": self.next_page,
            "has_more": self.has_more,
            "first_id": self.files[0].id if self.files else None,
            "last_id": self.files[-1].id if self.files else None,
        }


async def create(
    db: Database,
    workspace_id: str,
    *,
    filename: str,
    mime_type: str,
    blob: BlobRef,
    expires_in_seconds: int | None,
) -> File:
    """Record an upload whose bytes are stored. Uploads are never downloadable (spec: files guide)."""
    expires_at = None
    if expires_in_seconds is not None:
        expires_at = func.now() + timedelta(seconds=expires_in_seconds)
    async with db.transaction() as tx:
        inserted = await tx.execute(
            insert(FileRow)
            .values(
                id=ids.new_id(ids.FILE),
                workspace_id=workspace_id,
                filename=filename,
                mime_type=mime_type,
                size_bytes=blob.size,
                sha256=blob.sha256,
                downloadable=False,
                expires_at=expires_at,
            )
            .returning(*_COLUMNS)
        )
        return _file(inserted.one())


async def retrieve(db: Database, workspace_id: str, file_id: str) -> File:
    """Return one file's metadata. Raises `NotFound`."""
    async with db.transaction() as tx:
        return await retrieve_in(tx, workspace_id, file_id)


async def retrieve_in(tx: Tx, workspace_id: str, file_id: str) -> File:
    """Return one file's metadata. Raises `NotFound`."""
    row = None
    if ids.has_prefix(file_id, ids.FILE):
        statement = _visible(workspace_id).where(FileRow.id == file_id)
        row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise NotFound("File not found.")
    return _file(row)


async def downloadable(db: Database, workspace_id: str, file_id: str) -> File:
    """Return a file whose bytes may be sent to the client. Raises `NotFound`, `InvalidRequest`."""
    file = await retrieve(db, workspace_id, file_id)
    if not file.downloadable:
        raise InvalidRequest(f"File '{file.id}' is not downloadable", error_code="file_not_downloadable")
    if file.expired:
        raise NotFound(f"File '{file.id}' has expired", error_code="file_expired")
    return file


async def delete_file(db: Database, workspace_id: str, file_id: str) -> None:
    """Delete a file; copies in sessions stay. An output that is still in its sandbox does not come back as it is.

    Raises:
        NotFound. InvalidRequest: it is such a copy, which goes with the session's resource that names it.
    """
    async with db.transaction() as tx:
        file = await retrieve_in(tx, workspace_id, file_id)
        if file.session_id is not None and not file.downloadable:
            raise InvalidRequest(
                f"File '{file.id}' is mounted into session {file.session_id}; "
                "delete its resource: DELETE /v1/sessions/{session_id}/resources/{resource_id}"
            )
        deleting = delete(FileRow).where(FileRow.id == file.id)
        gone = (await tx.execute(deleting.returning(FileRow.session_id, FileRow.output_path, FileRow.sha256))).one_or_none()
        if gone is not None and gone.output_path is not None:
            statement = upsert(DeletedOutputRow).values(
                session_id=gone.session_id, output_path=gone.output_path, sha256=gone.sha256
            )
            again = {"sha256": statement.excluded.sha256}
            await tx.execute(statement.on_conflict_do_update(index_elements=_OUTPUT_KEY, set_=again))


async def list_files(db: Database, workspace_id: str, query: ListFilesQuery) -> FilePage:
    """Return a page, newest first."""
    _check_query(query)
    statement = _visible(workspace_id)
    if query.scope_id is not None:
        statement = statement.where(FileRow.session_id == query.scope_id)
    async with db.transaction() as tx:
        if query.ids is not None:
            asked = [file_id for file_id in dict.fromkeys(query.ids) if ids.has_prefix(file_id, ids.FILE)]
            statement = statement.where(FileRow.id.in_(asked))
            rows = (await tx.execute(statement.order_by(*_NEWEST_FIRST))).all()
            return FilePage([_file(row) for row in rows], None, False)
        if query.before_id is not None:
            edge = await _position(tx, workspace_id, query.before_id, "before_id")
            statement = statement.where(edge < _POSITION).order_by(FileRow.created_at, FileRow.id)
            rows = (await tx.execute(statement.limit(query.limit + 1))).all()
            files = [_file(row) for row in rows[: query.limit]][::-1]
            return FilePage(files, None, len(rows) > query.limit)
        if query.after_id is not None:
            edge = await _position(tx, workspace_id, query.after_id, "after_id")
            statement = statement.where(edge > _POSITION)
        statement = pagination.newest_first(
            statement,
            FileRow.created_at.expression,
            FileRow.id.expression,
            listing="files",
            page=query.page,
            limit=query.limit,
        )
        rows = (await tx.execute(statement)).all()
    cursor = pagination.next_page("files", rows, query.limit)
    return FilePage([_file(row) for row in rows[: query.limit]], cursor, cursor is not None)


async def mint_session_copy(tx: Tx, workspace_id: str, session_id: str, file_id: str, *, path: str) -> File:
    """Give a session its own read-only copy of a file under a new id (observed hosted behaviour).

    The copy shares the bytes and outlives the original. Raises `NotFound` naming `path`, the field of the
    request.
    """
    missing = NotFound(f"{path}: {file_id[:100]} not found")
    if not ids.has_prefix(file_id, ids.FILE):
        raise missing
    original = (
        select(
            literal(ids.new_id(ids.FILE)),
            FileRow.workspace_id,
            FileRow.filename,
            FileRow.mime_type,
            FileRow.size_bytes,
            FileRow.sha256,
            literal(False),
            literal(session_id),
        )
        .where(FileRow.id == file_id, FileRow.workspace_id == workspace_id, _LIVE)
        # The collector must not find the last reference gone between our reading and our writing.
        .with_for_update(key_share=True, read=True)
    )
    names = [
        "id",
        "workspace_id",
        "filename",
        "mime_type",
        "size_bytes",
        "sha256",
        "downloadable",
        "session_id",
    ]
    copied = await tx.execute(insert(FileRow).from_select(names, original).returning(*_COLUMNS))
    row = copied.one_or_none()
    if row is None:
        raise missing
    return _file(row)


async def add_output(
    tx: Tx, workspace_id: str, session_id: str, *, output_path: str, mime_type: str | None, blob: BlobRef
) -> File:
    """Record a file that a session wrote to `output_path` below its outputs directory; it is downloadable.

    Safe to repeat: the same bytes at the same path keep their file, other bytes take its place as a new one.
    """
    values = {
        "id": ids.new_id(ids.FILE),
        "workspace_id": workspace_id,
        "filename": output_filename(output_path),
        "mime_type": mime_type_of(mime_type, output_path),
        "size_bytes": blob.size,
        "sha256": blob.sha256,
        "downloadable": True,
        "session_id": session_id,
        "output_path": output_path,
    }
    statement = upsert(FileRow).values(values)
    replaced = {name: statement.excluded[name] for name in ("id", "filename", "mime_type", "size_bytes", "sha256")}
    await tx.execute(
        statement.on_conflict_do_update(
            index_elements=[FileRow.session_id, FileRow.output_path],
            set_={**replaced, "created_at": func.now()},
            where=FileRow.sha256 != statement.excluded.sha256,
        )
    )
    await tx.execute(
        delete(DeletedOutputRow).where(DeletedOutputRow.session_id == session_id, DeletedOutputRow.output_path == output_path)
    )
    row = await tx.execute(select(*_COLUMNS).where(FileRow.session_id == session_id, FileRow.output_path == output_path))
    return _file(row.one())


async def delete_for_session(tx: Tx, session_id: str) -> None:
    """Delete what belongs to a session: its copies and what it produced. Repeating is harmless."""
    await tx.execute(delete(FileRow).where(FileRow.session_id == session_id))
    await tx.execute(delete(DeletedOutputRow).where(DeletedOutputRow.session_id == session_id))


async def delete_session_copy(tx: Tx, session_id: str, file_id: str) -> None:
    """Delete one copy that was mounted into a session. Repeating is harmless."""
    await tx.execute(delete(FileRow).where(FileRow.id == file_id, FileRow.session_id == session_id))


def referenced(digests: Sequence[str]) -> Select[str]:
    """Select which of `digests` a live file refers to, for the blob collector."""
    return select(FileRow.sha256).where(FileRow.sha256.in_(digests), _LIVE).distinct()


_LIVE: ColumnElement[bool] = or_(FileRow.expires_at.is_(None), FileRow.expires_at > func.now())
_READABLE: ColumnElement[bool] = or_(FileRow.expires_at.is_(None), FileRow.expires_at > func.now() - METADATA_AFTER_EXPIRY)
_COLUMNS = (
    FileRow.id,
    FileRow.filename,
    FileRow.mime_type,
    FileRow.size_bytes,
    FileRow.sha256,
    FileRow.downloadable,
    FileRow.session_id,
    FileRow.created_at,
    FileRow.expires_at,
    and_(FileRow.expires_at.is_not(None), FileRow.expires_at <= func.now()).label("expired"),
)
_OUTPUT_KEY = (DeletedOutputRow.session_id, DeletedOutputRow.output_path)
_POSITION = tuple_(FileRow.created_at, FileRow.id)
_NEWEST_FIRST = (FileRow.created_at.desc(), FileRow.id.desc())


def _visible(workspace_id: str) -> Select[*tuple[Any, ...]]:
    return select(*_COLUMNS).where(FileRow.workspace_id == workspace_id, _READABLE)


def _file(row: Sequence[Any]) -> File:
    return File(*row)


async def _position(tx: Tx, workspace_id: str, file_id: str, path: str) -> Any:
    """Return where a file stands in the list. Raises `InvalidRequest` naming the parameter."""
    row = None
    if ids.has_prefix(file_id, ids.FILE):
        statement = select(FileRow.created_at, FileRow.id).where(FileRow.id == file_id, FileRow.workspace_id == workspace_id)
        row = (await tx.execute(statement)).one_or_none()
    if row is None:
        raise InvalidRequest(f"{path}: {file_id[:100]} not found")
    return tuple_(*row)


def _check_query(query: ListFilesQuery) -> None:
    """Check what single fields cannot tell: which of them go together."""
    positions = [name for name in ("page", "after_id", "before_id") if getattr(query, name) is not None]
    if len(positions) > 1:
        raise InvalidRequest(f"{positions[1]}: cannot be combined with {positions[0]}")
    if query.ids is not None:
        for name in ("page", "limit", "after_id", "before_id"):
            if name in query.model_fields_set:
                raise InvalidRequest(f"{name}: cannot be combined with ids")
        if len(set(query.ids)) > limits.FILE_IDS_MAX:
            raise InvalidRequest(f"ids: at most {limits.FILE_IDS_MAX} ids are allowed")
    if query.scope_id is not None and not ids.has_prefix(query.scope_id, ids.SESSION):
        raise InvalidRequest("scope_id: must be the id of a session")
