"""Receiving an upload: the form's bytes go straight into the blob store."""

from dataclasses import dataclass

import orjson
from starlette.requests import Request

from managed_agents.blobstore.store import BlobRef, BlobStore, BlobStoreFull, BlobTooLarge
from managed_agents.core import limits
from managed_agents.core.errors import ApiError, InvalidRequest, TooLarge
from managed_agents.resources.files.names import filename_of, mime_type_of
from managed_agents.resources.files.schemas import EXPIRES_SECONDS_MAX, EXPIRES_SECONDS_MIN
from managed_agents.resources.services import Blobs
from managed_agents.web.multipart import Part, parts

FIELD_BYTES_MAX = 64


@dataclass(frozen=True, slots=True)
class Upload:
    """A form received whole."""

    filename: str
    mime_type: str
    blob: BlobRef
    expires_in_seconds: int | None

    @property
    def fingerprint(self) -> bytes:
        """What was uploaded; the boundary of the form, which differs each time, is no part of it."""
        return orjson.dumps([self.filename, self.mime_type, self.blob.sha256, self.expires_in_seconds])


async def receive(request: Request, blobs: Blobs) -> Upload:
    """Store the part `file` and read the fields beside it. Raises `InvalidRequest`, `TooLarge`, a 529 without room."""
    file: tuple[str, str, BlobRef] | None = None
    expires: int | None = None
    async for part in parts(request, limits.FILE_BYTES_MAX):
        match part.name:
            case "file" if file is None:
                file = await _store(part, blobs)
            case "expires_in_seconds" if expires is None:
                expires = await _expires(part)
            case "file" | "expires_in_seconds":
                raise InvalidRequest(f"{part.name}: given more than once")
            case name:
                raise InvalidRequest(f"{name[:100]}: Extra inputs are not permitted")
    if file is None:
        raise InvalidRequest("file: Field required")
    filename, mime_type, blob = file
    return Upload(filename, mime_type, blob, expires)


async def _store(part: Part, blobs: BlobStore) -> tuple[str, str, BlobRef]:
    mime_type = mime_type_of(part.content_type, part.filename)
    filename = filename_of(part.filename, mime_type)
    try:
        blob = await blobs.put(part.data, limits.FILE_BYTES_MAX)
    except BlobTooLarge as error:
        megabytes = limits.FILE_BYTES_MAX // (1024 * 1024)
        raise TooLarge(f"file: exceeds the maximum size of {megabytes} MB") from error
    except BlobStoreFull as error:
        # assumed: what the hosted service would say of its own; SDKs try again.
        words = "file: the server's storage is full, try again later"
        raise ApiError(529, "overloaded_error", words, headers={"retry-after": "5"}) from error
    return filename, mime_type, blob


async def _expires(part: Part) -> int:
    raw = b""
    async for chunk in part.data:
        raw += chunk
        if len(raw) > FIELD_BYTES_MAX:
            raise InvalidRequest("expires_in_seconds: Input should be a valid integer")
    if not raw.isdigit():
        raise InvalidRequest("expires_in_seconds: Input should be a valid integer")
    if not EXPIRES_SECONDS_MIN <= int(raw) <= EXPIRES_SECONDS_MAX:
        bounds = f"{EXPIRES_SECONDS_MIN} and {EXPIRES_SECONDS_MAX}"
        raise InvalidRequest(f"expires_in_seconds: Input should be between {bounds}")
    return int(raw)
