"""Files over HTTP. Generally available: no beta value is needed, except to filter by session."""

from collections.abc import AsyncIterator
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from managed_agents.blobstore.store import BlobMissing
from managed_agents.core.errors import InvalidRequest, NotFound
from managed_agents.resources.files import service
from managed_agents.resources.files.schemas import ListFilesQuery, UploadForm
from managed_agents.resources.files.upload import Upload, receive
from managed_agents.resources.services import Blobs
from managed_agents.web.auth import MANAGED_AGENTS, PlainDeveloper, PlainViewer, has_managed_agents_beta
from managed_agents.web.operation import Answer, Shape, operation
from managed_agents.web.responses import Json
from managed_agents.web.state import Db

router = APIRouter(prefix="/v1/files", tags=["files"])

FILE = Answer("BetaFileMetadata")


@router.post("")
@operation(FILE, form=UploadForm)
async def upload(actor: PlainDeveloper, db: Db, received: Annotated[Upload, Depends(receive)]) -> Response:
    file = await service.create(
        db,
        actor.workspace_id,
        filename=received.filename,
        mime_type=received.mime_type,
        blob=received.blob,
        expires_in_seconds=received.expires_in_seconds,
    )
    return Json(file.body())


@router.get("")
@operation(Answer("BetaFileMetadata", Shape.PAGE_OF_FILES))
async def list_files(request: Request, actor: PlainViewer, db: Db, asked: ListFilesQuery) -> Response:
    if asked.scope_id is not None and not has_managed_agents_beta(request):
        raise InvalidRequest(f"scope_id: requires the anthropic-beta value {MANAGED_AGENTS}")
    page = await service.list_files(db, actor.workspace_id, asked)
    return Json(page.body())


@router.get("/{file_id}")
@operation(FILE)
async def retrieve_metadata(file_id: str, actor: PlainViewer, db: Db) -> Response:
    file = await service.retrieve(db, actor.workspace_id, file_id)
    return Json(file.body())


@router.get("/{file_id}/content")
@operation(Answer(shape=Shape.BYTES))
async def download(file_id: str, actor: PlainViewer, db: Db, blobs: Blobs) -> Response:
    file = await service.downloadable(db, actor.workspace_id, file_id)
    content = blobs.open(file.blob)
    try:
        first = await anext(content, b"")  # before the answer starts, so that a missing blob is still a 404
    except BlobMissing as error:
        raise NotFound(f"File '{file.id}' has no content any more") from error
    headers = {
        "content-length": str(file.size_bytes),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "x-content-type-options": "nosniff",
    }
    return StreamingResponse(_chained(first, content), media_type=file.mime_type, headers=headers)


@router.delete("/{file_id}")
@operation(Answer("BetaDeletedFile"))
async def delete(file_id: str, actor: PlainDeveloper, db: Db) -> Response:
    await service.delete_file(db, actor.workspace_id, file_id)
    return Json({"id": file_id, "type": "file_deleted"})


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for chunk in rest:
        yield chunk
