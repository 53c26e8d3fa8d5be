"""The error envelope, the only form in which a failure leaves this server.

Every failure becomes an `ApiError` first (`as_api_error`), so no framework's or driver's text reaches a
caller. What is not expected becomes a 500 whose cause is in our log under the same request id, never in the
answer.
"""

from collections.abc import Mapping
from typing import cast

import orjson
from pydantic_core import ErrorDetails, ValidationError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from managed_agents.core.errors import ApiError, InvalidRequest, NotFound, TransientError
from managed_agents.db.engine import connection_lost

PATH_PART_CHARS_MAX = 100


def envelope(error: ApiError, request_id: str) -> bytes:
    """Encode `error` as the body of an answer."""
    inner: dict[str, object] = {"type": error.error_type, "message": _encodable(error.message)}
    if error.error_code is not None:
        inner["details"] = {"error_code": error.error_code}
    return orjson.dumps({"type": "error", "error": inner, "request_id": request_id})


def as_api_error(error: Exception) -> ApiError | None:
    """Turn `error` into an answer, or return None when it is a bug and the answer is a bare 500."""
    match error:
        case ApiError():
            return error
        case HTTPException(status_code=404):
            return NotFound()
        case HTTPException(status_code=405):
            return ApiError(405, "invalid_request_error", "method not allowed", headers=error.headers or {})
        case HTTPException(status_code=status) if status < 500:
            return ApiError(status, "invalid_request_error", str(error.detail))
        case PoolTimeout() | TransientError():
            return _overloaded()
        case _ if connection_lost(error):
            return _overloaded()
        case _:
            return None


def _overloaded() -> ApiError:
    return ApiError(529, "overloaded_error", "Overloaded", headers={"retry-after": "1"})


def internal_error() -> ApiError:
    """Return the answer to a bug."""
    return ApiError(500, "api_error", "Internal server error")


def from_validation(error: ValidationError, document: object, *, root: str) -> InvalidRequest:
    """Name the first offending field of `document` as `tools.0.name: reason`."""
    first = error.errors(include_url=False, include_context=True)[0]
    path = _path(first, document)
    message = first["msg"]
    context: Mapping[str, object] = first.get("ctx") or {}
    match first["type"]:
        case "union_tag_invalid":
            path.append(str(context["discriminator"]).strip("'"))
            message = f"Input should be {context['expected_tags']}"
        case "union_tag_not_found":
            path.append(str(context["discriminator"]).strip("'"))
            message = "Field required"
        case "model_type" | "model_attributes_type" | "dict_type":
            message = "Input should be an object"
        case _:
            pass
    code = context.get("error_code")
    return InvalidRequest(f"{'.'.join(path) or root}: {message}", error_code=code if isinstance(code, str) else None)


def _path(error: ErrorDetails, document: object) -> list[str]:
    """Return where the error is in `document`; names of union members, which pydantic mixes in, are left
    out.
    """
    missing = error["type"] == "missing"
    path = _resolved(document, error["loc"], missing=missing, whole=True)
    if path is None:
        path = _resolved(document, error["loc"], missing=missing, whole=False)
    return [str(part)[:PATH_PART_CHARS_MAX] for part in path or ()]


def _resolved(value: object, location: tuple[int | str, ...], *, missing: bool, whole: bool) -> list[int | str] | None:
    """Follow `location` down `value`, skipping what is not there.

    A union member may be called like a field beside it (`text`): where both readings are possible, the one that
    can be followed to its end is right. None when `whole` and the last part leads nowhere.
    """
    if not location:
        return []
    part, rest = location[0], location[1:]
    if missing and not rest:
        return [part] if isinstance(value, Mapping) else None
    fields: Mapping[object, object] = {}
    if isinstance(value, Mapping):
        fields = cast(Mapping[object, object], value)
    elif isinstance(value, list):
        fields = dict(enumerate(cast(list[object], value)))
    if part in fields:
        below = _resolved(fields[part], rest, missing=missing, whole=whole)
        if below is not None:
            return [part, *below]
    if not rest:
        return None if whole else []
    return _resolved(cast(object, value), rest, missing=missing, whole=whole)


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
